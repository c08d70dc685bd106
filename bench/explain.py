"""``python -m bench gemm --explain M N K``: what the model says of each kernel for one product, and which it takes."""

from __future__ import annotations

from fastfp8 import _C

from .report import Section, Table, section_text
from .static import SMS, problem

MACHINES = ("H100", "H200", "H800", "H20")
#: Names of the model's terms for people, in clocks of an SM unless they say otherwise. See csrc/gemm/plan.h.
TERMS = {
    "tensor": "tensor cores",
    "consumer": "consumer",
    "from_l2": "L2",
    "into_sm": "into SM",
    "latency": "latency",
    "block": "a k-block",
    "fill": "fill",
    "epilogue": "epilogue",
    "waves": "tiles a CTA",
    "hbm": "HBM",
    "total": "total",
}
ABOUT = [
    "In clocks of an SM. A k-block takes the longest of tensor cores, consumer (wgmma, promotion, barriers), L2, into",
    "SM and latency. The total is the fill and the longer, with a tenth of the shorter, of HBM and of the k-blocks and",
    "epilogues of a CTA's tiles. All is predicted, for comparing kernels: the constants are others' measurements and",
    "data sheets (csrc/gemm/machine.cpp).",
]


def explain(m: int, n: int, k: int, machine: str) -> str:
    """A table of all candidates on one of ``MACHINES``, the chosen one marked. BF16 output, B in 128x128 blocks."""
    asked = problem(m, n, k, num_sms=78 if machine == "H20" else SMS, machine=machine)
    chosen = _C.gemm_select(asked).name
    rows, marks = [], []
    for config, rejected in _C.gemm_candidates(asked):
        verdict = "chosen" if config.name == chosen else rejected
        shape = [config.name, str(config.stages), str(config.segments), str(config.grid)]
        rows.append([*shape, *(f"{config.cost[term]:,.0f}" for term in TERMS), verdict])
        marks.append("ours" if config.name == chosen else "")
    table = Table.of(["kernel", "stages", "segments", "CTAs", *TERMS.values(), ""], rows, marks)
    return section_text(Section(str(asked), [*ABOUT, table]))
