"""The plots of a night, each an SVG that also sits in a page. What has no data is not drawn; kinds are never mixed."""

from __future__ import annotations

import dataclasses
import io
import re
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .night import Night, name
from .rows import KINDS, Row, Run

# The colours of Okabe and Ito, which the colour-blind tell apart; markers differ as well.
OURS, PEERS = "#0072B2", ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B")
MARKERS = "sD^vPX<"  # not as many as colours: together they repeat late
QUIET = "#888888"
# Stands for the text's colour, which in a page is the page's own.
INK = "#010203"
WIDTH = 9.0
#: Rows of one dot plot, and shapes of one panel that get a colour each.
MOST_ROWS, MOST_COLOURS = 40, 6
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastfp8",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": QUIET,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """``svg`` takes its text's colour from what is around it; its ids begin with ``name``."""

    name: str
    title: str
    about: str
    svg: str


def draw(night: Night) -> list[Plot]:
    """All plots that the night has data for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows, found = night.run.rows, list[Plot | None]()
    found += [roofline(rows), promotion(rows)]
    for kind in ("gpu", "cpu"):
        families = dict.fromkeys(row.family for row in rows if row.kind == kind and row.ratios)
        found += [ratios(rows, kind, family) for family in families]
        if kind == "cpu":
            found.append(times(rows, kind))
        found.append(history([*night.history, night.run], kind))
    return [plot for plot in found if plot]


def save(plots: Sequence[Plot], folder: Path) -> None:
    """Each as a file of its own, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        text = plot.svg.replace("<svg ", '<svg style="color:#222;background:#fff" ', 1)
        (folder / f"{plot.name}.svg").write_text(text)


def roofline(rows: Sequence[Row]) -> Plot | None:
    """Measured rates over arithmetic intensity, under the ceilings that were measured in the same run."""
    points = [r for r in rows if r.kind == "gpu" and r.family != "ceilings" and r.rate_unit == "TFLOPS"]
    points = [r for r in points if r.intensity and r.rate]
    if not points:
        return None
    ceilings = [r for r in rows if r.kind == "gpu" and r.family == "ceilings" and r.rate]

    def rate(op: str) -> float | None:
        return max((r.rate for r in ceilings if r.op == op and r.rate), default=None)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that must move", ylabel="TFLOPS")
        xs = [r.intensity for r in points if r.intensity]
        low, high = min(xs) / 1.6, max(xs) * 1.6
        copy, tops = rate("copy"), [(op, top) for op in ("fp8", "bf16") if (top := rate(op))]
        if copy:
            end = min(high, max((top for _, top in tops), default=high * copy / 1e3) * 1e3 / copy)
            _ceiling(axes, (low, end), (low * copy / 1e3, end * copy / 1e3), f"copy, {copy:,.0f} GB/s")
        for op, top in tops:
            start = max(low, top * 1e3 / copy) if copy else low
            _ceiling(axes, (start, high), (top, top), f"{op.upper()}, {top:,.0f} TFLOPS")
        for backend, style in _styles(points).items():
            own = [r for r in points if r.backend == backend]
            axes.plot([r.intensity for r in own], [r.rate for r in own], linestyle="none", label=backend, **style)
        axes.set_xlim(low, high)
        axes.grid(which="major")
        _plain(axes.xaxis)
        _plain(axes.yaxis)
        _legend(figure, axes)

    about = "Measured on a GPU. Lines are what this machine was measured to do in the same run; up is faster."
    return _plot("roofline", "Roofline", about, (WIDTH, 5.2), paint)


