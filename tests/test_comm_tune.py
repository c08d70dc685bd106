"""A buffer's settings: the model's defaults, sweeps with a clock that the test turns, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from fastfp8.comm import tune
from fastfp8.comm.model import MACHINES, Settings, Shape, ring_bytes
from fastfp8.comm.simulation import simulate
from fastfp8.comm.tune import CHOICES, Cache, Key, defaults, descend, machine_of, sweep

START = Settings(num_sms=20, link_slots=8, rail_slots=4, rail_chunk=8)
KEY = Key(nodes=4, ranks=32, hidden=7168, top_k=8, gpu="NVIDIA H800")


def test_a_gpu_is_known_by_its_name() -> None:
    assert machine_of("NVIDIA H800").name == "H800"
    assert machine_of("NVIDIA H100 80GB HBM3").name == "H100"
    assert machine_of("NVIDIA H200").name == "H200"
    assert machine_of("NVIDIA H20").name == "H20"
    assert machine_of("NVIDIA B200").name == "H100"


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (2, 8), (3, 2), (8, 8), (32, 8)])
def test_defaults_can_be_used_and_are_near_the_best(nodes: int, gpus: int) -> None:
    found = defaults(nodes, gpus, 7168, 8, "NVIDIA H800", top_groups=4)
    assert found.num_sms in CHOICES["num_sms"]
    shape = Shape(nodes, gpus, tune.MOST_TOKENS, experts=-(-256 // (nodes * gpus)) * nodes * gpus, top_groups=4)
    assert ring_bytes(shape, found) <= tune.MOST_BYTES

    def seconds(settings: Settings) -> float:
        return sum(simulate(MACHINES["H800"], shape, settings, combine=c).seconds for c in (False, True))

    others = [dataclasses.replace(found, num_sms=n) for n in CHOICES["num_sms"]]
    assert seconds(found) <= 1.1 * min(map(seconds, others))
    if nodes > 1:
        chunks = [dataclasses.replace(found, rail_chunk=n) for n in CHOICES["rail_chunk"]]
        assert seconds(found) <= 1.1 * min(map(seconds, chunks))


def test_defaults_keep_to_what_they_are_told() -> None:
    assert defaults(2, 8, 7168, 8, "NVIDIA H100", num_sms=6).num_sms == 6
    small = defaults(2, 8, 7168, 8, "NVIDIA H100", most_bytes=1 << 24)
    assert ring_bytes(Shape(2, 8), small) <= 1 << 24
    assert defaults(1, 2, 128, 32, "NVIDIA H100", experts=8, max_tokens=1) is not None
    assert "16 warps" in str(small)
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.num_sms = 2  # type: ignore[misc]


def test_a_node_limit_lets_fewer_sms_do() -> None:
    """Fewer copies go by rail, of which the sender has work, too."""
    shape, any_node = Shape(8, 8, top_groups=2), Shape(8, 8)
    limited, free = (
        simulate(MACHINES["H800"], s, dataclasses.replace(START, num_sms=8)).seconds for s in (shape, any_node)
    )
    assert limited < 0.8 * free


def test_descend_takes_the_least_that_is_worth_it() -> None:
    """Eight SMs are half as fast as 16; more than 16 gain 2 %, which fewer SMs are worth."""

    def seconds(settings: Settings) -> float:
        by_sms = {4: 4.0, 8: 2.0, 12: 1.5, 16: 1.0}.get(settings.num_sms, 0.98)
        return by_sms + abs(settings.rail_chunk - 4)

    assert descend(seconds, START, ("num_sms", "rail_chunk")) == dataclasses.replace(START, num_sms=16, rail_chunk=4)
    few = descend(seconds, START, ("num_sms", "rail_chunk"), fits=lambda s: s.num_sms <= 8 and s.rail_chunk >= 8)
    assert few == dataclasses.replace(START, num_sms=8, rail_chunk=8)
    assert descend(seconds, START, ("num_sms",), fits=lambda _: False) == START


class Clock:
    """Seconds of settings, every third of them disturbed by ``noise``, and what was asked."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.asked = noise, list[Settings]()

    def __call__(self, settings: Settings) -> float:
        self.asked.append(settings)
        noise = self.noise if len(self.asked) % 3 == 0 else 0.0
        return 1.0 / min(settings.num_sms, 12) + 0.1 * abs(settings.rail_chunk - 2) + noise


