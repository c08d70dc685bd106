"""``python -m bench comm --simulate``: it says that it is a model, and how far the model is from what is published."""

from __future__ import annotations

import pytest

from bench import __main__, comm_simulate
from bench.comm_published import PUBLISHED, Published
from bench.rows import from_lines

MODELLED = [row for row in PUBLISHED if row.modelled is not None]


@pytest.mark.parametrize("row", MODELLED, ids=[f"{r.source}, {r.machine}, {r.shape.ranks}" for r in MODELLED])
def test_the_model_is_near_what_is_published(row: Published) -> None:
    found = row.modelled
    assert found is not None
    for ours, theirs in zip(found, (row.dispatch, row.combine), strict=True):
        assert ours == pytest.approx(theirs, rel=0.11)


def test_what_is_not_modelled_is_said() -> None:
    assert {row.machine for row in PUBLISHED if row.modelled is None} == {"SM100"}
    assert sum(row.fitted == "" for row in MODELLED) >= 6, "rows that nothing was fitted on"


def test_tables_and_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(comm_simulate, "GPUS", (8, 16))
    monkeypatch.setattr(comm_simulate, "MANY", 16)
    assert __main__.main(["comm", "--simulate", "--machine", "H100"]) == 0
    text = capsys.readouterr().out
    assert "modelled for H100" in text.splitlines()[0]
    assert "nothing was measured" in text
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert len(titles) == 8
    assert all("modelled" in title or "model beside" in title for title in titles)
    assert text.count("not modelled") == 6
    assert __main__.main(["comm", "--simulate", "--machine", "H100", "--json"]) == 0
    rows, not_run = from_lines(capsys.readouterr().out.splitlines())
    assert not not_run
    assert {row.kind for row in rows} == {"modelled"}
    assert {row.backend for row in rows} == {"fastfp8, H100"}
    assert {row.op for row in rows} == {"dispatch", "combine"}
    assert {row.shape.split(", ")[1] for row in rows} == {"8 GPUs", "16 GPUs"}
    assert all(row.rate and row.median > 31 and row.note and "by rail" in row.note for row in rows)


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(SystemExit):
        __main__.main(["comm", "--simulate", "--machine", "B200"])
