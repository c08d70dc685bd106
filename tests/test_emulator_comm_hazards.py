"""The all-to-all kernels broken on purpose: what is taken out of them must show on the emulator, or end in a Timeout.

Two kinds of breakage do not show there, and are not in the list. A flag that says "consumed" with a weak store: loads
are never late on the emulator, so what is read before it is read before it; the exhaustive model has it
(tests/comm_protocol). And the __syncwarp between the lane that acquires a flag and lanes that read behind it, because
what one thread acquires the emulator shows to its whole CTA.
"""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import build_kernels as build
import pytest
import torch
from comm_ranks import Ranks, geometry
from emulator import EmulationError
from test_emulator_comm import Case, bits

from fastfp8 import ScaledTensor
from fastfp8.backends import KERNELS
from fastfp8.reference import comm as oracle

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(4)
TIMEOUT_US = 1000

# What is broken in the PTX of all kernels at once: (pattern, replacement).
IN_PTX = {
    "no release": (r"st\.release\.sys", "st.relaxed.sys"),
    "no acquire": (r"ld\.acquire\.sys", "ld.relaxed.sys"),
    "lanes do not wait for each other": (r"bar\.warp\.sync\s+[^;]*;", ""),
    "no signal": (r"st\.release\.sys[^;]*;", ""),
}

_FILL = "ptx::store_release_sys(filled, turn.after());"
_SIGNAL = "network.signal(end.peer, end.consumed + 4 * turn.index, turn.after());"
# What is broken in the source: (file in csrc/comm/kernels, text, replacement).
IN_SOURCE = {
    "links: no credit": ("rings.cuh", "return ptx::load_acquire_sys(consumed) == turn.count;", "return true;"),
    "links: nobody waits for data": (
        "rings.cuh",
        "return ptx::load_acquire_sys(filled) == turn.after();",
        "return true;",
    ),
    "links: filled by a weak store": ("rings.cuh", _FILL, "*filled = turn.after();"),
    "links: filled is not said": ("rings.cuh", _FILL, ""),
    "links: consumed is not said": ("rings.cuh", "ptx::store_release_sys(consumed, turn.after());", ""),
    "turns do not count": ("rings.cuh", "(base + message) / slots & ((1u << kTurnBits) - 1)}", "0}"),
    "dispatch: a record is told of before all lanes wrote it": (
        "dispatch.cuh",
        "  __syncwarp();\n  if (leads) out.fill();",
        "  if (leads) out.fill();",
    ),
    "dispatch: a record is told of before it is written": (
        "dispatch.cuh",
        "  send(out.data, sinks);\n  __syncwarp();\n  if (leads) out.fill();",
        "  if (leads) out.fill();\n  send(out.data, sinks);\n  __syncwarp();",
    ),
    "dispatch: a chunk is freed before it is read": (
        "dispatch.cuh",
        "    for (uint32_t i = 0; i < count; ++i) {\n      const char* const record",
        f"    {_SIGNAL}\n    for (uint32_t i = 0; i < count; ++i) {{\n      const char* const record",
    ),
    "rails: no room is waited for": (
        "dispatch.cuh",
        "return network.poll(end.consumed + 4 * turn.index) == turn.count;",
        "return true;",
    ),
    "rails: nobody waits for data": (
        "dispatch.cuh",
        "return network.poll(end.filled + 4 * turn.index) == turn.after();",
        "return true;",
    ),
    "combine: a sum is told of before all lanes wrote it": (
        "combine.cuh",
        "    __syncwarp();\n    if (c.lane == 0) out.fill();",
        "    if (c.lane == 0) out.fill();",
    ),
    "combine: the first reader frees a chunk": (
        "combine.cuh",
        "before, 0) + 1 != count) return;",
        "before, 0) != 0) return;",
    ),
    "combine: nobody frees a chunk": ("combine.cuh", _SIGNAL, ""),
    "combine: reads are not counted anew": ("combine.cuh", "if (c.lane == 0) *reads = 0;", ""),
    "combine: rows of a rank are not given back": ("combine.cuh", "if (leads_rank) in.release();", ""),
    "rails: put does not wait for all lanes": (
        "rail.cuh",
        "  __device__ void signal(int peer, int64_t flag, uint32_t value) const {\n    __syncwarp();",
        "  __device__ void signal(int peer, int64_t flag, uint32_t value) const {",
    ),
    "rails: polled without acquire": (
        "rail.cuh",
        "return ptx::load_acquire_sys(reinterpret_cast<const uint32_t*>(c.window(c.rank) + flag));",
        "return ptx::load_relaxed_gpu(reinterpret_cast<const uint32_t*>(c.window(c.rank) + flag));",
    ),
    "exchange: a tally starts before the channels have ended": (
        "exchange.cuh",
        "if (!is_last) {",
        "if (shared[0] != 0xffffffff && blockIdx.x != 0) {",
    ),
    "exchange: counts are told of before all lanes wrote them": (
        "exchange.cuh",
        "words[i] = word_for(rank, i, totals);\n    __syncwarp();",
        "words[i] = word_for(rank, i, totals);",
    ),
    "exchange: counts are not waited for": (
        "exchange.cuh",
        "return ptx::load_acquire_sys(flag) == epoch;",
        "return true;",
    ),
    "exchange: mail is not waited for": (
        "exchange.cuh",
        "return network.poll(mail_flag(node)) == mails();",
        "return true;",
    ),
    "exchange: counters of bins race": (
        "exchange.cuh",
        "  __syncwarp(members);\n  if (lane_index() == __ffs(same) - 1)",
        "  if (lane_index() == __ffs(same) - 1)",
    ),
    "exchange: totals are sent before they are added up": (
        "exchange.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) *epochs = work.epoch;",
        "  if (threadIdx.x == 0) *epochs = work.epoch;",
    ),
    "bases stay": ("comm_sm90.cuh", "base = (base + messages) %", "base = base %"),
    "bases move while the other CTA runs": (
        "comm_sm90.cuh",
        "if (shared[0] % 2 == 0) return;",
        "if (shared[0] % 2 == 1) return;",
    ),
}


