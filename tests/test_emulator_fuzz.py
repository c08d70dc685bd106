"""Text that is wrong in random ways: the emulator loads it or raises EmulationError, and never crashes.

The quick test mutates inside this process; the slow ones run ``emulator/fuzz``, a program with the emulator's sources
under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from backends import backend, backend_params
from planted import clusters, copies, global_memory, mbarriers, tensor_core, threads

from fastfp8.backends import KERNELS

pytestmark = backend_params(["emulator"])[0].marks

WRITTEN = sorted((Path(__file__).resolve().parent / "emulator" / "fuzz" / "corpus").glob("*.ptx"))
FAMILIES = (threads, global_memory, mbarriers, copies, tensor_core, clusters)
SECONDS = 60
BODY_LINES = 150
MISTAKES = {
    "races": "race: 4 bytes",
    "syntax": "it reads %r1, uninitialised",
}  # of the corpus, and how they are reported


def shortened(text: str) -> str:
    """The first kernel of a module, cut down to ``BODY_LINES`` without jumps: small, but it ends as it should."""
    begin = re.search(r"^\{", text, re.M)
    assert begin is not None
    body = text[begin.end() :].partition("\n}")[0].splitlines()
    kept = [line for line in body if not re.search(r"\bbra\b|[{}]\s*$", line)][:BODY_LINES]
    return text[: begin.end()] + "\n".join(kept) + "\nret;\n}\n"


def triton_ptx() -> list[str]:
    """What Triton makes of this package's kernels; nothing if it is not installed."""
    if backend_params(["triton_interpreter"])[0].marks[-1].args[0]:
        return []
    from emulator import Machine

    texts: list[str] = []
    load = Machine.load

    def keep(machine: Machine, text: str) -> object:
        texts.append(text)
        return load(machine, text)

    with mock.patch.object(Machine, "load", keep):
        scaled = backend("emulator").quantize(torch.ones(2, 256))
        backend("emulator").dequantize(scaled, torch.bfloat16)
    return texts


def planted_ptx() -> list[str]:
    """The kernels with planted mistakes, and what is right in their place."""
    texts = []
    for bug in [bug for family in FAMILIES for bug in family.BUGS.values()]:
        shape = "" if "ntid" in bug.directives else f" .reqntid {bug.block}"
        launched = replace(bug, directives=f"{bug.directives}{shape} .reqnctapercluster {bug.cluster}")
        texts += [launched.text(wrong) for wrong in (True, False)]
    return texts


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    modules = [shortened(path.read_text()) for path in sorted(KERNELS.glob("*.ptx"))[:2]]
    return [path.read_text() for path in WRITTEN] + modules + planted_ptx() + triton_ptx()


def mutations(corpus: list[str], seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    tokens = sorted({t for text in corpus for t in re.findall(r"[%.$\w:]+|\S", text)}) + [
        '"',
        "/*",
        "\0",
        "\u20ac",
        "-1",
    ]
    for _ in range(count):
        parts = re.findall(r"[%.$\w:]+\s*|\S\s*|^\s+", rng.choice(corpus))
        for _ in range(rng.choice([1, 1, 2, 4])):
            at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
            match rng.randrange(6):
                case 0:
                    parts[at], parts[other] = parts[other], parts[at]
                case 1:
                    parts[at] = ""
                case 2:
                    parts[at] += parts[other]
                case 3:
                    parts[at] = rng.choice(tokens) + " "
                case 4:
                    parts[at] = parts[at].replace(rng.choice(parts[at] or " "), chr(rng.randrange(256)))
                case _:
                    parts = parts[: max(at, 1)] if rng.randrange(8) == 0 else parts
        yield "".join(parts)


def test_the_corpus_is_ptx(corpus: list[str]) -> None:
    """Mutations of what does not parse would test little."""
    from emulator.build import native

    for text in corpus:
        assert " ret\n" in native().describe(text)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_the_corpus_runs(path: Path, seed: int) -> None:
    """Mutations of what does not load, or stops at once, would test little."""
    from emulator import EmulationError, Machine, TensorMap

    def stated(directive: str, otherwise: int) -> int:
        found = re.search(rf"\.{directive} (\d+)", text)
        return int(found[1]) if found else otherwise

    text = path.read_text()
    room = np.zeros(8192 + 128, np.uint8)
    buffer = room[-room.ctypes.data % 128 :][:8192].view(np.uint32).reshape(64, 32)
    arguments = {8: buffer, 128: TensorMap(buffer, (2, 32), swizzle=0)}
    ctas = stated("reqnctapercluster", 1)
    for kernel in Machine(seed).load(text).values():
        args = [arguments.get(size, 0) for _, size in kernel._parameters]
        mistake = MISTAKES.get(path.stem)
        with pytest.raises(EmulationError, match=mistake) if mistake else contextlib.nullcontext():
            kernel.launch(ctas, stated("(?:req|max)ntid", 64), ctas, shared_bytes=1024, args=args)


@pytest.mark.parametrize("seed", range(4))
def test_mutations(corpus: list[str], seed: int) -> None:
    from emulator import EmulationError, Machine
    from emulator.build import native

    outcomes = {"parsed": 0, "refused": 0}
    for text in mutations(corpus, seed, 300):
        try:
            native().describe(text)
            outcomes["parsed"] += 1
            Machine().load(text)
        except EmulationError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_truncations() -> None:
    """Within a function none is a module; between functions any is."""
    from emulator import EmulationError
    from emulator.build import native

    text = (WRITTEN[0].parent / "syntax.ptx").read_text()
    begin, end = text.rindex("\n{"), text.rindex("}")
    for size in range(begin + 2, end + 1):
        with pytest.raises(EmulationError):
            native().describe(text[:size])
    native().describe(text[:begin].rpartition("}")[0] + "}")
    native().describe(text[: end + 1])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("stage", ["parse", "load", "launch"])
def test_under_sanitizers(stage: str, corpus: list[str], tmp_path: Path) -> None:
    from emulator.build import fuzzer

    paths = [tmp_path / f"{i}.ptx" for i in range(len(corpus))]
    for path, text in zip(paths, corpus, strict=True):
        path.write_text(text)
    failure = tmp_path / "failure.ptx"
    command = [str(c) for c in (fuzzer(), stage, 1, SECONDS, failure, *paths)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, f"{failure}:\n{done.stderr[-6000:]}"
    inputs, passed = (int(n) for n in re.findall(r"\d+", done.stdout))
    assert inputs > 100
    assert 0 < passed < inputs
