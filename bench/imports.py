"""Times imports: ``python -m bench.imports '[["fastfp8", "asyncio"], ...]'`` prints, as JSON, what each one took.

Each import is made in a fork of one process that has imported torch and nothing of ours, so that it is fresh although
torch, which takes a hundred times as long, is loaded once. A list a round of modules goes in, a list a round of objects
of ``module``, ``seconds`` and ``triton``, the Triton modules that came with it, comes out.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def measure(rounds: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
    """Runs this module in a new process."""
    command = [sys.executable, "-m", __spec__.name, json.dumps(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the imports failed:\n{done.stderr}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _loaded(package: str) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == package]


def _timed(module: str) -> dict[str, Any]:
    for name in _loaded(module):  # torch may have loaded it already
        del sys.modules[name]
    start = time.perf_counter()
    importlib.import_module(module)
    seconds = time.perf_counter() - start
    return {"module": module, "seconds": seconds, "triton": len(_loaded("triton"))}


def _in_fork(module: str) -> dict[str, Any]:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(send, json.dumps(_timed(module)).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # nothing that the parent owns is to be flushed or torn down here
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"import {module} failed")
    return dict(json.loads(text))


def main(argument: str) -> None:
    import torch  # noqa: F401

    if loaded := _loaded("fastfp8") + _loaded("triton"):
        raise SystemExit(f"loaded before the first measurement: {', '.join(loaded[:3])}")
    print(json.dumps([[_in_fork(module) for module in modules] for modules in json.loads(argument)]))


if __name__ == "__main__":
    main(sys.argv[1])
