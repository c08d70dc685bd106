"""What is written about a night: files that come back as they went, reports that hold together, a page that opens."""

from __future__ import annotations

import collections
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nights
import pytest

from bench import history, page, readme, report
from bench.night import Night, name
from bench.report import KINDS, MEASURED
from bench.rows import Row, Run, from_lines, to_line

pytest.importorskip("matplotlib", reason="matplotlib is not installed: make setup installs it")
from bench import plots

NIGHTS: dict[str, Callable[[], Night]] = {
    "first-gpu": lambda: nights.night(nights.gpu_run()),
    "gpu": lambda: nights.night(nights.gpu_run(31), [nights.gpu_run(day) for day in range(1, 31)]),
    "cpu": lambda: nights.night(nights.cpu_run(2), [nights.cpu_run()]),
    "failing": nights.failing_night,
    "nothing": lambda: nights.night(Run(nights.environment(None))),
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(params=NIGHTS)
def night(request: pytest.FixtureRequest) -> Night:
    return NIGHTS[request.param]()


def same(got: Run, run: Run) -> None:
    """Equal but for the digits that files do not keep."""
    assert (got.environment, got.not_run, got.suites) == (run.environment, run.not_run, run.suites)
    assert len(got.rows) == len(run.rows)
    for a, b in zip(got.rows, run.rows, strict=True):
        for field in dataclasses.fields(Row):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if field.name == "ratios":
                assert list(x) == list(y)
                assert all(x[peer] == pytest.approx(y[peer], rel=1e-4) for peer in x)
            else:
                assert x == (pytest.approx(y, rel=1e-4) if isinstance(y, float) else y), field.name


# Files.


@pytest.mark.parametrize("form", ["lines", "compact"])
def test_round_trip(night: Night, form: str, tmp_path: Path) -> None:
    path = tmp_path / ("results.jsonl" if form == "lines" else "run.json")
    path.write_text("\n".join(night.run.lines()) + "\n" if form == "lines" else night.run.compact())
    same(Run.load(path), night.run)
    same(Run.load(tmp_path), night.run)


def test_files_keep_counts_whole_and_five_digits_of_times() -> None:
    rows = [nights.row("static", "static", "k", "", "fastfp8", 1.0), nights.row("cpu", "cpu", "k", "", "fastfp8", 1.0)]
    rows = [dataclasses.replace(rows[0], median=1234567.0), dataclasses.replace(rows[1], median=1.23456789)]
    got, _ = from_lines([to_line(row) for row in rows])
    assert [row.median for row in got] == [1234567.0, 1.2346]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 3: JSONDecodeError"),
        ("[]", "line 3"),
        ('{"a": 1}', "line 3: KeyError"),
        ('{"record": "row"}', "line 3"),
    ],
    ids=["no-json", "a-list", "no-record", "a-row-of-nothing"],
)
def test_errors_name_file_and_line(line: str, why: str, tmp_path: Path) -> None:
    lines = nights.cpu_run().lines()
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(ValueError, match=f"results.jsonl.*{why}"):
        Run.load(path)


def test_unknown_records_and_fields_are_passed_over(tmp_path: Path) -> None:
    run = nights.cpu_run()
    lines = [json.dumps({**json.loads(line), "later": 1}) for line in run.lines()]
    (tmp_path / "results.jsonl").write_text("\n".join([*lines, '{"record": "later"}']))
    same(Run.load(tmp_path), run)


def test_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "RESULTS", tmp_path / "results")
    kept = []
    for day, commit in ((3, "abc1234"), (1, "def5678+"), (1, "def5678+"), (2, "abc1234")):
        run = nights.cpu_run(day, 1 + len(kept))
        run.environment = nights.environment(None, day, commit)
        (tmp_path / "results.jsonl").write_text("\n".join(run.lines()))
        kept.append(history.keep(tmp_path))
        assert history.keep(tmp_path) == kept[-1]  # the same run is there once
        same(Run.load(kept[-1]), run)
    assert {path.parent.name for path in kept} == {"cpu-imaginary-2cores"}
    names = ["2030-01-03-abc1234", "2030-01-01-def5678-dirty", "2030-01-01-def5678-dirty-2", "2030-01-02-abc1234"]
    assert [path.stem for path in kept] == names
    assert [run.environment.date[8:10] for run in history.runs_of("cpu-imaginary-2cores")] == ["01", "01", "02", "03"]
    assert history.runs_of("another") == []