def test_a_sweep_finds_the_best_in_spite_of_outliers() -> None:
    clock = Clock(noise=10.0)
    found = sweep(clock, START)
    assert found.settings == dataclasses.replace(START, num_sms=12, rail_chunk=2)
    assert found.seconds == pytest.approx(1 / 12)
    assert found.tried[START] == pytest.approx(1 / 12 + 0.6), "what was there before is measured, too"
    assert len(clock.asked) == 5 * len(found.tried), "nothing twice"
    assert len(found.tried) == len(CHOICES["rail_chunk"]) + len(CHOICES["num_sms"]) - 1
    assert str(found).splitlines()[0].startswith("12 SMs of 16 warps, rails 4 slots of 2, links 8 slots: 83333.3 us")


def test_a_sweep_tries_only_what_fits() -> None:
    clock = Clock()
    found = sweep(clock, START, ("num_sms", "link_slots"), repeats=1, fits=lambda s: s.num_sms < 12)
    assert {s.num_sms for s in clock.asked} == {4, 8, 20}
    assert found.settings.num_sms == 8


def test_settings_are_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "comm.json")
    assert cache.load(KEY) is None
    cache.store(KEY, START)
    other = dataclasses.replace(KEY, gpu="NVIDIA H100")
    cache.store(other, dataclasses.replace(START, num_sms=8))
    assert Cache(cache.path).load(KEY) == START
    assert cache.load(other) == dataclasses.replace(START, num_sms=8)
    for changed in ({"nodes": 8}, {"ranks": 64}, {"hidden": 2048}, {"top_k": 6}):
        assert cache.load(dataclasses.replace(KEY, **changed)) is None
    cache.store(KEY, dataclasses.replace(START, rail_chunk=1))
    assert cache.load(KEY) == dataclasses.replace(START, rail_chunk=1)
    assert [p.name for p in cache.path.parent.iterdir()] == ["comm.json"]


def test_the_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    Cache().store(KEY, START)
    assert (tmp_path / ".cache" / "fastfp8" / "comm.json").exists()


BROKEN = ["", "{", "[]", "null", "\x00\xff", "[" * 10_000, '{"a": 1}']


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_file_that_is_no_cache_is_written_again(tmp_path: Path, text: str) -> None:
    cache = Cache(tmp_path / "comm.json")
    cache.path.write_text(text)
    assert cache.load(KEY) is None
    cache.store(KEY, START)
    assert cache.load(KEY) == START
    assert list(json.loads(cache.path.read_text())) == [str(KEY)]


@pytest.mark.parametrize(
    "changed",
    [
        {"num_sms": 3},
        {"num_sms": 0},
        {"num_sms": "20"},
        {"rail_chunk": True},
        {"warps": 1.5},
        {"more": 1},
        {"warps": None},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_passed_over(tmp_path: Path, changed: dict[str, object]) -> None:
    cache = Cache(tmp_path / "comm.json")
    good = dataclasses.replace(KEY, hidden=128)
    entries = {str(KEY): {**dataclasses.asdict(START), **changed}, str(good): dataclasses.asdict(START)}
    cache.path.write_text(json.dumps(entries))
    assert cache.load(KEY) is None
    assert cache.load(good) == START


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "comm.json")
    cache.store(KEY, START)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="settings are not kept: No space left"):
        cache.store(KEY, dataclasses.replace(START, num_sms=4))
    assert cache.load(KEY) == START
    assert [p.name for p in tmp_path.iterdir()] == ["comm.json"]


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "comm.json")
    with pytest.warns(UserWarning, match="settings are not kept"):
        cache.store(KEY, START)
    assert cache.load(KEY) is None


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert Cache().load(KEY) is None
    with pytest.warns(UserWarning, match="settings are not kept"):
        Cache().store(KEY, START)
