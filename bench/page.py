"""The night's report as one HTML file: no script, nothing loaded from elsewhere, plots inline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from .night import Night
from .plots import Plot
from .report import Block, Section, Table, commit_text, no_gpu, sections, verdict

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --quiet: #5f6770; --line: #d9dde2; --ground: #fff; --soft: #f4f6f8;
  --ours: #0072b2; --green: #1a7f45; --red: #c22f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --quiet: #9aa3ad; --line: #363c44; --ground: #15181b;
  --soft: #1e2226; --ours: #6bb7e8; --green: #4cc27d; --red: #f07a7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.2rem clamp(.8rem, 3vw, 2rem) 4rem; color: var(--ink);
  background: var(--ground); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p, ul { margin: .4rem 0 .6rem; max-width: 80ch; }
a { color: var(--ours); }
.verdict { border-left: .4rem solid var(--green); background: var(--soft); padding: .7rem 1rem;
  overflow-wrap: anywhere; }
.verdict.red { border-color: var(--red); }
.verdict h1 span { color: var(--green); }
.verdict.red h1 span { color: var(--red); }
.about, .notes { color: var(--quiet); }
.notes { font-size: .88rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1rem 0; font-size: .92rem; }
.box { overflow-x: auto; margin: .5rem 0 .8rem; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .65rem; text-align: left; white-space: nowrap; vertical-align: top; }
td.wide { white-space: normal; min-width: 22rem; overflow-wrap: anywhere; }
.number { text-align: right; }
thead th { white-space: normal; background: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
tr.ours td { font-weight: 600; color: var(--ours); }
tr.failed td { font-weight: 600; color: var(--red); }
figure { margin: .5rem 0 1.6rem; }
figure .box { border: 0; }
figure svg { display: block; width: 100%; min-width: 620px; max-width: 900px; height: auto; color: var(--ink); }
summary { cursor: pointer; margin: 1.6rem 0 .4rem; }
summary h2 { display: inline; }
"""

#: Cells longer than this may break.
LONG = 60
#: Titles of the sections about the night as a whole.
NIGHT = ("Machine", "Tests", "Against the baseline", "Goals")


def html(night: Night, plots: Sequence[Plot]) -> str:
    """The page, whole. ``plots`` may be empty."""
    title = verdict(night)[0]
    where = night.run.environment
    # The plots come before the tables that they are drawn from.
    found = sections(night)
    above = [s for s in found if s.title in NIGHT]
    below = [s for s in found if s.title not in NIGHT]
    titles = [*(s.title for s in above), *(["Plots"] if plots else []), *(s.title for s in below)]
    links = "\n".join(tag("a", escape(t), href=f"#{anchor(t)}") for t in titles)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        tag("title", escape(f"Nightly benchmark: {title}, {commit_text(where.commit)}, {where.machine}")),
        tag("style", STYLE),
        "</head><body>",
        _header(night),
        tag("nav", links),
        *map(_section, above),
    ]
    if plots:
        parts.append(tag("section", tag("h2", "Plots") + "".join(map(_figure, plots)), id="plots"))
    return "\n".join([*parts, *map(_section, below), "</body></html>"]) + "\n"


def tag(kind: str, inner: str, **attributes: str) -> str:
    """An element around HTML; a trailing underscore in an attribute's name goes, a dash stands for one inside."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items() if value
    )
    return f"<{kind}{given}>{inner}</{kind}>"


def _header(night: Night) -> str:
    title, sentence = verdict(night)
    where = night.run.environment
    about = f"{where.gpu or where.cpu}, {commit_text(where.commit)}, {where.date}"
    parts = [tag("h1", f"Nightly benchmark: {tag('span', title)}"), tag("p", escape(sentence))]
    if night.failures:
        parts.append(_lines(night.failures))
    if missing := no_gpu(night.run):
        parts.append(tag("p", escape(missing)))
    return tag("header", "".join([*parts, tag("p", escape(about), class_="about")]), class_=f"verdict {title}")


def _section(section: Section) -> str:
    inner, heading = "\n".join(map(_block, section.blocks)), tag("h2", escape(section.title))
    if section.measured:
        return tag("section", heading + inner, id=anchor(section.title))
    return tag("details", tag("summary", heading) + inner, id=anchor(section.title))


def _figure(plot: Plot) -> str:
    about = tag("figcaption", escape(plot.about), class_="about")
    picture = tag("div", plot.svg, class_="box", role="img", aria_label=plot.title)
    return tag("figure", tag("h3", escape(plot.title)) + about + picture, id=f"plot-{plot.name}")


def _block(block: Block) -> str:
    if isinstance(block, str):
        return tag("p", escape(block))
    return _lines(block, "notes") if isinstance(block, list) else _table(block)


def _lines(lines: Sequence[str], style: str = "") -> str:
    return tag("ul", "".join(tag("li", escape(line)) for line in lines), class_=style)


def _table(table: Table) -> str:
    right = table.numeric

    def row(kind: str, cells: Sequence[str], mark: str = "") -> str:
        styles = ("wide" if len(c) > LONG else "number" if r else "" for c, r in zip(cells, right, strict=True))
        inner = "".join(tag(kind, escape(c), class_=s) for c, s in zip(cells, styles, strict=True))
        return tag("tr", inner, class_=mark)

    head = tag("thead", row("th", table.columns)) if any(table.columns) else ""
    body = "\n".join(row("td", cells, mark) for cells, mark in zip(table.rows, table.marks, strict=True))
    return tag("div", tag("table", head + tag("tbody", body)), class_="box")


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
