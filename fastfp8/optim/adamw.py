"""AdamW with moments in BF16, FP32 master weights and weights that come out in FP8 (DeepSeek-V3 report, 3.3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..counters import Counted
from ..errors import ArgumentTypeError, check_dtype, check_type, check_value, message, value_error
from ..layout import empty_scale, scale_shape_of
from ..ops.adamw import GRAD_DTYPES, MOMENT_DTYPES, PARAM_DTYPES, WEIGHT_BLOCK, adamw, check_numbers
from ..ops.quantize import quantize
from ..scaled_tensor import ScaledTensor

_OP = "optim.AdamW"
# What a parameter's state holds besides its step. The FP8 weight is made of the rest, so no checkpoint has it.
_FP8_KEYS = ("weight_fp8", "weight_fp8_t")
_FP8_VERSION = "weight_fp8_version"  # of the parameter when they were made


class AdamW(Counted, torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), with the interface of :class:`torch.optim.AdamW`, in one kernel for many parameters.

    Moments are kept in bfloat16 and all is computed in FP32. A bfloat16 parameter has an FP32 master in its state. That
    is what is updated, and the parameter is the master rounded to nearest even. With ``moments=torch.float32`` it is
    torch's AdamW, but for the order of roundings. The same bits on CPU and GPU, and after a resume.

    A gradient is the parameter's ``main_grad`` if it has one that is not None (what :func:`fastfp8.grouped_wgrad`
    accumulates into), else its ``grad``. ``zero_grad`` leaves ``main_grad`` alone: zero it where it is accumulated.

    Args:
        params: parameters or groups of them, contiguous, float32 or bfloat16. All options below but ``params`` may
            differ from group to group.
        lr: learning rate, a number.
        betas: decays of the moments. BF16 has 8 bits: with rounding to nearest a second moment stands still where a
            step changes it by less than 1 part in 512, so beside its maximum at torch's 0.999. Hence 0.95 here, as in
            the report (section 4.2); for larger ones take ``stochastic_rounding``.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times ``lr``.
        moments: bfloat16 or float32.
        stochastic_rounding: round moments to bfloat16 up or down at random, right on average. A counter-based
            generator (Philox) takes ``seed``, the step, the parameter's place among all parameters and the element's
            in it, so that a run can be repeated.
        seed: from 0 to 2**63 - 1.
        emit_fp8: the step also writes each parameter of 2 or 3 dimensions in FP8, in 128 x 128 blocks, as it is and
            transposed: :meth:`quantized`. That is the separate pass of quantisation saved. ``fastfp8.numerics`` can
            count what becomes of the values.

    The state of a parameter: ``step`` (an int), ``exp_avg``, ``exp_avg_sq``, ``master`` of a bfloat16 one, and with
    ``emit_fp8`` ``weight_fp8`` and ``weight_fp8_t``, whose memory every step overwrites. ``state_dict`` has all but the
    last two. ``load_state_dict`` keeps the precision of each, and takes a checkpoint of torch.optim.AdamW too: its
    moments are rounded to nearest even, and a master starts as its parameter.

    After a write to a bfloat16 parameter from outside, drop its state: ``optimizer.state.pop(param)``. On a GPU a step
    cannot be captured in a CUDA graph, and it never waits for the GPU.

    Raises:
        TypeError: an option or a parameter is of another type or dtype.
        ValueError: an option is out of its range, or a parameter is not contiguous. At a step: a gradient is sparse or
            of another shape.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: torch.dtype = torch.bfloat16,
        stochastic_rounding: bool = False,
        seed: int = 0,
        emit_fp8: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "emit_fp8": emit_fp8,
        }
        _check_options(options)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim.Optimizer. Raises TypeError or ValueError for options or parameters that do not fit."""
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
            for param in self.param_groups[-1]["params"]:
                check_dtype(param.dtype, _OP, "params", PARAM_DTYPES)
                check_value(param.is_contiguous(), _OP, "params", "contiguous parameters", f"stride {param.stride()}")
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update each parameter that has a gradient. Returns what ``closure`` does, called first with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        counters = self.counters or {}
        index = 0  # of a parameter among all
        for group in self.param_groups:
            # A call takes parameters of one device, dtype and step, with or without FP8, which is counted or not.
            calls: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor, Tensor | None]]] = {}
            for place, param in enumerate(group["params"]):
                grad = _gradient(param)
                if grad is not None:
                    state = self._state_of(param, group)
                    state["step"] += 1
                    with_fp8 = _FP8_KEYS[0] in state
                    counts = counters.get(_name(group, place, index)) if with_fp8 else None
                    key = (param.device, param.dtype, counts is None, state["step"], with_fp8)
                    calls.setdefault(key, []).append((index, param, grad, counts))
                index += 1
            for (*_, step, with_fp8), work in calls.items():
                self._update(group, step, with_fp8, work)
        return loss

    def _update(
        self, group: dict[str, Any], step: int, with_fp8: bool, work: list[tuple[int, Tensor, Tensor, Tensor | None]]
    ) -> None:
        indices, params, grads, counters = (list(column) for column in zip(*work, strict=True))
        states = [self.state[param] for param in params]
        fp8 = (
            [t for state in states for key in _FP8_KEYS for t in (state[key].data, state[key].scale)]
            if with_fp8
            else []
        )
        adamw(
            [param.detach() for param in params],
            grads,
            [state["master"] for state in states if "master" in state],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            fp8,
            indices,
            step=step,
            counters=[counts for counts in counters if counts is not None],
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "stochastic_rounding", "seed")},
        )
        if with_fp8:
            for param, state in zip(params, states, strict=True):
                state[_FP8_VERSION] = param._version

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, made complete."""
        state: dict[str, Any] = self.state[param]
        state.setdefault("step", 0)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros(param.shape, dtype=group["moments"], device=param.device)
        if param.dtype != torch.float32 and "master" not in state:
            state["master"] = param.detach().float()
        if not _has_fp8(param, group):
            for key in (*_FP8_KEYS, _FP8_VERSION):
                state.pop(key, None)
        elif _FP8_KEYS[0] not in state:
            for key, shape in zip(_FP8_KEYS, (param.shape, param.mT.shape), strict=True):
                data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=param.device)
                scale = empty_scale(data, scale_shape_of(shape, WEIGHT_BLOCK), WEIGHT_BLOCK)
                state[key] = ScaledTensor._trusted(data, scale, WEIGHT_BLOCK)
        return state

    @torch.no_grad()
    def quantized(self, param: Tensor) -> tuple[ScaledTensor, ScaledTensor]:
        """``param`` [N, K] or [G, N, K] in FP8, in 128 x 128 blocks, and its transpose [K, N]: for Fprop and Dgrad.

        Bit for bit ``fastfp8.quantize(master, (128, 128))``, of a float32 parameter that of itself. The last step wrote
        them and the next one overwrites them. Before the first step, and after a ``load_state_dict``, they are
        quantised here; and so is ``param`` itself after a write to it from outside, as its version tells.

        Raises:
            ValueError: ``param`` is none of this optimizer's, or ``emit_fp8`` is off for it.
        """
        group = next((g for g in self.param_groups if any(p is param for p in g["params"])), None)
        if group is None:
            raise value_error(f"{_OP}.quantized", "param", "a parameter of this optimizer", "another tensor")
        expected = "a parameter with 2 or 3 dimensions and 'emit_fp8'"
        got = f"shape {tuple(param.shape)}, emit_fp8={group['emit_fp8']}"
        check_value(_has_fp8(param, group), f"{_OP}.quantized", "param", expected, got)
        before = self.state[param].get(_FP8_VERSION)
        if _FP8_KEYS[0] not in self.state[param] or before != param._version:
            state = self._state_of(param, group)
            written = before is not None  # by somebody else: a master is that of the last step
            master = param.detach() if written else state.get("master", param.detach())
            counts = (self.counters or {}).get(self._names()[param])
            w = quantize(master, WEIGHT_BLOCK, counters=counts)
            for key, made in zip(_FP8_KEYS, (w, w.t().contiguous()), strict=True):
                state[key].data.copy_(made.data)
                state[key].scale.copy_(made.scale)
            state[_FP8_VERSION] = param._version
        weight, weight_t = (self.state[param][key] for key in _FP8_KEYS)
        return weight, weight_t

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim.Optimizer, without what is made of the rest."""
        whole = super().state_dict()
        whole["state"] = {key: _without_fp8(state) for key, state in whole["state"].items()}
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim.Optimizer, but each tensor keeps its own precision, not that of its parameter."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, (group, param) in zip(saved, self._parameters(), strict=True):
            state = state_dict["state"].get(key)
            if state is None:
                continue
            mine = self.state[param] = _without_fp8(state)
            mine["step"] = int(state["step"])
            dtypes = {"exp_avg": group["moments"], "exp_avg_sq": group["moments"], "master": torch.float32}
            for name, dtype in dtypes.items():
                if name in mine:
                    mine[name] = mine[name].detach().to(param.device, dtype, copy=True)

    def roles(self) -> dict[str, torch.device]:
        """See :class:`fastfp8.counters.Counted`: the parameters that steps write in FP8, by name."""
        names = self._names()
        return {names[param]: param.device for group, param in self._parameters() if _has_fp8(param, group)}

    def _names(self) -> dict[Tensor, str]:
        found: dict[Tensor, str] = {}
        for group in self.param_groups:
            for place, param in enumerate(group["params"]):
                found[param] = _name(group, place, len(found))
        return found

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for param in group["params"]:
                yield group, param

    def __getstate__(self) -> dict[str, Any]:
        whole: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        states = {param: _without_fp8(state) for param, state in self.state.items()}
        return {**whole, "state": type(self.state)(dict, states)}


