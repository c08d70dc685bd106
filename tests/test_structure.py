"""The rules of the house (design: layering, budgets, one stem an op), read off the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CPP = sorted(p for p in CSRC.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"})
PYTHON = sorted(p for folder in ("fastfp8", "bench", "tests", "build_support") for p in (ROOT / folder).rglob("*.py"))
EMULATOR = sorted(p for d in ("src", "fuzz") for p in (ROOT / "tests" / "emulator" / d).iterdir() if p.is_file())
BUDGETED = CPP + EMULATOR + PYTHON + sorted((ROOT / "tests" / "cuda").iterdir())
OPS = (
    "quantize",
    "swiglu_quantize",
    "dequantize",
    "quantize_both",
    "quantize_grouped_both",
    "swiglu_backward_quantize",
    "requantize_transpose",
    "rmsnorm_quantize",
    "rmsnorm_quantize_transpose",
    "rmsnorm_backward",
    "gemm",
    "grouped_gemm",
    "masked_grouped_gemm",
    "gemm_swiglu_quantize",
    "grouped_wgrad",
    "route",
    "route_backward",
    "row_map",
    "permute",
    "permute_scaled",
    "permute_quantize",
    "unpermute",
    "unpermute_backward",
    "pack_e5m6",
    "unpack_e5m6",
    "requantize_e5m6",
    "adamw",
)
# Ops that share the files of another, because they share its kernel.
STEM_OF = {
    "masked_grouped_gemm": "grouped_gemm",
    "quantize_grouped_both": "quantize_both",
    **dict.fromkeys(("rmsnorm_quantize", "rmsnorm_quantize_transpose", "rmsnorm_backward"), "rmsnorm"),
    "route_backward": "route",
    **dict.fromkeys(("row_map", "permute_scaled", "permute_quantize", "unpermute", "unpermute_backward"), "permute"),
    **dict.fromkeys(("pack_e5m6", "unpack_e5m6", "requantize_e5m6"), "e5m6"),
}
MAX_FILE, MAX_FUNCTION = 500, 150

# What each folder of csrc may include from: data flows ops -> bindings -> problem -> config -> plan -> kernel -> ptx.
MAY_INCLUDE = {
    "ptx": {"ptx"},
    "common": {"common"},
    "gemm": {"gemm", "common"},
    "gemm/kernels": {"gemm/kernels", "gemm", "common", "ptx"},
    "gemm/instantiations": {"gemm/kernels"},
    "comm": {"comm", "common"},
    "comm/kernels": {"comm/kernels", "comm", "common", "ptx"},
    "comm/instantiations": {"comm/kernels"},
    "bindings": {"bindings", "common", "gemm", "comm"},
}


def ids(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


@pytest.mark.parametrize("path", CPP, ids=ids(CPP))
def test_cpp_layers(path: Path) -> None:
    folder = str(path.parent.relative_to(CSRC))
    for include in re.findall(r'#include "([^"]+)"', path.read_text()):
        target = (path.parent / include).resolve()
        assert target.exists(), f"{include} is not a file"
        origin = str(target.parent.relative_to(CSRC))
        assert origin in MAY_INCLUDE[folder], f"{folder} includes {origin}/{target.name}"


@pytest.mark.parametrize("path", CPP, ids=ids(CPP))
def test_cpp_rooms(path: Path) -> None:
    text, folder = without_comments(path.read_text()), str(path.parent.relative_to(CSRC))
    if folder != "ptx":
        assert not re.search(r"\basm\b", text), "inline asm lives in csrc/ptx"
    if folder != "bindings":
        assert "#include <torch/" not in text, "no Torch header below csrc/bindings"
        assert "pybind11" not in text, "no pybind11 below csrc/bindings"
    if path.name != "driver.cpp":
        assert "libcuda" not in text, "only driver.cpp opens libcuda"
        assert not re.search(r"\bcu[A-Z]\w+\(", text), "only driver.cpp calls the driver"
    if path.name not in ("nccl.cpp", "nccl_constants.h", "rail_nccl.cuh"):
        assert "libnccl" not in text, "only nccl.cpp opens libnccl"
        assert "<nccl" not in text, "NCCL's headers may be missing"
        assert not re.search(r"\bnccl[A-Z]\w+\(", text), "only nccl.cpp and rail_nccl.cuh call NCCL"
    assert "getenv" not in text, "no environment variable in C++"
    assert "cudaMalloc" not in text
    assert "cuda_runtime" not in text, "nothing links the CUDA runtime"


def test_every_ptx_function_names_its_section() -> None:
    for path in sorted((CSRC / "ptx").glob("*.cuh")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "asm" not in line or line.lstrip().startswith("//"):
                continue
            above = "\n".join(lines[max(0, number - 12) : number])
            named = "parallel-thread-execution/#" in above or "No instruction" in above or "static_cast" in above
            # The three instances of the wgmma template share the comment above the primary template.
            assert named or "wgmma_m64k32_e4m3<" in above, f"{path.name}:{number + 1}"


@pytest.mark.parametrize("path", BUDGETED, ids=ids(BUDGETED))
def test_file_budget(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE


def python_functions(path: Path) -> dict[str, int]:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, kinds)}


def cpp_functions(path: Path) -> dict[str, int]:
    """Length of each brace block that opens after a ')' on a line not indented beyond a struct's members."""
    lengths, lines = {}, path.read_text().splitlines()
    for start, line in enumerate(lines):
        if not re.match(r"( {2})?\S.*\) ?(const )?\{$", line):
            continue
        indent = re.match(r" *", line)[0]
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith(indent + "}")), len(lines))
        lengths[f"{start + 1}: {line.strip()}"] = end - start + 1
    return lengths


