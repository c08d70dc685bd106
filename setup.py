"""Builds the kernels (PTX and cubin, shipped as data) and the extension, which links neither CUDA nor libtorch_cuda."""

from __future__ import annotations

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))

import build_kernels  # noqa: E402

# The stable ABI of torch 2.10: one extension for every torch from there on, CPU or CUDA build.
TORCH_TARGET_VERSION = "0x020a000000000000"


class BuildExtension(build_ext):
    def run(self) -> None:
        # Kept, because setuptools clears `inplace` while it builds, and copies only extensions back to the sources.
        self.package_root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        super().run()

    def build_extensions(self) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.exists():
            raise build_kernels.BuildError(f"no {header}: install this Python's headers (Debian: python3-dev)")
        toolkit = build_kernels.find_toolkit()
        nccl = build_kernels.find_nccl(toolkit)
        kernels = self.package_root / "fastfp8" / "kernels"
        before = build_kernels.nccl_of(kernels)
        build_kernels.build(kernels, toolkit, nccl)
        # setuptools goes by the dates of our files, in which NCCL's headers do not show.
        self.force = self.force or build_kernels.nccl_of(kernels) != before
        for extension in self.extensions:
            extension.include_dirs = [pybind11.get_include(), *include_paths(), str(toolkit.include)]
            extension.library_dirs = [str(Path(torch.__file__).parent / "lib")]
            extension.define_macros = [
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
                ("FASTFP8_VERSION", f'"{self.distribution.get_version()}"'),
            ]
            # Opened at run time, never linked; before NCCL 2.31 its structures are those of one version.
            if isinstance(nccl, build_kernels.Nccl):
                extension.extra_compile_args += ["-isystem", str(nccl.include)]
                extension.define_macros.append(("FASTFP8_NCCL", "1"))
        self.compile_in_parallel()
        super().build_extensions()
        print(f"built fastfp8._C against torch {torch.__version__}", flush=True)

    def compile_in_parallel(self) -> None:
        """setuptools compiles an extension's files one after the other; they have nothing to do with each other."""
        one_by_one = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: one_by_one([source], **options), sources))
            return [path for found in objects for path in found]

        self.compiler.compile = compile_all


sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*/*.cpp"))
headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*/*.h"))

setup(
    ext_modules=[
        Extension(
            "fastfp8._C",
            sources,
            depends=headers,
            libraries=["torch_cpu", "dl"],
            extra_compile_args=[
                "-std=c++20",
                "-O2",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
            ],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