def ratios(rows: Sequence[Row], kind: str, family: str) -> Plot | None:
    """Own time over each peer's, case by case, with quartiles."""
    cases = [r for r in rows if r.kind == kind and r.family == family and r.ratios]
    shown = cases[:MOST_ROWS]
    if not shown:
        return None
    peers = list(dict.fromkeys(peer for row in shown for peer in row.ratios))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, peer in enumerate(peers):
            found = [(y, row.ratios) for y, row in enumerate(shown) if peer in row.ratios]
            # Side by side in the band of the case, as many as the case has.
            ys = [y + 0.6 * ((list(ratios).index(peer) + 0.5) / len(ratios) - 0.5) for y, ratios in found]
            _dots(axes, [ratios[peer] for _, ratios in found], ys, label=peer, **_peer_style(index))
        axes.axvline(1, color=INK, linewidth=1)
        _scale(axes, [v for row in shown for s in row.ratios.values() for v in (*s, 1.0)])
        _cases(axes, [name(row.op, row.shape) for row in shown])
        axes.set_xlabel("own time / peer's time: left of 1 fastfp8 is faster")
        _legend(figure, axes)

    title = f"{family}: ratio to peers, {KINDS[kind]}"
    about = "The ratio of each round: its median and quartiles."
    if len(cases) > len(shown):
        about += f" The first {len(shown)} of {len(cases)} cases; all are in the table."
    height = 1.4 + len(shown) * max(0.3, 0.13 * max(len(row.ratios) for row in shown))
    return _plot(f"ratio-{kind}-{_slug(family)}", title, about, (WIDTH, height), paint)


