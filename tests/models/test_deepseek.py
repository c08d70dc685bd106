"""The model: its attention against one written out in float64, its losses, what it shares and what it recomputes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import assert_same_bits
from torch import Tensor

from fastfp8.models import CONFIGS, Config, DeepSeek
from fastfp8.models.attention import Attention, rotations
from fastfp8.models.norm import RMSNorm

# Every extent is another, and none divides another but where it must.
ODD = Config(
    vocabulary=61,
    hidden=48,
    layers=2,
    dense_layers=1,
    heads=3,
    query_rank=24,
    kv_rank=20,
    head_dim=10,
    rope_dim=6,
    value_dim=14,
    dense_ffn=80,
    expert_ffn=32,
    experts=6,
    top_k=4,
    shared_experts=2,
    groups=3,
    top_groups=2,
    route_scale=1.5,
    balance_alpha=0.01,
    mtp_depth=2,
    mtp_weight=0.25,
    init_std=0.1,
)


def tokens_of(config: Config, rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(config.vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * gain.double() / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def written_out(attention: Attention, x: Tensor) -> Tensor:
    """One head, one position at a time, by complex rotations: equations 1 to 11 of the report."""
    config, x = attention.config, x.double()

    def norm_linear(m: Any, t: Tensor) -> Tensor:
        return normed(t, m.norm_weight, m.eps) @ m.weight.double().T

    first = config.heads * (config.head_dim + config.rope_dim) if config.query_rank is None else config.query_rank
    latents = norm_linear(attention.qkv_a, x)
    q = latents[..., :first] if attention.q_b is None else norm_linear(attention.q_b, latents[..., :first])
    kv = norm_linear(attention.kv_b, latents[..., first : first + config.kv_rank])
    k_rope = latents[..., first + config.kv_rank :]

    def turned(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)))
        places = torch.arange(t.shape[1], dtype=torch.float64)[:, None]
        waves = config.rope_base ** (-torch.arange(config.rope_dim // 2, dtype=torch.float64) * 2 / config.rope_dim)
        return torch.view_as_real(pairs * torch.exp(1j * places * waves)).flatten(-2)

    outs = []
    for head in range(config.heads):
        of_q = q.unflatten(-1, (config.heads, -1))[:, :, head]
        of_kv = kv.unflatten(-1, (config.heads, -1))[:, :, head]
        mine = torch.cat((of_q[..., : config.head_dim], turned(of_q[..., config.head_dim :].contiguous())), -1)
        keys = torch.cat((of_kv[..., : config.head_dim], turned(k_rope.contiguous())), -1)
        scores = mine @ keys.mT / (config.head_dim + config.rope_dim) ** 0.5
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
        outs.append(scores.softmax(-1) @ of_kv[..., config.head_dim :])
    return torch.cat(outs, -1) @ attention.o_proj.weight.double().T


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("query_rank", [24, None])
def test_attention(query_rank: int | None, recompute: bool) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(ODD, query_rank=query_rank)
    attention = Attention(config, recompute=recompute)
    for param in attention.parameters():
        torch.nn.init.normal_(param, std=0.3)
    x = torch.randn(2, 9, config.hidden, requires_grad=True)
    grad = torch.randn(2, 9, config.hidden)
    y = attention(x, rotations(9, config.rope_dim, config.rope_base, x.device))
    inputs = [x, *attention.parameters()]
    found = torch.autograd.grad(y, inputs, grad)
    expected = written_out(attention, x)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    for got, want in zip(found, torch.autograd.grad(expected, inputs, grad.double()), strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def kept_bytes(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What autograd keeps of a forward, parameters not counted, each memory once."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return y, sum(t.untyped_storage().nbytes() for t in kept.values())


def test_recompute_keeps_no_heads_and_changes_no_bit() -> None:
    config = dataclasses.replace(CONFIGS["tiny"], layers=2)
    tokens = tokens_of(config, 2, 130)
    found = []
    for recompute in (False, True):
        model = DeepSeek(config, recompute=recompute)
        with torch.autocast("cpu", torch.bfloat16):
            loss, kept = kept_bytes(lambda model=model: model.loss(tokens).total)  # type: ignore[misc]
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept))
    assert_same_bits(found[0][0], found[1][0], "loss")
    for name, grad in found[0][1].items():
        assert_same_bits(grad, found[1][1][name], name)
    # Of each of three attentions: queries and keys at least.
    assert found[0][2] - found[1][2] > 3 * 2 * 128 * config.heads * 2 * config.query_dim * 2


def test_norm() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(40, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 40, dtype=torch.bfloat16, requires_grad=True)
    y, kept = kept_bytes(lambda: norm(x))
    assert y.dtype == torch.bfloat16
    assert kept == x.nbytes + 3 * 5 * 4  # nothing that is normalised
    wide, gain = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = normed(wide, gain, 1e-3)
    grad = torch.randn(3, 5, 40).bfloat16()
    dx, dgain = torch.autograd.grad(y, (x, norm.weight), grad)
    want_dx, want_dgain = torch.autograd.grad(expected, (wide, gain), grad.double())
    for got, want in ((y, expected), (dx, want_dx)):
        assert ((got - want).abs() <= want.abs() * 2**-8 + 1e-6).all()  # rounded once
    assert (dgain - want_dgain).abs().max() < 1e-5 * want_dgain.abs().max()


def test_a_token_changes_nothing_before_it() -> None:
    model, tokens = DeepSeek(ODD), tokens_of(ODD)
    logits = model(tokens)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 12, ODD.vocabulary)
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % ODD.vocabulary
    changed = (model(other) != logits).any(-1)
    assert not changed[:, :7].any()
    assert changed[:, 7:].all()


def test_losses() -> None:
    """Every term by hand: each module of MTP reads the stream of the one before it and tokens one further on."""
    model, tokens = DeepSeek(ODD), tokens_of(ODD)
    losses = model.loss(tokens)
    length = 12 - 1 - ODD.mtp_depth
    inputs = tokens[:, :length]
    balance = sum(float(moe.balance_loss.detach()) for moe in model.mixtures())
    by = rotations(length, ODD.rope_dim, ODD.rope_base, tokens.device)
    x = model.embedding(inputs)
    for layer in model.layers:
        x = layer(x, by)
    of_depth = [F.cross_entropy(model(inputs).mT, tokens[:, 1 : 1 + length])]
    for k, module in enumerate(model.mtp, 1):
        both = (module.stream_norm(x), module.token_norm(model.embedding(tokens[:, k : k + length])))
        x = module.block(F.linear(torch.cat(both, -1), module.projection.weight), by)
        logits = F.linear(module.norm(x), model.head.weight)
        of_depth.append(F.cross_entropy(logits.mT, tokens[:, k + 1 : k + 1 + length]))
    main, *mtp = of_depth
    assert losses.main == pytest.approx(main.item(), rel=1e-6)
    assert losses.mtp == pytest.approx(torch.stack(mtp).mean().item(), rel=1e-6)
    assert losses.balance == pytest.approx(balance, rel=1e-6)
    assert balance > 0.9 * 3 * ODD.balance_alpha
    assert losses.total.item() == pytest.approx(main.item() + 0.25 * losses.mtp.item() + balance, rel=1e-6)
    assert losses.total.requires_grad
    assert not losses.main.requires_grad


def test_mtp_shares_embedding_and_head() -> None:
    """Physically: one Parameter each, which both losses reach."""
    model, tokens = DeepSeek(ODD), tokens_of(ODD)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert not [name for name in names if name.startswith("mtp.") and ("embedding" in name or "head" in name)]
    for moe in model.mixtures():
        moe.alpha = 0.0  # the balance loss of MTP's experts reaches the embedding too
    grads = []
    for weight in (0.0, 0.5):
        model.config = dataclasses.replace(ODD, mtp_weight=weight)
        grads.append(torch.autograd.grad(model.loss(tokens).total, [model.embedding.weight, model.head.weight]))
    for without, with_mtp in zip(*grads, strict=True):
        assert not torch.equal(without, with_mtp)
    last = set(tokens[:, -2].tolist()) - set(tokens[:, :-2].flatten().tolist())
    assert last  # tokens that only the last module of MTP reads
    for token in last:
        assert not grads[0][0][token].any()
        assert grads[1][0][token].any()


def test_weights_come_from_seed_and_name() -> None:
    first, second = DeepSeek(ODD), DeepSeek(dataclasses.replace(ODD, layers=1, mtp_depth=0))
    of_second = dict(second.named_parameters())
    for name, param in first.named_parameters():
        if name in of_second:
            assert_same_bits(param.detach(), of_second[name].detach(), name)
        if param.dim() > 1:
            assert param.std().item() == pytest.approx(ODD.init_std, rel=0.15)
        else:
            assert (param == 1).all()
    experts = first.layers[1].ffn.gate_up.weight
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(DeepSeek(ODD, seed=1).head.weight, first.head.weight)


def test_bias_follows_the_load() -> None:
    model, tokens = DeepSeek(ODD), tokens_of(ODD)
    model.loss(tokens)
    loads = model.update_bias(0.5)
    assert len(loads) == 3
    for moe, load in zip(model.mixtures(), loads, strict=True):
        assert load.sum() == 2 * 9 * ODD.top_k
        assert_same_bits(moe.gate.bias, 0.5 * (load.float().mean() - load).sign(), "bias")
        assert not moe.load.any()


def test_bfloat16_parameters_and_autocast() -> None:
    tokens = tokens_of(ODD)
    exact = DeepSeek(ODD).loss(tokens).total
    assert DeepSeek(ODD, dtype=torch.bfloat16).loss(tokens).total.item() == pytest.approx(exact.item(), rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = DeepSeek(ODD).loss(tokens).total
    assert mixed.dtype == torch.float32
    assert mixed != exact
    assert mixed.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: DeepSeek({}), TypeError, "models.DeepSeek: argument 'config': expected a Config"),  # type: ignore[arg-type]
        (lambda: DeepSeek(ODD, dtype=torch.float16), TypeError, "argument 'dtype': expected torch.float32 or torch.bf"),
        (lambda: DeepSeek(ODD)(torch.zeros(2, 3)), TypeError, "argument 'tokens': expected dtype torch.int64"),
        (lambda: DeepSeek(ODD)(torch.zeros(3, dtype=torch.int64)), ValueError, "'tokens': expected 2 dimensions"),
        (lambda: DeepSeek(ODD).loss(tokens_of(ODD, 1, 3)), ValueError, r"at least 4 in a row, got \(1, 3\)"),
        (lambda: dataclasses.replace(ODD, heads=0), ValueError, "models.Config: argument 'heads': expected 1 or more"),
        (lambda: dataclasses.replace(ODD, heads=1.5), TypeError, "argument 'heads': expected an int"),
        (lambda: dataclasses.replace(ODD, rope_dim=3), ValueError, "'rope_dim': expected an even number, got 3"),
        (lambda: dataclasses.replace(ODD, dense_layers=3), ValueError, "'dense_layers': expected at most layers = 2"),
        (lambda: dataclasses.replace(ODD, init_std=-1.0), ValueError, "'init_std': expected 0.0 or more, got -1.0"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
