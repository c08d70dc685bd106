"""The wheel, as a user gets it. These download: run them with ``pytest -m download tests/test_wheel.py``."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, torch, fastfp8
x, w = torch.randn(300, 400, dtype=torch.bfloat16), torch.randn(64, 400)
a, b = fastfp8.quantize(x), fastfp8.quantize(w, (128, 128), pow2=True)
out, exact = fastfp8.gemm(a, b, out_dtype=torch.float32), a.dequantize().double() @ b.dequantize().double().t()
compiled = torch.compile(lambda x, b: fastfp8.gemm(fastfp8.quantize(x), b), fullgraph=True, backend="aot_eager")
torch.library.opcheck(torch.ops.fastfp8.quantize.default, (x,))
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "file": fastfp8.__file__,
    "error": float((out - exact).abs().max() / exact.abs().max()),
    "compiled": torch.equal(compiled(x, b), fastfp8.gemm(a, b)),
}))
"""


def pip(python, *arguments):
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, as `pip wheel --no-build-isolation` does it in the test's environment."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", folder, folder / "source"], check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.download
@pytest.mark.timeout(3000)
def test_wheel_of_a_cpu_torch_runs_under_a_cuda_torch(wheel, tmp_path):
    """Built against the torch of this environment, run in a new one under torch 2.11.0 of PyPI, a CUDA build."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    pip(python, "torch==2.11.0", "numpy")
    pip(python, "--no-deps", wheel)
    done = subprocess.run([python, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=tmp_path)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["torch"].startswith("2.11.0")
    assert told["cuda"] is not None
    assert Path(told["file"]).is_relative_to(tmp_path)
    assert told["error"] < 1e-5
    assert told["compiled"] is True
    report = subprocess.run([python, "-m", "fastfp8"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert re.search(r"^kernels +\d+ for sm_90a", report, re.M)


@pytest.mark.download
@pytest.mark.timeout(1200)
def test_kernels_build_without_a_toolkit(tmp_path):
    """With no nvcc in CUDA_HOME, on PATH or installed, the build takes NVIDIA's wheels from PyPI."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "build_support").mkdir()
    script = shutil.copy(ROOT / "build_support" / "build_kernels.py", tmp_path / "build_support")
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"} | {"PATH": "/usr/bin:/bin"}
    command = [sys.executable, script, tmp_path / "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert re.search(r"built \d+ sm_90a kernels with nvcc 13\.0\.88 \(NVIDIA wheels from PyPI\)", done.stdout)
    modules = json.loads((tmp_path / "kernels" / "build.json").read_text())["modules"]
    assert sorted(p.stem for p in (tmp_path / "kernels").glob("*.cubin")) == sorted(modules)