def _without_fp8(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in (*_FP8_KEYS, _FP8_VERSION)}


def _name(group: dict[str, Any], place: int, index: int) -> str:
    """Of the parameter at ``place`` in ``group``, and at ``index`` among all."""
    names: list[str] = group.get("param_names", [])
    return names[place] if names else str(index)


def _has_fp8(param: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["emit_fp8"]) and param.dim() in (2, 3)


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        check_type(options[name], (float, int), _OP, name, "a number")
    check_type(options["betas"], (tuple, list), _OP, "betas", "two numbers")
    check_type(options["seed"], int, _OP, "seed", "an integer")
    for name in ("stochastic_rounding", "emit_fp8"):
        check_type(options[name], bool, _OP, name, "a bool")
    check_dtype(options["moments"], _OP, "moments", MOMENT_DTYPES)
    check_numbers(_OP, *(options[name] for name in ("lr", "betas", "eps", "weight_decay", "seed")))


def _gradient(param: Tensor) -> Tensor | None:
    """What ``param`` is to be updated with, contiguous."""
    grad = getattr(param, "main_grad", None)
    name = "grad" if grad is None else "main_grad"
    grad = param.grad if grad is None else grad
    if grad is None:
        return None
    if grad.layout != torch.strided:
        raise value_error(_OP, name, "a dense (strided) tensor", f"layout {grad.layout}")
    if grad.dtype not in GRAD_DTYPES:
        raise ArgumentTypeError(message(_OP, name, " or ".join(map(str, GRAD_DTYPES)), grad.dtype))
    return grad.contiguous()