def test_every_file_of_the_history_loads() -> None:
    folders = [path for path in history.RESULTS.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        for path, run in history.files_of(folder):
            assert run.environment.machine == folder.name
            assert path.name.startswith(run.environment.date[:10])


# The night's verdict.


def test_failures() -> None:
    tests, launch, bar, regressed = nights.failing_night().failures
    assert tests == "tests, op tests on a GPU: 2 failed: test_one[8x8], test_two"
    assert launch == "quantize 1x128 8x8: RuntimeError: launch failed"
    assert bar == "cpu quantize 8x8 fastfp8: 70 us, over its bar of 60"
    assert regressed == "cpu gemm 2048x2048x2048 fastfp8: regressed: 1.5 ms is 44 % over the upper quartile"


def test_verdict() -> None:
    assert report.verdict(NIGHTS["cpu"]()) == ("green", "57 tests passed, no bar was missed, nothing regressed.")
    sentence = "No test was run, no bar was missed, there was no baseline to compare with."
    assert report.verdict(NIGHTS["nothing"]()) == ("green", sentence)
    assert report.verdict(nights.failing_night()) == ("red", "4 failures:")


def test_green_nights() -> None:
    for which in ("first-gpu", "gpu", "cpu", "nothing"):
        night = NIGHTS[which]()
        assert night.failures == []
        assert report.markdown(night).startswith("# Nightly benchmark: green\n")
    night = nights.night(nights.cpu_run(), [nights.cpu_run()], ("suspect", "improved", "new", "gone"))
    assert night.failures == []


@pytest.mark.parametrize(("on", "what"), [(None, "2 times torch.mm"), ("median", "3 ms")])
def test_a_missed_bar_says_of_what(on: str | None, what: str) -> None:
    rows = nights.case("cpu", "cpu", "gemm", "8x8", 3.0, {"torch.mm": 0.5}, bar=1.5)
    night = nights.night(Run(nights.environment(None), [dataclasses.replace(rows[0], bar_on=on), rows[1]]))
    assert night.failures == [f"cpu gemm 8x8 fastfp8: {what}, over its bar of 1.5"]


def test_name() -> None:
    assert name("gemm", "gemm", "8x8", "") == "gemm 8x8"
    assert name("quantize", "quantize 1x128", "8x8") == "quantize 1x128 8x8"
    assert name("gemm", "gemm_kernel") == "gemm gemm_kernel"
    assert name("", "") == ""


# Text and Markdown.


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1]


def markdown_tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """Each table with the heading it stands under."""
    found: list[tuple[str, list[list[str]]]] = []
    heading, inside = "", False
    for line in text.splitlines():
        heading = line.lstrip("# ") if line.startswith("#") else heading
        if line.startswith("|"):
            if not inside:
                found.append((heading, []))
            found[-1][1].append(cells(line))
        inside = line.startswith("|")
    return found


@pytest.mark.parametrize("which", [*NIGHTS, "hostile"])
def test_markdown_tables_are_well_formed(which: str) -> None:
    tables = markdown_tables(report.markdown(nights.hostile_night() if which == "hostile" else NIGHTS[which]()))
    assert tables
    for heading, (head, rule, *rows) in tables:
        assert rows, heading
        assert all(re.fullmatch(r" ?-+:? ?", cell) for cell in rule), heading
        assert {len(row) for row in (head, rule, *rows)} == {len(head)}, heading