@pytest.mark.parametrize("path", BUDGETED, ids=ids(BUDGETED))
def test_function_budget(path: Path) -> None:
    functions = python_functions(path) if path.suffix == ".py" else cpp_functions(path)
    long = {name: length for name, length in functions.items() if length > MAX_FUNCTION}
    assert not long


def test_the_function_budget_sees_functions() -> None:
    """The measure itself: a rule that finds no function would always pass."""
    assert any("make_problem" in name and 20 < n < 80 for name, n in cpp_functions(CSRC / "gemm/problem.cpp").items())
    assert any("produce" in name for name in cpp_functions(CSRC / "gemm/kernels/gemm_sm90.cuh"))
    assert python_functions(Path(__file__))["python_functions"] == 4


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules that a file of the package imports, lazily or not."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


LIBRARY = [p for p in PYTHON if p.is_relative_to(ROOT / "fastfp8")]


@pytest.mark.parametrize("path", LIBRARY, ids=ids(LIBRARY))
def test_python_layers(path: Path) -> None:
    imports, folder = imports_of(path), path.relative_to(ROOT / "fastfp8").parts[0]
    tops = {name.split(".")[0] for name in imports}
    assert not tops & {"tests", "emulator", "backends", "bench", "pytest", "hypothesis"}
    if folder != "triton_kernels":
        assert "triton" not in tops, "Triton is imported by triton_kernels only"
    uppers = ("nn", "optim", "comm")
    below = {"reference": ("ops", "triton_kernels", *uppers), "triton_kernels": ("ops", *uppers), "ops": uppers}
    for upper in below.get(folder, ()):
        assert not any(n.startswith(f"fastfp8.{upper}") for n in imports), f"{folder} imports fastfp8.{upper}"


@pytest.mark.parametrize("path", LIBRARY, ids=ids(LIBRARY))
def test_library_reads_no_environment(path: Path) -> None:
    text = path.read_text()
    assert "os.environ" not in text
    assert "getenv" not in text


@pytest.mark.parametrize("op", OPS)
def test_one_stem_an_op(op: str) -> None:
    """Schema, API, reference, Triton kernel and test of an op share its name, or that of the op it goes with."""
    assert re.search(rf'"{op}\(', (CSRC / "bindings" / "schema.cpp").read_text())
    for folder in ("ops", "reference", "triton_kernels"):
        text = (ROOT / "fastfp8" / folder / f"{STEM_OF.get(op, op)}.py").read_text()
        assert f"def {op}(" in text
    assert (ROOT / "tests" / "ops" / f"test_{STEM_OF.get(op, op)}.py").exists()


def test_every_op_of_the_schema_is_known() -> None:
    defined = re.findall(r'"([a-z]\w*)\(', (CSRC / "bindings" / "schema.cpp").read_text())
    assert tuple(defined) == OPS


def test_readme_paths_exist() -> None:
    """Every path in backticks that looks like one of ours, and every file that a link names."""
    text = (ROOT / "README.md").read_text()
    names = re.findall(r"`([\w./*-]+/[\w./*-]*|[\w-]+\.(?:py|md|toml|sh))`", text) + re.findall(
        r"\]\(([\w./-]+)\)", text
    )
    ours = [n for n in names if not n.startswith((".venv", "demo-output", "train-output", "/"))]
    assert len(ours) > 10
    for name in ours:
        assert list(ROOT.glob(name.rstrip("/"))), f"README names {name}"


def test_import_is_light() -> None:
    """`import fastfp8` imports neither Triton nor what only the demo and the tests need."""
    code = (
        "import sys, fastfp8; print([m for m in ('triton', 'matplotlib', 'tokenizers', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
