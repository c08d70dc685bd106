"""``python -m bench comm --simulate``: what the model predicts of dispatch and combine. Nothing in it is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from fastfp8.comm.model import MACHINES, Machine, Settings, Shape, deepep_rate, ring_bytes, wire_rates
from fastfp8.comm.simulation import simulate
from fastfp8.comm.tune import CHOICES, defaults

from .comm_published import PUBLISHED, Published
from .report import Section, Table, section_text
from .rows import Row
from .shapes import EXPERTS

MODEL = EXPERTS[0]  # DeepSeek-V3
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
FEW, MANY = 8, 64  # GPUs of the other tables
GPUS_OF_NODE = 8
NODES_OF_TOKEN = 4
ABOUT = [
    "Everything here is predicted by a model (fastfp8/comm/model.py and simulation.py): nothing was measured.",
    "GB/s: as DeepEP counts, a copy of a row for each node that a token goes to, its own among them (of one node: for",
    "each rank). Rail, NVLink: what leaves a GPU. Bound: what is busy longest. Times are of a call, exchange included.",
]
ABOUT_PUBLISHED = [
    'The model beside published tables; GB/s as DeepEP counts, us where there is "us". Fitted: the constants that this',
    "row had a part in; rows without are predictions. SM rates are DeepEP V2's own constants; latencies of a link, a",
    "rail, a load and a put are guesses. V2's rows leave out its epilogues, so here, too. Of SM100 the model has",
    "nothing.",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, by the model."""

    machine: Machine
    shape: Shape
    settings: Settings
    combine: bool
    skew: float = 1.0

    def row(self) -> Row:
        found = simulate(self.machine, self.shape, self.settings, combine=self.combine, skew=self.skew)
        size = 2 * self.shape.hidden if self.combine else self.shape.row_bytes
        rail, link = wire_rates(self.shape, size, found.seconds)
        shape = self.shape
        layer = f"{shape.tokens}x{shape.hidden} a rank, {shape.ranks} GPUs, {shape.top_k} of {shape.experts} experts"
        groups = f", {shape.top_groups} nodes a token" if shape.top_groups else ""
        skew = f", skew {self.skew:g}" if self.skew != 1 else ""
        return Row(
            family="comm",
            op="combine" if self.combine else "dispatch",
            shape=layer + groups + skew,
            backend=f"fastfp8, {self.machine.name}",
            kind="modelled",
            unit="us",
            median=found.us,
            lower=found.us,
            upper=found.us,
            config=str(self.settings),
            rate=deepep_rate(shape, size, found.seconds),
            rate_unit="GB/s",
            note=f"{rail:.1f} GB/s by rail, {link:.1f} by NVLink; bound by {found.bound}; "
            f"rings {ring_bytes(shape, self.settings) / 2**20:.0f} MiB",
        )


def shape_of(gpus: int, tokens: int = 4096) -> Shape:
    """DeepSeek-V3's layer on so many GPUs, with as many experts as there are GPUs if that is more than it has."""
    nodes = max(1, gpus // GPUS_OF_NODE)
    experts = max(MODEL.count, gpus)
    return Shape(nodes, GPUS_OF_NODE, tokens, MODEL.hidden, experts, MODEL.top_k, min(NODES_OF_TOKEN, nodes))


def settings_of(machine: Machine, shape: Shape, num_sms: int | None = None) -> Settings:
    return defaults(
        *(shape.nodes, shape.gpus, shape.hidden, shape.top_k, machine.name, shape.top_groups),
        experts=shape.experts,
        max_tokens=shape.tokens,
        num_sms=num_sms,
    )


def both(machine: Machine, shape: Shape, settings: Settings, skew: float = 1.0) -> list[Case]:
    return [Case(machine, shape, settings, combine, skew) for combine in (False, True)]


def cases(machine: Machine) -> dict[str, list[Case]]:
    """By the title of their table."""
    found: dict[str, list[Case]] = {}
    for tokens, what in ((4096, "training and prefill"), (128, "decoding")):
        shapes = [shape_of(gpus, tokens) for gpus in GPUS]
        title = f"By GPUs, {tokens} tokens a rank ({what}), settings by default"
        found[title] = [case for shape in shapes for case in both(machine, shape, settings_of(machine, shape))]
    for gpus in (FEW, MANY):
        shape = shape_of(gpus)
        sms = [n for n in CHOICES["num_sms"] if n <= machine.sms]
        title = f"By SMs, {gpus} GPUs"
        found[title] = [case for n in sms for case in both(machine, shape, settings_of(machine, shape, n))]
    shape = shape_of(MANY)
    start = settings_of(machine, shape)
    chunks = [dataclasses.replace(start, rail_chunk=chunk) for chunk in CHOICES["rail_chunk"]]
    found[f"By chunk, {MANY} GPUs"] = [case for settings in chunks for case in both(machine, shape, settings)]
    skews = [case for skew in (1.0, 1.25, 1.5, 2.0) for case in both(machine, shape, start, skew)]
    found[f"By the rows of the busiest rank over the mean (skew), {MANY} GPUs"] = skews
    return found


def tables(machine: str) -> str:
    """For people."""
    sections = [Section(f"Dispatch and combine, modelled for {MACHINES[machine]}", list(ABOUT))]
    for title, of_title in cases(MACHINES[machine]).items():
        sections.append(Section(f"{title} (modelled)", [_table(of_title)]))
    sections.append(Section("The model beside published tables", [*ABOUT_PUBLISHED, _published(PUBLISHED)]))
    return "\n".join(section_text(section) for section in sections)


def rows(machine: str) -> list[Row]:
    """For programs."""
    return [case.row() for of_title in cases(MACHINES[machine]).values() for case in of_title]


def _table(of_title: Iterable[Case]) -> Table:
    lines = []
    for case in of_title:
        found = simulate(case.machine, case.shape, case.settings, combine=case.combine, skew=case.skew)
        size = 2 * case.shape.hidden if case.combine else case.shape.row_bytes
        rates = [deepep_rate(case.shape, size, found.seconds), *wire_rates(case.shape, size, found.seconds)]
        settings = case.settings
        rings = f"{settings.rail_slots} x {settings.rail_chunk}, {settings.link_slots}"
        lines.append(
            [
                *(str(case.shape.ranks), "combine" if case.combine else "dispatch", str(settings.num_sms), rings),
                *(f"{case.skew:g}", f"{found.us:,.0f}", *(f"{rate:.1f}" for rate in rates), found.bound),
                f"{ring_bytes(case.shape, settings) / 2**20:,.0f}",
            ]
        )
    columns = ["GPUs", "op", "SMs", "rail slots x chunk, link slots", "skew", "us", "GB/s", "rail", "NVLink", "bound"]
    return Table.of([*columns, "rings, MiB"], lines)


def _published(published: Sequence[Published]) -> Table:
    lines = []
    for row in published:
        found = row.modelled
        for i, (op, said) in enumerate((("dispatch", row.dispatch), ("combine", row.combine))):
            unit = "us" if row.flat else "GB/s"
            ours = [f"{found[i]:.1f}", f"{100 * (found[i] / said - 1):+.1f} %"] if found else ["not modelled", ""]
            lines.append([row.source, row.machine, str(row.shape.ranks), op, f"{said:g} {unit}", *ours, row.fitted])
    return Table.of(["source", "machine", "GPUs", "op", "published", "model", "residual", "fitted"], lines)