def test_kinds_are_never_mixed(night: Night) -> None:
    """Rows are told apart by a median of their own; each stands under a heading that says how it was had."""
    rows = [
        dataclasses.replace(row, median=1001 + 2 * i, lower=1001 + 2 * i, upper=1001 + 2 * i, bar=None, ratios={})
        for i, row in enumerate(night.run.rows)
    ]
    run = dataclasses.replace(night.run, rows=rows)
    kinds = {f"{row.median:,.0f}": row.kind for row in rows}
    assert len(kinds) == len(rows)
    seen: dict[str, list[str]] = collections.defaultdict(list)
    for heading, (_, _, *lines) in markdown_tables(
        report.markdown(dataclasses.replace(night, run=run, comparisons=[]))
    ):
        for number in re.findall(r"\d,\d{3}", str(lines)):
            if number in kinds:
                seen[number].append(heading)
    assert set(seen) == set(kinds)
    for number, headings in seen.items():
        assert len(headings) == 1
        assert headings[0].endswith(KINDS[kinds[number]])


def test_says_where_there_is_no_gpu_figure(night: Night) -> None:
    sentence = "No GPU figure was measured: torch sees no GPU on this machine."
    missing = not any(row.kind == "gpu" for row in night.run.rows)
    assert missing == (sentence in report.markdown(night)) == (sentence in page.html(night, []))
    run = dataclasses.replace(nights.gpu_run(), rows=nights.cpu_rows())
    assert report.no_gpu(run) == "No GPU figure was measured: there is a GPU, but no measurement on it came to its end."


def test_markdown_says_what_a_reader_needs() -> None:
    text = report.markdown(nights.failing_night())
    assert text.startswith("# Nightly benchmark: red\n\n4 failures:\n\n- tests, op tests on a GPU")
    for outcome in ("Regressed, 1:", "Suspect, 1:", "Improved, 1:"):
        assert outcome in text
    text = report.markdown(NIGHTS["gpu"]())
    table = next(rows for heading, rows in markdown_tables(text) if heading == "gemm, measured on a GPU")
    line = dict(zip((c.strip() for c in table[0]), (c.strip() for c in table[2]), strict=True))
    assert line["of ceiling"] == "67%"
    assert line["GPU"] == "1500 MHz, 600 W, 55 °C"
    assert line["config"] == "128x128, 4 stages"
    peers = {row[2].strip(): row[table[0].index(" fastfp8 / peer ")].strip() for row in table[3:6]}
    assert peers["DeepGEMM"] == "1.11 (1.07 to 1.16)"
    assert all(f"gemm {m}x7168x7168" in text for m in range(8, 64, 8))  # whatever was not reached
    assert "SwPowerCap" in text


def test_new_and_gone_rows_have_one_side() -> None:
    night = nights.night(nights.cpu_run(), [nights.cpu_run()], ("new", "gone"))
    nothing = (float("nan"),) * 3
    new, gone = night.comparisons
    sides = [dataclasses.replace(new, before=nothing), dataclasses.replace(gone, now=nothing)]
    text = report.markdown(dataclasses.replace(night, comparisons=sides))
    assert "New, 1: cpu gemm 2048x2048x2048 fastfp8." in text
    assert "Gone, 1:" in text
    assert "0 rows compared, 0 as before" in text
    assert not re.search(r"\bnan\b", text)


def test_markdown_escapes() -> None:
    text = report.markdown(nights.hostile_night())
    assert "<script" not in text
    assert "second line" in text
    shown = re.sub(r"\\(.)", r"\1", text).replace("&lt;", "<").replace("&amp;", "&")
    assert text.count("alert(1)") == shown.count(nights.HOSTILE) > 10


def test_text_tables(night: Night) -> None:
    text = report.text_tables(night.run)
    for row in night.run.rows:
        assert row.op in text
        assert row.shape in text
    assert ("FAIL" in text) == (not all(row.passed for row in night.run.rows))
    for block in text.split("\n\n"):
        lines = block.splitlines()
        assert not lines or not any(line.endswith(" ") for line in lines)
    if night.run.not_run:
        assert "Not run" in text
        assert night.run.not_run[0].reason in text


def test_unused_columns_are_left_out() -> None:
    rows = [nights.row("cpu", "cpu", "gemm", "8x8", "fastfp8", 1.0)]
    head = report.text_tables(Run(nights.environment(None), rows)).splitlines()[2]
    assert head.split() == ["op", "shape", "backend", "median", "quartiles"]


