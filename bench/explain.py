"""What the planner's model says: ``python -m bench gemm --explain M N K`` of each kernel for one product, and
``--tiles`` of the table of dense products, beside the tile that DeepGEMM's published rule takes."""

from __future__ import annotations

from fastfp8 import _C

from . import deep_gemm_tiles
from .report import Section, Table, section_text
from .shapes import DEEPSEEK_V3, DENSE_TOKENS
from .static import SMS, problem

MACHINES = {"H100": SMS, "H200": SMS, "H800": SMS, "H20": 78}  # SMs
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
    asked = problem(m, n, k, num_sms=MACHINES[machine], machine=machine)
    chosen = _C.gemm_select(asked).name
    rows, marks = [], []
    for config, rejected in _C.gemm_candidates(asked):
        verdict = "chosen" if config.name == chosen else rejected
        shape = [config.name, str(config.stages), str(config.segments), str(config.grid)]
        rows.append([*shape, *(f"{config.cost[term]:,.0f}" for term in TERMS), verdict])
        marks.append("ours" if config.name == chosen else "")
    table = Table.of(["kernel", "stages", "segments", "CTAs", *TERMS.values(), ""], rows, marks)
    return section_text(Section(str(asked), [*ABOUT, table]))


ABOUT_TILES = [
    "Ours: what the planner takes, and the clocks of an SM that its model predicts, over the roofline: the longer of",
    "all bytes once at HBM's rate and all products at the tensor cores'. DeepGEMM: its tile, derived from the rule of",
    "version 2.6.1, not taken from a run of it; that rule predicts no time. Fill: tiles over the SMs of all waves.",
    "Nothing in this table was measured.",
]


def tiles(machine: str) -> str:
    """The table of dense products on one of ``MACHINES``: our choice and prediction, and DeepGEMM's tile."""
    num_sms = MACHINES[machine]
    rows = []
    for weight in DEEPSEEK_V3:
        for m in DENSE_TOKENS:
            asked = problem(m, weight.n, weight.k, num_sms=num_sms, machine=machine)
            config = _C.gemm_select(asked)
            mine = [config.name, str(config.grid), f"{config.cycles:,.0f}", f"{config.cycles / roofline(asked):.2f}"]
            other = deep_gemm_tiles.choose(m, weight.n, weight.k, num_sms)
            fill = f"{other.fill(num_sms):.2f}"
            theirs = [str(other), str(min(other.tiles, num_sms)), str(other.waves), fill]
            rows.append([weight.shape(m), *mine, *theirs])
    columns = ["shape", "ours", "CTAs", "clocks", "/ roofline", "DeepGEMM", "with a tile", "waves", "fill"]
    return section_text(Section(f"Dense products, {machine}, {num_sms} SMs", [*ABOUT_TILES, Table.of(columns, rows)]))


def roofline(asked: _C.GemmProblem) -> float:
    """Clocks, at the rates that the model has: those of HBM, and of the kernel that is least bound by its operands."""
    all_configs = [config for config, _ in _C.gemm_candidates(asked)]
    # FLOPs a clock of one SM.
    rate = max(2.0 * c.tile_m * c.tile_n * c.tile_k / c.cost["tensor"] for c in all_configs)
    hbm = float(all_configs[0].cost["hbm"])
    return float(max(hbm, 2.0 * asked.m * asked.n * asked.k / (rate * asked.num_sms)))
