"""What others published of their dispatch and combine, and how the model is set to be compared with it.

DeepEP V1: README, H800. V2: pull request 605. UCCL-EP: its README, p5en (H200), on the assumption that it counts as
DeepEP's tests do. Rates are as ``fastfp8.comm.model.deepep_rate`` counts.
"""

from __future__ import annotations

import dataclasses

from fastfp8.comm.model import BULK, BULK_SEND, MACHINES, US, Copying, Settings, Shape, deepep_rate, flat_seconds
from fastfp8.comm.simulation import simulate


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of a table: GB/s of dispatch and combine, or microseconds where the protocol is ``flat``."""

    source: str
    machine: str
    shape: Shape
    dispatch: float
    combine: float
    settings: Settings | None = None
    copying: Copying = BULK
    fitted: str = ""  # the constant that was fitted on this row, among others

    @property
    def flat(self) -> bool:
        """A copy for each of a token's experts: DeepEP's low-latency kernels."""
        return self.settings is None

    @property
    def modelled(self) -> tuple[float, float] | None:
        """The same two numbers; None of a machine that the model has nothing of."""
        machine = MACHINES.get(self.machine)
        if machine is None:
            return None
        sizes = (self.shape.row_bytes, 2 * self.shape.hidden)
        if self.settings is None:
            # Its FP8 messages have 16 bytes more.
            times = [flat_seconds(machine, self.shape, b) / US for b in (sizes[0] + 16, sizes[1])]
            return times[0], times[1]
        rates = []
        for combine, row_bytes in zip((False, True), sizes, strict=True):
            found = simulate(machine, self.shape, self.settings, combine=combine, copying=self.copying)
            rates.append(deepep_rate(self.shape, row_bytes, found.seconds))
        return rates[0], rates[1]


def _rings(num_sms: int) -> Settings:
    """Large ones, as DeepEP's."""
    return Settings(num_sms, link_slots=32, rail_slots=8, rail_chunk=16)


def _normal(nodes: int, dispatch: float, combine: float, fitted: str = "") -> Published:
    shape = Shape(nodes, 8, top_groups=4)
    return Published("DeepEP V1, normal, 24 SMs", "H800", shape, dispatch, combine, _rings(24), fitted=fitted)


def _low_latency(nodes: int, dispatch: float, combine: float, fitted: str = "rail, call_us") -> Published:
    shape = Shape(nodes, 8, tokens=128, experts=288)
    return Published("DeepEP V1, low latency", "H800", shape, dispatch, combine, fitted=fitted)


def _second(machine: str, nodes: int, dispatch: float, combine: float, num_sms: int) -> Published:
    shape = Shape(nodes, 8, tokens=8192)
    source = f"DeepEP V2, {num_sms} SMs"
    return Published(source, machine, shape, dispatch, combine, _rings(num_sms), BULK_SEND)


PUBLISHED = (
    _normal(1, 153, 158, "link"),
    _normal(2, 43, 43),
    _normal(4, 58, 57),
    _normal(8, 51, 50),
    _low_latency(1, 77, 114, ""),
    _low_latency(2, 118, 195),
    _low_latency(4, 155, 273),
    _low_latency(8, 173, 314),
    _low_latency(16, 192, 369),
    _low_latency(32, 194, 360),
    _second("H100", 2, 90, 81, 12),
    _second("H100", 4, 61, 61, 6),
    _second("SM100", 2, 90, 91, 12),
    _second("SM100", 1, 726, 740, 64),
    _second("SM100", 1, 643, 675, 24),
    Published("UCCL-EP, 24 SMs", "H200", Shape(1, 8), 320, 319, _rings(24), fitted="link"),
)