def test_static_values_are_a_column_each() -> None:
    text = report.text_tables(Run(nights.environment(None), nights.computed_rows()))
    head, first = text.splitlines()[1:3]
    assert re.split(r" {2,}", head.strip()) == ["op", "backend", "registers", "bytes of spills", "instructions"]
    assert re.split(r" {2,}", first.strip()) == ["gemm_sm90_block_bf16_n64", "fastfp8 CUDA", "168", "0", "4,000"]


# Plots and page.


def test_plots_of_what_is_there() -> None:
    drawn = {which: [plot.name for plot in plots.draw(NIGHTS[which]())] for which in NIGHTS}
    cpu = ["ratio-cpu-cpu", "times-cpu"]
    assert drawn["first-gpu"] == ["roofline", "ratio-gpu-gemm", "ratio-gpu-quantize", *cpu]
    assert drawn["gpu"] == [*drawn["first-gpu"][:3], "history-gpu", *cpu, "history-cpu"]
    assert drawn["cpu"] == drawn["failing"] == [*cpu, "history-cpu"]
    assert drawn["nothing"] == []


def test_plots_show_every_case_and_peer_as_text() -> None:
    found = {plot.name: plot.svg for plot in plots.draw(NIGHTS["gpu"]())}
    for which, labels in {
        "roofline": ["fastfp8 CUDA", *nights.PEERS, "FP8, 1,000 TFLOPS", "copy, 4,000 GB/s"],
        "ratio-gpu-gemm": [*(f"gemm {m}x{n}x{k}" for m, n, k in nights.SHAPES), *nights.PEERS],
        "history-gpu": ["quantize 1x128", "16384x7168", "01-01", "01-31"],
        "times-cpu": ["import fastfp8", "torch.mm float32", "clone bfloat16"],
    }.items():
        assert [label for label in labels if f">{label}<" not in found[which]] == []


def test_modelled_and_emulated_rows_are_not_plotted() -> None:
    run = Run(nights.environment(None), nights.computed_rows())
    assert plots.draw(nights.night(run, [run])) == []


def test_history_follows_one_peer() -> None:
    """The first peer of the last run; an earlier one that went by another name is not its past."""
    times = ((2.0, "old peer", 8.0), (3.0, "peer", 2.0), (1.0, "peer", 0.5))
    runs = [
        Run(nights.environment(None), nights.case("cpu", "cpu", "gemm", "8x8", own, {peer: factor}))
        for own, peer, factor in times
    ]
    assert plots.series(runs, "cpu") == {"cpu gemm": {"8x8": ({0: 1, 1: 1.5, 2: 0.5}, {1: 1, 2: 0.5 / 6})}}
    assert plots.series(runs, "gpu") == plots.series(runs[:1], "cpu") == {}


def test_saved_plots_stand_alone(tmp_path: Path) -> None:
    plots.save(plots.draw(NIGHTS["cpu"]()), tmp_path / "plots")
    saved = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in saved] == ["history-cpu.svg", "ratio-cpu-cpu.svg", "times-cpu.svg"]
    for path in saved:
        assert path.read_text().startswith('<svg style="color:')


