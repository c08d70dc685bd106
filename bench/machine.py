"""Which machine this is, with which software: what a reader needs to know to compare two runs."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from fastfp8 import _C
from fastfp8.backends import built_kernels

from .rows import Environment

# Packages whose version can change a number here.
PACKAGES = {"triton": "triton", "deep_gemm": "sgl-deep-gemm", "cublas": "nvidia-cublas", "nccl": "nvidia-nccl-cu13"}


def environment() -> Environment:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Environment(
        machine=machine_name(gpu, torch.cuda.device_count() if gpu else 0),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit(),
        cpu=cpu_model(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        gpu=gpu,
        driver=driver_version(),
        versions=versions(),
    )


def machine_name(gpu: str | None, gpus: int) -> str:
    """The folder of this machine's history: what its numbers depend on most, and nothing that names its owner."""
    if gpu is not None:
        return slug(gpu) + (f"-x{gpus}" if gpus > 1 else "")
    maker = re.sub(r"\((?:R|TM)\)|\bProcessor\b|\bCPU\b|@.*|\d+-Core", "", cpu_model(), flags=re.I)
    return f"cpu-{slug(maker)}-{len(os.sched_getaffinity(0))}cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if nvcc := built_kernels().get("nvcc"):
        found["nvcc"] = nvcc
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str | None:
    """As nvidia-smi prints it; without nvidia-ml-py the CUDA version that it supports. None without a driver."""
    if _C.driver_unusable_reason():
        return None
    supports = f"for CUDA {_C.driver_version() // 1000}.{_C.driver_version() % 1000 // 10}"
    try:
        import pynvml
    except ImportError:
        return supports
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return supports


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout, with a plus where files differ from it; None outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout else "")
