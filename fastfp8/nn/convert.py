"""Swap the Linears of a model for FP8 ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import ArgumentTypeError, ArgumentValueError, message
from .linear import Linear

_OP = "nn.convert"
Filter = Callable[[str, torch.nn.Linear], bool]


def convert(
    module: torch.nn.Module,
    filter: Filter | None = None,  # noqa: A002
    *,
    pow2: bool = True,
    freeze: bool = False,
) -> torch.nn.Module:
    """Swap, in place, every torch.nn.Linear in ``module`` for a :class:`fastfp8.nn.Linear` over the same Parameters.

    Subclasses of torch.nn.Linear are left alone, those of fastfp8 too: the owner of a subclass may read its weight
    without calling it, as torch.nn.MultiheadAttention does. torch.nn.TransformerEncoderLayer does so with plain Linears
    in its inference fast path; ``torch.backends.mha.set_fastpath_enabled(False)`` makes it call them. Keep the output
    head, the MoE gate and what else the DeepSeek-V3 report (section 3.3.1) leaves in BF16 out by ``filter``.

    Args:
        module: the model. If it is a torch.nn.Linear itself, its replacement is returned.
        filter: called once with the qualified name and the Linear; false leaves it alone. None swaps all. A Linear that
            appears several times has the first name, and stays shared.
        pow2, freeze: see Linear and :meth:`Linear.freeze`.

    Returns:
        ``module``, or the replacement of a Linear.

    Raises:
        TypeError, ValueError: ``module`` is no Module, or :meth:`Linear.from_float` cannot take one of the Linears; the
            message ends with its name, and ``module`` is unchanged.
    """
    if not isinstance(module, torch.nn.Module):
        raise ArgumentTypeError(message(_OP, "module", "a torch.nn.Module", type(module).__name__))
    replacements: dict[torch.nn.Module, Linear] = {}
    for name, linear in module.named_modules():
        if type(linear) is torch.nn.Linear and (filter is None or filter(name, linear)):
            try:
                replacements[linear] = Linear.from_float(linear, pow2=pow2)
            except (ArgumentTypeError, ArgumentValueError) as error:
                raise type(error)(f"{error}, in '{name}'") from error
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    if freeze:
        for linear in replacements.values():
            linear.freeze()
    return replacements.get(module, module)
