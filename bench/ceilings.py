"""What this machine can do, through the vendor's libraries: the ceilings that the other families are held to."""

from __future__ import annotations

import functools
import time

import torch
from torch.nn import functional as F

from . import device
from .case import Case, Computed, Contestant, Session, Subject, Unavailable, Work
from .rows import Row, spread

MATRIX = 8192
COPY_BYTES = 2 << 30
LAUNCHES = 1000


def copy_subject(nbytes: int) -> Subject:
    """A copy from device memory to device memory; its bytes are those read and those written."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device.DEVICE)
    target = torch.empty_like(source)

    def check(out: torch.Tensor) -> None:
        assert torch.equal(out, source), "the copy differs"

    return Subject([Contestant("torch copy_", lambda i: target.copy_(source), check)], bytes=2.0 * nbytes)


def matrix_subject(size: int, fp8: bool) -> Subject:
    """One large square product. FP8 has one scale a tensor and fast accumulation: the tensor cores' rate alone."""
    left, right = (torch.randn(size, size, device=device.DEVICE) for _ in range(2))
    flops = 2.0 * size**3
    if not fp8:
        a, b = left.bfloat16(), right.bfloat16()
        return Subject([Contestant("cuBLAS", lambda i: a @ b.t(), finite)], flops=flops, tensor_rate="bf16")
    device.require(hasattr(F, "scaled_mm"), "torch.nn.functional.scaled_mm came with torch 2.10")
    a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    one, whole = torch.ones((), device=device.DEVICE), F.ScalingType.TensorWise

    def run(i: int) -> torch.Tensor:
        return F.scaled_mm(a, b.t(), one, whole, one, whole, output_dtype=torch.bfloat16, use_fast_accum=True)

    return Subject([Contestant("cuBLASLt", run, finite)], flops=flops)


def finite(out: torch.Tensor) -> None:
    assert bool(out.isfinite().all()), "the product has values that are not finite"


def launch_in_a_graph() -> Subject:
    """The time from one tiny kernel to the next inside of a CUDA graph."""
    inputs = [torch.zeros(1, device=device.DEVICE) for _ in range(device.copies_for(1))]
    return Subject([Contestant("torch add", lambda i: inputs[i].add_(1.0))], len(inputs))


def launch_from_the_host(session: Session) -> list[Row]:
    """What a call costs that launches one tiny kernel: LAUNCHES calls and one synchronisation, over LAUNCHES."""
    if "gpu" not in session.timers:
        raise Unavailable("there is no GPU to measure on")
    x = torch.zeros(1, device=device.DEVICE)
    samples = []
    for _ in range(session.samples + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            x.add_(1.0)
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / LAUNCHES * 1e6)
    lower, median, upper = spread(samples[1:])
    return [Row("ceilings", "launch", "from the host", "torch add", "gpu", "us", median, lower, upper, session.samples)]


def works(tiny: bool) -> list[Work]:
    size, nbytes = (512, 1 << 20) if tiny else (MATRIX, COPY_BYTES)
    square = f"{size}x{size}x{size}"

    def case(op: str, shape: str, build: functools.partial[Subject]) -> Case:
        return Case("ceilings", op, shape, "gpu", build, unit="us")

    return [
        case("copy", f"{nbytes >> 20} MiB", functools.partial(copy_subject, nbytes)),
        case("fp8", square, functools.partial(matrix_subject, size, True)),
        case("bf16", square, functools.partial(matrix_subject, size, False)),
        case("launch", "in a graph", functools.partial(launch_in_a_graph)),
        Computed("launch", "from the host", launch_from_the_host),
    ]
