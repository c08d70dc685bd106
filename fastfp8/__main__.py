"""``python -m fastfp8``: what is installed, what was built, and which backend of each op is usable here."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _C, __version__, backends


def _driver() -> str:
    version = _C.driver_version()
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none found"


def _gpus() -> str:
    found = [f"{name} (sm_{major}{minor}, {sms} SMs)" for name, major, minor, sms in _C.devices()]
    return ", ".join(found) or f"none found ({_C.driver_unusable_reason()})"


def _rails(built: dict[str, Any]) -> str:
    nccl = built["nccl"]
    if nccl["version"] is None:
        return f"not over NCCL: {nccl['reason']} when fastfp8 was built"
    return f"over NCCL {nccl['version']}, headers from {nccl['source']}; untested on silicon"


def report() -> str:
    """The table as text."""
    built = backends.built_kernels()
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    rows = [
        ("fastfp8", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} ({cuda})"),
        ("CUDA driver", _driver()),
        ("GPU", _gpus()),
    ]
    if built:
        kernels = [name for module in built["modules"].values() for name in module]
        rows.append(
            ("kernels", f"{len(kernels)} for {built['arch']}, nvcc {built['nvcc']} from {built['nvcc_source']}")
        )
        rows += [("", name) for name in sorted(kernels)]
        rows.append(("rails", _rails(built)))
    else:
        rows.append(("kernels", "none were built"))
    lines = [f"{name:<12} {value}" for name, value in rows]
    width = max(map(len, backends.OPS))
    lines += ["", f"{'op':<{width}} {'backend':<17} usable here"]
    for op, table in backends.usable().items():
        for backend, reason in table.items():
            lines.append(f"{op:<{width}} {backend:<17} {'no: ' + reason if reason else 'yes'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
