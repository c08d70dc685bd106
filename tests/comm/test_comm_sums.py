"""The fast fused multiply-add of combine against the exact one, where a rounding to double first would be wrong."""

from __future__ import annotations

import torch
from backends import assert_same_bits
from torch import Tensor

from fastfp8.comm import sums
from fastfp8.reference.tensor_core import fma


def check(x: Tensor, y: Tensor, z: Tensor) -> float:
    """Bits equal the exact ones. Returns the share of values where two roundings are wrong."""
    exact = fma(x, y, z)
    assert_same_bits(sums._fma(x, y, z), exact, "fma")
    twice = (x.double() * y.double() + z.double()).float()
    return float((twice != exact).double().mean())


def test_any_values() -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn((100, 128), generator=generator) for _ in range(2))
    check(x.bfloat16().float(), torch.rand((100, 1), generator=generator), z)
    zeros = torch.zeros((2, 3))
    check(zeros, -torch.ones((2, 1)), zeros)


def test_next_to_a_tie() -> None:
    """1 + 2**-24 and a little, which is below the last bit of a double."""
    x = (1 + torch.arange(1, 128) / 128).view(-1, 1)  # all of BF16 between 1 and 2
    y = 1 / x
    product = x.double() * y.double() - 1
    assert (product != 0).sum() > 60
    assert check(x * 2.0**-24, y, torch.ones_like(x)) > 0.02


def test_results_below_the_normal_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((200, 64), generator=generator).bfloat16().float() * 2.0**-120
    y = torch.rand((200, 1), generator=generator) * 2.0**-14
    z = torch.randint(-40, 40, (200, 64), generator=generator) * 2.0**-149
    check(x, y, z)
    # Half way between the largest subnormal and the next number, and a little.
    x = (1 + torch.arange(1, 128) / 128).view(-1, 1)
    assert check(x * 2.0**-75, 1 / x * 2.0**-75, torch.full_like(x, 2.0**-126 - 2.0**-149)) > 0.02


def test_weights_are_of_rows() -> None:
    """What is broadcast where an exact computation takes over."""
    x, y = torch.full((2, 3), 2.0**-24), torch.tensor([[1.0], [3.0]])
    check(x, y, torch.ones((2, 3)))
