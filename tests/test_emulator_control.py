"""Register counts, dependent launches, traps, sleep, fences' forms, printf and assertions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import backend_params
from machines import machine, silicon_too

pytestmark = backend_params(["emulator"])[0].marks

PTX = """
.version 8.6
.target sm_90a
.address_size 64
.extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 list);
.extern .func __assertfail (.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 s);
.global .align 1 .b8 format[64] = {format};
.visible .entry kernel(.param .u64 pa, .param .u64 pd) {directives} {{
  .reg .pred p, q, r;
  .reg .b32 %a, %b, %d, %t, %w, %n, %g;
  .reg .b64 %x, %y, %o, %f, %l;
  .local .align 8 .b8 list[32];
  mov.u32 %t, %tid.x;
  shr.u32 %w, %t, 7;
  mov.u32 %n, %ntid.x;
  mov.u32 %b, %ctaid.x;
  mad.lo.u32 %b, %b, %n, %t;
  mul.wide.u32 %o, %b, 4;
  ld.param.u64 %x, [pa];
  ld.param.u64 %y, [pd];
  add.s64 %y, %y, %o;
  setp.eq.u32 p, %t, 0;
  mov.u32 %d, 0;
  {body}
  st.global.b32 [%y], %d;
  ret;
}}
"""
Values = np.ndarray[Any, np.dtype[np.uint32]]


def text_of(body: str, directives: str = "", words: bytes = b"") -> str:
    letters = ", ".join(str(c) for c in words + b"\0")
    return PTX.format(body=body, directives=directives, format="{" + letters + "}")


def run(body: str, threads: int = 32, directives: str = "", seed: int = 0, words: bytes = b"") -> Values:
    out = np.zeros(threads, np.uint32)
    a = np.zeros(64, np.uint32)
    machine(seed).load(text_of(body, directives, words))["kernel"].launch(1, threads, args=[a, out])
    return out


def raises(body: str, words: str, threads: int = 32, directives: str = "", seed: int = 0) -> None:
    from emulator import EmulationError

    with pytest.raises(EmulationError, match=words):
        run(body, threads, directives, seed)


ENTRY = ".maxntid 384, 1, 1 .minnctapersm 1"
ROLES = """setp.eq.u32 q, %w, 0; @q bra PRODUCER;
  setmaxnreg.inc.sync.aligned.u32 {more}; mov.u32 %d, 1; bra.uni DONE;
  PRODUCER: setmaxnreg.dec.sync.aligned.u32 {fewer}; mov.u32 %d, 2;
  DONE:"""


@silicon_too
@pytest.mark.parametrize(("fewer", "more"), [(40, 232), (24, 240)])
@pytest.mark.parametrize("directives", [ENTRY, ".reqntid 384 .minnctapersm 1", ".maxnreg 168"])
def test_registers_go_from_one_warpgroup_to_others(fewer: int, more: int, directives: str) -> None:
    for seed in range(5):
        d = run(ROLES.format(more=more, fewer=fewer), 384, directives, seed)
        assert d.tolist() == [2] * 128 + [1] * 256


def test_register_errors() -> None:
    raises(ROLES.format(more=240, fewer=40), "waits for 2304 registers, of which", 384, ENTRY)
    raises(ROLES.format(more=232, fewer=40), "C7508", 384, ".maxntid 384, 1, 1")
    raises(ROLES.format(more=232, fewer=40), "C7508", 384)
    raises("setmaxnreg.dec.sync.aligned.u32 176;", "has 168 registers a thread already", 384, ENTRY)
    raises("setmaxnreg.inc.sync.aligned.u32 160;", "has 168 registers a thread already", 384, ENTRY)
    raises("setmaxnreg.inc.sync.aligned.u32 256;", "beyond the budget: the CTA has 16384", 128, ".maxnreg 128")
    raises("setp.lt.u32 q, %t, 9; @q setmaxnreg.dec.sync.aligned.u32 24;", "divergent", 384, ENTRY)
    one = "setp.lt.u32 q, %t, 32; @q setmaxnreg.dec.sync.aligned.u32 24; @!q setmaxnreg.dec.sync.aligned.u32 32;"
    raises(one, "other warps of the warpgroup execute the one in line", 384, ENTRY)
    # All come down but for one, which wants more than that frees.
    raises("setmaxnreg.inc.sync.aligned.u32 176;", "waits for 256 registers, of which 0 are free", 384, ENTRY)


@pytest.mark.parametrize("count", [16, 23, 100, 264, -24])
def test_register_counts_out_of_range(count: int) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match="24 to 256 in eights"):
        Machine().load(text_of(f"setmaxnreg.dec.sync.aligned.u32 {count};", ENTRY))


def dependent(primary: str, secondary: str, seed: int, programmatic: bool = True) -> Values:
    """The secondary copies what the primary has stored last."""
    from emulator import Machine

    machine = Machine(seed)
    a, out, unused = np.zeros(64, np.uint32), np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    first = machine.load(text_of(primary))["kernel"].prepare(2, 32, args=[unused, a])
    second = machine.load(text_of(secondary))["kernel"].prepare(2, 32, args=[a, out], programmatic=programmatic)
    machine.launch_all([first, second])
    return out


COPY = "add.s64 %x, %x, %o; ld.global.b32 %d, [%x];"


def test_dependent_launches() -> None:
    work = "mov.u32 %d, 0; L: add.u32 %d, %d, 1; setp.lt.u32 r, %d, 500; @r bra L;"
    early = set()
    for seed in range(10):
        for first in (work, "griddepcontrol.launch_dependents;" + work):
            assert (dependent(first, "griddepcontrol.wait;" + COPY, seed) == 500).all()
            assert (dependent(first, "griddepcontrol.wait;" + COPY.replace(".global", ".global.nc"), seed) == 500).all()
        early |= set(dependent("griddepcontrol.launch_dependents;" + work, COPY, seed).tolist())
    assert 0 in early, "without the wait, the secondary never ran ahead"


@silicon_too
def test_without_the_attribute_they_do_nothing() -> None:
    assert run("griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 %d, 3;").tolist() == [3] * 32


def test_traps() -> None:
    raises("setp.eq.u32 q, %t, 5; @q trap;", "lanes 0x20: .*: trap")
    raises("brkpt;", "lanes 0xffffffff: brkpt;: brkpt")


def test_a_jump_to_itself_is_a_deadlock() -> None:
    raises("L: bra L;", "a deadlock")


@silicon_too
def test_sleep_and_events_do_nothing_else() -> None:
    body = "nanosleep.u32 %t; nanosleep.u32 1000000; mov.u32 %a, 0xffffffff; nanosleep.u32 %a; pmevent 7; "
    assert run(body + "pmevent.mask 3; mov.u32 %d, 9;").tolist() == [9] * 32


FENCES = (
    [
        f"fence.{kind}.{scope};"
        for kind in ("sc", "acq_rel", "acquire", "release")
        for scope in ("cta", "cluster", "gpu", "sys")
    ]
    + [
        f"fence.proxy.{kind};"
        for kind in ("alias", "async", "async.global", "async.shared::cta", "async.shared::cluster")
    ]
    + [
        "fence.gpu;",
        "fence.mbarrier_init.release.cluster;",
        "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;",
        "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;",
        "fence.acquire.sync_restrict::shared::cluster.cluster;",
        "fence.release.sync_restrict::shared::cta.cluster;",
        "membar.cta;",
        "membar.gl;",
        "membar.sys;",
        "membar.proxy.alias;",
    ]
)


@silicon_too
def test_all_forms_of_fences() -> None:
    assert run("".join(FENCES) + "mov.u32 %d, 4;").tolist() == [4] * 32


@pytest.mark.parametrize(
    "text",
    [
        "fence.acq_rel;",
        "fence.acquire.sync_restrict::shared::cta.cluster;",
        "fence.proxy.async.local;",
        "fence.proxy.async::generic.acquire.sync_restrict::shared::cta.cluster;",
        "fence.mbarrier_init.release.gpu;",
        "fence.relaxed.gpu;",
        "membar.gpu;",
        "nanosleep.u64 5;",
        "griddepcontrol.sync;",
        "setmaxnreg.inc.sync.aligned.u32 %d;",
        "setmaxnreg.inc.aligned.u32 32;",
        "trap.now;",
    ],
)
def test_unknown_forms_are_refused_when_loaded(text: str) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match="does not know"):
        Machine().load(text_of(text))


PRINT = """@!p bra QUIET;
  mov.b32 %a, 0xfffffffb; st.local.b32 [list], %a; mov.b64 %f, 0d3ff8000000000000; st.local.b64 [list+8], %f;
  st.local.b64 [list+16], %f;
  mov.u64 %f, format; cvta.global.u64 %f, %f; mov.u64 %l, list; cvta.local.u64 %l, %l;
  {{ .param .b64 p0; .param .b64 p1; .param .b32 p2; st.param.b64 [p0], %f; st.param.b64 [p1], %l;
  call.uni (p2), vprintf, (p0, p1); }}
  QUIET:"""


def test_printf(capsys: pytest.CaptureFixture[str]) -> None:
    run(PRINT.format(), words=b"%d is %5.2f, %llx 100%%\n")
    assert capsys.readouterr().out == "-5 is  1.50, 3ff8000000000000 100%\n"
    run(PRINT.format(), words=b"%u|%+e|%-20lld|")
    assert capsys.readouterr().out == "4294967291|+1.500000e+00|4609434218613702656 |"


def test_assertions() -> None:
    body = """setp.ne.u32 q, %t, 3; @q bra FINE;
      mov.u64 %f, format; cvta.global.u64 %f, %f; mov.u32 %a, 42; mov.u64 %l, 1;
      {{ .param .b64 p0; .param .b64 p1; .param .b32 p2; .param .b64 p3; .param .b64 p4; st.param.b64 [p0], %f;
      st.param.b64 [p1], %f; st.param.b32 [p2], %a; st.param.b64 [p3], %f; st.param.b64 [p4], %l;
      call.uni __assertfail, (p0, p1, p2, p3, p4); }}
      FINE:""".replace("{{", "{").replace("}}", "}")
    from emulator import EmulationError

    with pytest.raises(EmulationError, match="x:42: x: assertion `x` failed in thread 3"):
        run(body, words=b"x")


HEAP = (
    """.param .b64 p0; .param .b64 p1; st.param.b64 [p0], {size}; call.uni (p1), malloc, (p0); ld.param.b64 %f, [p1];"""
)
FREE = ".param .b64 p2; st.param.b64 [p2], %f; call.uni free, (p2);"


def heap_text(body: str) -> str:
    functions = ".extern .func (.param .b64 r) malloc (.param .b64 n);\n.extern .func free (.param .b64 p);\n"
    return text_of(body).replace(".extern .func (.param .b32 result)", functions + ".extern .func (.param .b32 result)")


def run_heap(body: str) -> Values:
    from emulator import Machine

    a, out = np.zeros(64, np.uint32), np.zeros(32, np.uint32)
    Machine().load(heap_text(body))["kernel"].launch(1, 32, args=[a, out])
    return out


def test_malloc_and_free() -> None:
    # Each thread has memory of its own.
    store = "st.b32 [%f+96], %t; bar.sync 0; ld.b32 %d, [%f+96];"
    assert run_heap(HEAP.format(size="100") + store + FREE).tolist() == list(range(32))
    for size in ("0", "0x100000000"):
        assert (
            run_heap(HEAP.format(size=size) + "setp.eq.u64 q, %f, 0; selp.u32 %d, 1, 0, q;" + FREE).tolist() == [1] * 32
        )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (HEAP.format(size="100") + "st.b32 [%f+100], %t;", "out of bounds"),
        (HEAP.format(size="100") + FREE + "st.b32 [%f], %t;", "out of bounds"),
        ("mov.u64 %f, %x;" + FREE, "free of what malloc has not given"),
        (HEAP.format(size="100") + FREE + "{" + FREE + "}", "free of what malloc has not given"),
    ],
)
def test_heap_errors(body: str, words: str) -> None:
    from emulator import EmulationError

    with pytest.raises(EmulationError, match=words):
        run_heap(body)
