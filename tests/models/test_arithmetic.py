"""Counts and bytes of the named configurations against what was published of these models, and against a model."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from fastfp8 import numerics
from fastfp8.models import CONFIGS, Config, DeepSeek, __main__, arithmetic
from fastfp8.nn import convert

# Of DeepSeek-V3 the report says 671B and 37B; the README_WEIGHTS.md of its repository 36.6B active, the embedding not
# counted, and 11.5B of multi-token prediction beyond embedding and head. Of the 16B: 15.7B and 2.4B (section 4.5).
PUBLISHED = [("671b", 671e9, 36.6e9, 11.5e9, 0.01), ("16b", 15.7e9, 2.4e9, None, 0.03)]


@pytest.mark.parametrize(("name", "total", "active", "mtp", "within"), PUBLISHED)
def test_published_totals(name: str, total: float, active: float, mtp: float | None, within: float) -> None:
    counts = arithmetic.parameters(CONFIGS[name])
    assert counts.sum().total == pytest.approx(total, rel=1e-3)
    assert counts.sum().active == pytest.approx(active, rel=within)
    if mtp is not None:
        assert counts.sum(mtp=True).total == pytest.approx(mtp, rel=within)


def test_total_to_the_last_parameter() -> None:
    """The published checkpoint of DeepSeek-V3 has 671,026,419,200 numbers without multi-token prediction, of which the
    58 x 256 biases of the gates are buffers here."""
    assert arithmetic.parameters(CONFIGS["671b"]).sum().total == 671_026_419_200 - 58 * 256


@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_every_parameter_has_a_part(name: str) -> None:
    config = CONFIGS[name]
    counts = arithmetic.parameters(config)
    model = DeepSeek(config)
    assert counts.sum().total + counts.sum(mtp=True).total == sum(p.numel() for p in model.parameters())
    moe = next(model.mixtures())
    mine = (config.layers - config.dense_layers) * (moe.gate_up.weight.numel() + moe.down.weight.numel())
    assert counts.main["routed experts"] == (mine, mine * config.top_k // config.experts)
    assert counts.main["embedding"] == (256 * config.hidden, 0)
    assert set(counts.mtp) == (
        {"attention", "gates", "norms", "projections", "routed experts", "shared experts"}
        if config.mtp_depth
        else set()
    )
    dense = config.dense_layers * 3 * config.hidden * config.dense_ffn
    assert counts.main.get("dense layers", (0, 0)) == (dense, dense)


def test_state() -> None:
    counts = arithmetic.parameters(CONFIGS["tiny"])
    total = counts.sum().total + counts.sum(mtp=True).total
    rows = {row.what: row for row in arithmetic.state(counts)}
    assert sum(row.bf16 for row in rows.values()) == 18 * total
    assert rows["moments"].fp8 == 4 * total
    assert rows["weights of products"].fp8 == pytest.approx(2 * counts.fp8, rel=1e-3)


UNEVEN = dataclasses.replace(
    CONFIGS["tiny"],
    layers=4,
    dense_layers=2,
    hidden=384,
    kv_rank=64,
    rope_dim=32,
    head_dim=32,
    dense_ffn=640,
    top_k=4,
    shared_experts=2,
)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "config",
    [CONFIGS["tiny"], UNEVEN, dataclasses.replace(UNEVEN, query_rank=None, mtp_depth=0, shared_experts=0)],
    ids=["tiny", "uneven", "no query rank"],
)
def test_activations_are_those_measured(config: Config, recompute: bool) -> None:
    rows = arithmetic.activations(config, recompute=recompute)
    length = 512  # enough for what does not grow to vanish
    tokens = torch.zeros((2, length + 1 + config.mtp_depth), dtype=torch.int64)
    model = DeepSeek(config, recompute=recompute, dtype=torch.bfloat16)
    bf16 = numerics.memory(model, tokens, run=model.loss)
    convert(model)
    fp8 = numerics.memory(model, tokens, run=model.loss)
    for measured, expected in ((bf16, sum(row.bf16 for row in rows)), (fp8, sum(row.fp8 for row in rows))):
        assert measured.total / (2 * length) == pytest.approx(expected, rel=0.01)
    assert fp8.total < bf16.total


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main(["tiny", "671b"])
    shown = capsys.readouterr().out
    assert shown.index("tiny: Config(") < shown.index("671b: Config(")
    assert re.search(r"the model +671\.03B +36\.63B", shown)
    assert re.search(r"multi-token prediction +11\.61B", shown)
    rows = arithmetic.activations(CONFIGS["671b"], recompute=True)
    sums = [f"{sum(row[column] for row in rows) / 1e3:,.1f}" for column in (1, 2)]
    assert re.search(rf"  sum +{sums[0]} +{sums[1]}", shown)
    with pytest.raises(SystemExit):
        __main__.main(["huge"])