@functools.cache
def cases() -> list[tuple[Case, list[oracle.Received], list[torch.Tensor], list[torch.Tensor]]]:
    made = []
    for seed, (nodes, gpus, channels) in enumerate([(2, 2, 1), (1, 2, 2)]):
        g = geometry(nodes, gpus, max_tokens=5, channels=channels)
        case = Case.random(g, seed, tokens=[5] * g.ranks)
        want = oracle.dispatch(case.xs, case.idx, case.weights, num_experts=g.ranks * g.local_experts)
        outs = case.outs(want, seed)
        made.append((case, want, outs, oracle.combine(outs, [w.placement for w in want], ranks_per_node=gpus)))
    return made


def told(ranks: Ranks) -> str | None:
    return next((f"{s['trouble']} of {s['role']}" for s in ranks.statuses() if s), None)


def finds(ptx: str | None, seed: int) -> str | None:
    """What two rounds of calls show, None where all is as it should be."""
    for case, want, outs, ys in cases():
        ranks = Ranks(case.geometry, seed, warps=2 + seed % 2, timeout_us=TIMEOUT_US, ptx=ptx)
        try:
            for _ in range(2):
                received = ranks.exchange(case.idx)
                if told(ranks):
                    return told(ranks)
                ranks.send(received, case.xs, case.weights)
                if told(ranks):
                    return told(ranks)
                got = ranks.combine(received, outs)
                if told(ranks):
                    return told(ranks)
                for mine, expected in zip(received, want, strict=True):
                    rows, exact = mine.recv(), expected.recv
                    assert isinstance(rows, ScaledTensor)
                    assert isinstance(exact, ScaledTensor)
                    if rows.shape != exact.shape or not torch.equal(bits(rows.data), bits(exact.data)):
                        return "other rows"
                    if not torch.equal(bits(rows.scale), bits(exact.scale)):
                        return "other scales"
                if not all(torch.equal(bits(y), bits(exact)) for y, exact in zip(got, ys, strict=True)):
                    return "other sums"
        except EmulationError as error:
            return str(error).splitlines()[0]
    return None


def test_whole_kernels_show_nothing() -> None:
    assert [finds(None, seed) for seed in SEEDS] == [None] * len(SEEDS)


@pytest.mark.parametrize("name", IN_PTX)
def test_broken_in_ptx(name: str) -> None:
    pattern, replacement = IN_PTX[name]
    text, count = re.subn(pattern, replacement, (KERNELS / "comm_loopback.ptx").read_text())
    assert count > 0
    assert any(finds(text, seed) for seed in SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_SOURCE)
def test_broken_in_source(name: str, tmp_path: Path) -> None:
    file, text, replacement = IN_SOURCE[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    broken = tmp_path / "csrc" / "comm" / "kernels" / file
    source = broken.read_text()
    assert source.count(text) >= 1, "the source no longer has this text"
    broken.write_text(source.replace(text, replacement))
    toolkit, out = build.find_toolkit(), tmp_path / "broken.ptx"
    unit = tmp_path / "csrc" / "comm" / "instantiations" / "comm_loopback.cu"
    build._run([toolkit.nvcc, *build.NVCC_FLAGS, unit, "-o", out], "compiling what is broken")
    ptx = out.read_text()
    assert any(finds(ptx, seed) for seed in SEEDS)