def promotion(rows: Sequence[Row]) -> Plot | None:
    """Error of the product over the interval of promotion, a panel a measure, with the gate of what the kernels do."""
    panels: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.family == "accuracy" and row.median > 0:
            panels[row.unit][row.op].append(row)
    if not panels:
        return None

    ops = dict.fromkeys(op for lines in panels.values() for op in lines)
    styles = dict(zip(ops, ({"color": OURS, "marker": "o"}, *map(_peer_style, range(len(ops)))), strict=False))
    down = -(-len(panels) // 2)

    def paint(figure: Any) -> None:
        grid = list(figure.subplots(down, 2, squeeze=False).flat)
        for axes, (unit, lines) in zip(grid, panels.items(), strict=False):
            _errors(axes, unit, lines, styles)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        _legend(figure, grid[0])

    about = (
        "Predicted by the model of Hopper's tensor core, against exact sums of the products: down is more exact. "
        "Dashed: the gate of a product that is promoted every 128, as the kernels' are."
    )
    return _plot("promotion", "Error against the interval of promotion", about, (WIDTH, 0.6 + 2.8 * down), paint)


def _interval(row: Row) -> int:
    """The last word of the shape, as ``accuracy.name_of`` has it."""
    return int(row.shape.rsplit(" ", 1)[1])


def _errors(axes: Any, unit: str, lines: dict[str, list[Row]], styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib import ticker

    for op, found in lines.items():
        axes.plot([_interval(row) for row in found], [row.median for row in found], label=op, **styles[op])
    gated = [(row.bar, op) for op, found in lines.items() for row in found if row.bar is not None]
    for gate in dict.fromkeys(gate for gate, _ in gated):
        ops = [op for other, op in gated if other == gate]
        axes.axhline(gate, color=styles[ops[0]]["color"] if len(ops) == 1 else INK, linewidth=0.9, linestyle="--")
    intervals = sorted({_interval(row) for found in lines.values() for row in found})
    axes.set(xscale="log", yscale="log", xlabel="promoted every so many elements of K", title=unit)
    axes.set_xticks(intervals, [str(interval) for interval in intervals], fontsize=8)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0e}"))
    axes.grid(which="major")


def times(rows: Sequence[Row], kind: str) -> Plot | None:
    """Times of own ops and of the peers beside them."""
    seconds = {"s": 1e3, "ms": 1.0, "us": 1e-3}
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.kind == kind and row.unit in seconds and row.lower > 0:
            groups[name(row.op, row.shape)].append(row)
    cases = {case: members for case, members in groups.items() if any(r.ours for r in members)}
    cases = dict(list(cases.items())[:MOST_ROWS])
    if not cases:
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        members = [row for group in cases.values() for row in group]
        for backend, style in _styles(members).items():
            found = [(y, r) for y, group in enumerate(cases.values()) for r in group if r.backend == backend]
            spreads = [[v * seconds[r.unit] for v in (r.lower, r.median, r.upper)] for _, r in found]
            _dots(axes, spreads, [y for y, _ in found], label=backend, **style)
        _scale(axes, [v * seconds[r.unit] for r in members for v in (r.lower, r.upper)])
        _cases(axes, list(cases))
        axes.set_xlabel("ms")
        _legend(figure, axes)

    about = "Medians with quartiles; what stands on one line took turns in one process. Left is faster."
    return _plot(f"times-{kind}", f"Times, {KINDS[kind]}", about, (WIDTH, 1.4 + 0.32 * len(cases)), paint)


def history(runs: Sequence[Run], kind: str) -> Plot | None:
    """A panel an op: the own times of each run over those of the first that has them, the first peer's beside them."""
    panels = series(runs, kind)
    if not panels:
        return None
    columns = min(3, len(panels))
    down = -(-len(panels) // columns)

    def paint(figure: Any) -> None:
        grid = list(figure.subplots(down, columns, squeeze=False).flat)
        for axes, (op, lines) in zip(grid, panels.items(), strict=False):
            _panel(axes, op, lines, runs)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)

    about = (
        "Own median time over that of the first run that has it: below 1 is faster than then. "
        "Grey and dashed: the first peer's, likewise. Where both move, the machine changed."
    )
    return _plot(f"history-{kind}", f"History, {KINDS[kind]}", about, (WIDTH, 0.4 + 2.4 * down), paint)


#: By the place of the run, a median over the first.
Line = dict[int, float]


def series(runs: Sequence[Run], kind: str) -> dict[str, dict[str, tuple[Line, Line]]]:
    """By op and case, how the own medians went on from the first run, and the peer's that the last run has first.

    A case of one run alone is no series.
    """
    own: dict[tuple[str, str], Line] = defaultdict(dict)
    last: dict[tuple[str, str], Row] = {}
    medians: dict[tuple[str, ...], Line] = defaultdict(dict)
    backends = {row.backend for run in runs for row in run.rows if row.kind == kind and row.ours}
    for index, run in enumerate(runs):
        for row in run.rows:
            if row.kind == kind and row.median > 0:
                medians[row.family, row.op, row.shape, row.backend][index] = row.median
                if row.ours:
                    case = (name(row.family, row.op), name(row.shape, row.backend if len(backends) > 1 else ""))
                    own[case][index] = row.median
                    last[case] = row
    panels: dict[str, dict[str, tuple[Line, Line]]] = defaultdict(dict)
    for (op, shape), line in own.items():
        row = last[op, shape]
        peer = medians.get((row.family, row.op, row.shape, next(iter(row.ratios), "")), {})
        if len(line) > 1:
            panels[op][shape] = _relative(line), _relative(peer)
    return panels


def _relative(line: Line) -> Line:
    first = next(iter(line.values()), 1.0)
    return {index: value / first for index, value in line.items()}


def _panel(axes: Any, op: str, lines: dict[str, tuple[Line, Line]], runs: Sequence[Run]) -> None:
    few = len(lines) <= MOST_COLOURS
    peers = [peer for _, peer in lines.values()]
    for peer in peers if few else [_middle(peers)]:
        axes.plot(*_xy(peer), color=QUIET, linewidth=0.9, linestyle="--")
    for index, (shape, (own, _)) in enumerate(lines.items()):
        if few:
            colour, marker = (OURS, *PEERS)[index], f"o{MARKERS}"[index]
            axes.plot(*_xy(own), color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=shape)
        else:
            axes.plot(*_xy(own), color=OURS, linewidth=0.7, alpha=0.35)
    if not few:
        middle = _middle([own for own, _ in lines.values()])
        axes.plot(*_xy(middle), color=OURS, linewidth=2, label=f"median of {len(lines)} shapes")
    axes.set_title(textwrap.fill(op, 28))
    axes.axhline(1, color=INK, linewidth=0.6)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 1.1))
    axes.grid(axis="y")
    last = len(runs) - 1
    ticks = [0, last // 2, last] if last >= 6 or last == 2 else [0, last]  # else their labels would touch
    axes.set_xlim(-0.15 * last, 1.15 * last)
    where = [runs[i].environment for i in ticks]
    axes.set_xticks(ticks, [f"{e.date[5:10]}\n{e.commit or ''}" for e in where])
    if any(lines):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), fontsize=8, borderpad=0)