class Page(html.parser.HTMLParser):
    """Ids, what is referred to, text, and whether every element is closed in order."""

    VOID = ("meta", "link", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text, self.tags = "", collections.Counter[str]()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.handle_startendtag(tag, attrs)
        if tag in self.VOID and tag not in ("path", "use", "rect"):
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for key, value in attrs:
            self.ids += [value or ""] if key == "id" else []
            self.links += [value or ""] if key in ("href", "src", "xlink:href", "srcset", "data", "action") else []
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.links += re.findall(r"url\(([^)]*)\)", data)
        self.text += data


def whole_page(night: Night) -> str:
    return page.html(night, plots.draw(night))


def test_page_holds_together(night: Night) -> None:
    text = whole_page(night)
    found = Page(text)
    assert found.open == []
    assert [i for i, count in collections.Counter(found.ids).items() if count > 1] == []
    assert found.tags["svg"] == found.tags["figure"] == len(plots.draw(night))
    assert found.tags["script"] == 0
    outside = [link for link in found.links if not link.startswith("#")]
    assert outside == []
    assert [link for link in found.links if link[1:] not in found.ids] == []
    assert "@import" not in text
    assert night.run.environment.commit in found.text
    for row in night.run.rows:
        assert row.op in found.text


def test_only_what_was_measured_is_open_at_first() -> None:
    folded = re.findall(r'<details id="([^"]*)">', whole_page(NIGHTS["gpu"]()))
    kinds = [kind for kind in KINDS if kind not in MEASURED]
    assert len(folded) == len(kinds)
    for kind, anchor in zip(kinds, folded, strict=True):
        assert anchor.endswith(KINDS[kind].replace(" ", "-"))


def test_page_escapes() -> None:
    found = Page(whole_page(nights.hostile_night()))
    assert found.tags["script"] == 0
    assert found.open == []
    assert found.text.count(nights.HOSTILE) > 10


def console_errors(path: Path, profile: Path) -> list[str]:
    """What a browser complains of; the page must have been read to its end."""
    assert CHROMIUM is not None
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}")
    command = [CHROMIUM, *options, *quiet, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "</body></html>" in "".join(done.stdout.split("\n"))
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: nothing here opens the page in a browser")
@pytest.mark.parametrize("planted", ["", "<script>missing()</script>", '<svg><path d="M here"/></svg>'])
def test_page_opens_in_a_browser(planted: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    text = whole_page(nights.failing_night())
    path.write_text(text.replace("</body>", f"{planted}</body>"))
    assert bool(console_errors(path, tmp_path / "profile")) == bool(planted)


# README.


def test_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.update(check=True) == 0, f"python -m bench readme:\n{capsys.readouterr().out}"


@pytest.fixture
def own_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    monkeypatch.setattr(readme, "README", path)
    monkeypatch.setattr(history, "RESULTS", tmp_path / "results")
    return path


def put(run: Run, commit: str) -> None:
    run.environment = dataclasses.replace(run.environment, commit=commit)
    folder = history.RESULTS / run.environment.machine
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run.environment.date[:10]}-{commit}.json").write_text(run.compact())


def test_readme_takes_the_newest_run_of_each_family(own_readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(nights.cpu_run(1), "aaa1111")
    put(nights.cpu_run(2, slower=2.0), "bbb2222")
    put(Run(nights.environment(None, 3), nights.computed_rows()), "ccc3333")
    assert readme.update(check=True) == 1
    assert "+There is no GPU figure" in capsys.readouterr().out
    assert own_readme.read_text().endswith("old\n" + readme.END + "\nafter\n")
    assert readme.update(check=False) == 0
    text = own_readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "commit bbb2222, 2030-01-02" in text
    assert "200 ms" in text
    assert "aaa1111" not in text  # an older run of the same family
    assert "ccc3333" not in text  # nothing in it was measured
    assert readme.update(check=True) == 0
    put(nights.gpu_run(5), "ddd4444")
    assert readme.update(check=True) == 1
    readme.update(check=False)
    text = own_readme.read_text()
    assert "There is no GPU figure" not in text
    assert "`gemm`, measured on a GPU: Imaginary GPU" in text
    assert "0.80 (0.77 to 0.83) times cuBLASLt block scaling, 1.11 (1.07 to 1.16) times DeepGEMM" in text
    assert not re.search(r"^\| gemm .* DeepGEMM \|", text, re.M)  # no row of a peer
    for head, rule, *rows in (rows for _, rows in markdown_tables(text)):
        assert {len(row) for row in (head, rule, *rows)} == {len(head)}


@pytest.mark.parametrize("text", ["", f"{readme.BEGIN * 2}{readme.END}", f"{readme.END}{readme.BEGIN}", readme.BEGIN])
def test_readme_without_its_comments(text: str, own_readme: Path) -> None:
    own_readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md must have"):
        readme.update(check=False)
    assert own_readme.read_text() == text
