"""Counts and bytes of the named configurations against what was published of these models, and against a model."""

from __future__ import annotations

import pytest

from fastfp8.models import CONFIGS, DeepSeek, arithmetic

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