def _middle(lines: Sequence[Line]) -> Line:
    places = sorted({index for line in lines for index in line})
    return {index: statistics.median(line[index] for line in lines if index in line) for index in places}


def _xy(line: Line) -> tuple[list[int], list[float]]:
    return list(line), list(line.values())


def _ceiling(axes: Any, xs: tuple[float, float], ys: tuple[float, float], label: str) -> None:
    """A line that nothing passes, named beside its right end where it is level and else at its foot."""
    if xs[0] >= xs[1]:
        return
    axes.plot(xs, ys, color=INK, linewidth=1)
    at, offset = ((xs[1], ys[1]), (5, 0)) if ys[0] == ys[1] else ((xs[0], ys[0]), (12, 0))
    axes.annotate(label, at, xytext=offset, textcoords="offset points", va="center", annotation_clip=False)


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each backend: ours are blue, filled circles first."""
    found: dict[str, dict[str, Any]] = {}
    peers = 0
    for backend in dict.fromkeys(row.backend for row in sorted(rows, key=lambda r: not r.ours)):
        if backend.startswith("fastfp8"):
            found[backend] = {"color": OURS, "marker": "oH8"[len(found) % 3], "markersize": 5.5, "zorder": 3}
        else:
            found[backend] = _peer_style(peers)
            peers += 1
    return found


def _peer_style(index: int) -> dict[str, Any]:
    return {"color": PEERS[index % len(PEERS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4.5}


def _dots(axes: Any, spreads: Sequence[Sequence[float]], ys: Sequence[float], **style: Any) -> None:
    """Medians with bars from the lower quartile to the upper."""
    medians = [median for _, median, _ in spreads]
    errors = [[m - low for low, m, _ in spreads], [high - m for _, m, high in spreads]]
    axes.errorbar(medians, ys, xerr=errors, linestyle="none", elinewidth=1.2, **style)


def _cases(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    if len(labels) > 15:  # the scale at the foot is out of sight of the first
        axes.tick_params(axis="x", top=True, labeltop=True)
    axes.grid(axis="x")
    for boundary in range(1, len(labels)):
        axes.axhline(boundary - 0.5, color=QUIET, linewidth=0.5, alpha=0.4)


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where the values are far apart."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 4:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * 1.25)
        _plain(axes.xaxis)
    else:
        axes.set_xlim(low - 0.08 * (high - low) - 0.02 * high, high + 0.08 * (high - low) + 0.02 * high)


def _plain(axis: Any) -> None:
    """Ticks of a logarithmic axis written out: at 1, 2 and 5, over many decades at 1."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 3000 else (1,), numticks=20))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.9g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _legend(figure: Any, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)


def _plot(name: str, title: str, about: str, size: tuple[float, float], paint: Callable[[Any], None]) -> Plot:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        # Ticks depend on the size of the axes, and that on the width of the ticks' labels: the second pass settles it.
        figure.draw_without_rendering()
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Title": title})
    return Plot(name, title, about, _embeddable(stream.getvalue(), name))


def _embeddable(svg: str, prefix: str) -> str:
    """Without the XML head; ids, which matplotlib numbers from one in every file, made the plot's own."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"(<metadata>.*?</metadata>)", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
