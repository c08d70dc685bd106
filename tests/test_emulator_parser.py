"""What the emulator's parser makes of PTX: each form of the syntax, and what it says of text that is no PTX."""

from __future__ import annotations

import ast
import contextlib
import itertools
import operator
import random
import re
import struct
from collections.abc import Callable

import pytest
from backends import backend_params

pytestmark = backend_params(["emulator"])[0].marks

HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = ".reg .pred %p<4>; .reg .b32 %r<8>; .reg .f32 %f<4>; .reg .b64 %d<8>; .reg .f64 %e<4>;"


def describe(text: str) -> list[str]:
    from emulator.build import native

    return str(native().describe(text)).splitlines()


def module(text: str) -> list[str]:
    return describe(HEADER + text)


def entry(body: str, before: str = "", parameters: str = "") -> list[str]:
    return module(f"{before}\n.visible .entry kernel({parameters}) {{ {REGISTERS} {body} }}")


def operands(body: str, before: str = "") -> list[str]:
    """The instructions of a kernel, all but the ``ret`` that the parser adds."""
    lines = entry(body, before)
    kernel = itertools.dropwhile(lambda line: not line.startswith("entry kernel"), lines)
    own = itertools.takewhile(lambda line: line.startswith("  "), itertools.islice(kernel, 1, None))
    found = [re.match(r"  \d+: line \d+(?: source \S+)?: (.*)", line) for line in own]
    return [m[1] for m in found if m][:-1]


def variables(text: str) -> dict[str, str]:
    """Of module-level variables: the description by the name, relocations on lines of their own."""
    found, last = {}, ""
    for line in module(text):
        if line.startswith("variable "):
            last = line.split()[1]
            found[last] = line.partition(f"{last} ")[2]
        elif line.startswith("  at ") and last:
            found[last] += "\n" + line.strip()
    return found


OPERANDS = [
    # Registers in the order of REGISTERS: %p0 is 0, %r0 is 4, %f0 is 12, %d0 is 16, %e0 is 24.
    ("add.s32 %r1, %r2, -3;", "add.s32 #5, #6, -3"),
    ("mov.u32 %r0, 0xFFFFFFFFU;", "mov.u32 #4, 4294967295"),
    ("mov.u32 %r0, 0777;", "mov.u32 #4, 511"),
    ("mov.u32 %r0, 0b101U;", "mov.u32 #4, 5"),
    ("mov.u32 %r0, 0;", "mov.u32 #4, 0"),
    ("mov.u32 %r0, WARP_SZ;", "mov.u32 #4, 32"),
    ("mov.u32 %r0, (4*8+2);", "mov.u32 #4, 34"),
    ("mov.u32 %r0, 4*8+2;", "mov.u32 #4, 34"),
    ("mov.u32 %r0, !5;", "mov.u32 #4, 0"),
    ("mov.f32 %f0, 0f3F800000;", "mov.f32 #12, f32:3f800000"),
    ("mov.f32 %f0, 1.5;", "mov.f32 #12, f32:3fc00000"),
    ("mov.f32 %f0, -1.5e-3;", f"mov.f32 #12, f32:{struct.pack('>f', -1.5e-3).hex()}"),
    ("mov.f32 %f0, 1e5;", f"mov.f32 #12, f32:{struct.pack('>f', 1e5).hex()}"),
    ("mov.f32 %f0, .5;", "mov.f32 #12, f32:3f000000"),
    ("mov.f32 %f0, 0d3FF0000000000000;", "mov.f32 #12, f32:3f800000"),
    ("mov.f64 %e0, 0f3F800000;", "mov.f64 #24, f64:3ff0000000000000"),
    ("mov.f64 %e0, 0D3FF8000000000000;", "mov.f64 #24, f64:3ff8000000000000"),
    ("mov.f64 %e0, 1.0+0.5*3.0;", "mov.f64 #24, f64:4004000000000000"),
    ("mov.b32 %r0, 0f7fc00001;", "mov.b32 #4, f32:7fc00001"),
    ("mov.b64 %d0, {0f3f800000, 2};", "mov.b64 #16, {f32:3f800000, 2}"),
    ("cvt.rn.f16.f32 %h, 1.0;", "cvt.rn.f16.f32 #28, f32:3f800000"),
    ("st.global.v2.f32 [%d0], {1.0, %f0};", "st.global.v2.f32 [#16], {f32:3f800000, #12}"),
    ("ld.global.u32 %r0, [%d0];", "ld.global.u32 #4, [#16]"),
    ("ld.global.u32 %r0, [%d0+8];", "ld.global.u32 #4, [#16+8]"),
    ("ld.global.u32 %r0, [%d0+-8];", "ld.global.u32 #4, [#16-8]"),
    ("ld.global.u32 %r0, [ %d0 + 4 + 4*2 ];", "ld.global.u32 #4, [#16+12]"),
    ("ld.local.u32 %r0, [16];", "ld.local.u32 #4, [16]"),
    ("ld.global.v2.u32 {%r0,_}, [%d0];", "ld.global.v2.u32 {#4, _}, [#16]"),
    ("mov.u32 %r0, %tid.x;", "mov.u32 #4, %tid.x"),
    ("mov.u64 %d0, %clock64;", "mov.u64 #16, %clock64"),
    ("setp.eq.s32 %p1|%p2, %r0, %r1;", "setp.eq.s32 #1|#2, #4, #5"),
    ("setp.eq.s32 _|%p2, %r0, %r1;", "setp.eq.s32 _|#2, #4, #5"),
    ("setp.ge.and.s32 %p1, %r0, 1, !%p2;", "setp.ge.and.s32 #1, #4, 1, !#2"),
    ("@%p1 mov.u32 %r0, 1;", "@#1 mov.u32 #4, 1"),
    ("@!%p1 mov.u32 %r0, 1;", "@!#1 mov.u32 #4, 1"),
    ("@ ! %p1 mov.u32\n%r0 // to here\n, /* a\n */ 1\n;", "@!#1 mov.u32 #4, 1"),
    ("bar.sync %r0, WARP_SZ*2;", "bar.sync #4, 64"),
    (
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile [%r0], [%d0, {%r1, 3}], [%r2+8], %h, %d1;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile [#4], [#16, #5, 3], [#6+8], #28, #17",
    ),
    ("tex.2d [%d0, {%r1, %r2}, {%r3}];", "tex.2d [#16, #5, #6, {#7}]"),
    ("fence;", "fence"),
]


@pytest.mark.parametrize(("body", "expected"), OPERANDS, ids=[o[0] for o in OPERANDS])
def test_operands(body: str, expected: str) -> None:
    assert operands(f".reg .b16 %h; {body}") == [expected]


def test_several_instructions_on_one_line_and_registers_behind_instructions() -> None:
    got = operands("mov.u32 %r0, 1; mov.u32 %r1, 2; .reg .b32 late; mov.u32 late, 3; // mov.u32 %r2, 4;\n")
    assert got == ["mov.u32 #4, 1", "mov.u32 #5, 2", "mov.u32 #28, 3"]


def test_register_types_and_names() -> None:
    types = ["pred", "b8", "u8", "s16", "f16", "f16x2", "b32", "f32", "b64", "f64", "b128"]
    text = " ".join(f".reg .{t} a_{t}, b_{t}<2>;" for t in types)
    got = [line.split()[2:] for line in module(f".entry k() {{ {text} }}") if line.startswith("  register")]
    assert got == [[name.format(t), f".{t}"] for t in types for name in ("a_{}", "b_{}0", "b_{}1")]


def test_vector_registers() -> None:
    declared = ".reg .v4 .f32 %v; .reg .v2 .b32 %w<2>;"  # registers 28..31, then 32, 33 and 34, 35
    got = operands(f"{declared} ld.global.v4.f32 %v, [%d0]; add.f32 %f0, %v.x, %v.a; mov.b32 %w1.y, %w0.r;")
    assert got == ["ld.global.v4.f32 {#28, #29, #30, #31}, [#16]", "add.f32 #12, #28, #31", "mov.b32 #35, #32"]


def test_scopes() -> None:
    got = operands("""
      mov.u32 %r0, 1;
      { .reg .b32 %r0; mov.u32 %r0, 2; { .reg .b32 %r0; mov.u32 %r0, 3; } mov.u32 %r0, 4; }
      mov.u32 %r0, 5;""")
    assert got == [f"mov.u32 #{register}, {i}" for register, i in ((4, 1), (28, 2), (29, 3), (28, 4), (4, 5))]


def test_labels() -> None:
    """The innermost one counts; sibling scopes use a name again; one may stand behind the last instruction."""
    got = operands("""
      bra DONE;
      { bra DONE; @%p0 bra $L__BB0_1; DONE: }
      { DONE: bra DONE; }
      $L__BB0_1: bra.uni DONE;
      L2: L3: bra L2;
      DONE:""")
    assert got == ["bra ->6", "bra ->3", "@#0 bra ->4", "bra ->3", "bra.uni ->6", "bra ->5"]


def test_branch_targets() -> None:
    got = operands("T: .branchtargets A, B, A; brx.idx %r0, T; A: mov.u32 %r0, 1; { brx.idx.uni %r0, T; A: } B:")
    assert got == ["brx.idx #4, {->1, ->3, ->1}", "mov.u32 #4, 1", "brx.idx.uni #4, {->1, ->3, ->1}"]


def test_every_body_ends_with_ret() -> None:
    lines = entry("bra END; END:")
    assert [line.strip() for line in lines[-2:]] == ["0: line 5: bra ->1", "1: line 5: ret"]


def test_source_lines() -> None:
    text = f"""{HEADER}.entry k() {{
      .reg .b32 %r;
      mov.u32 %r, 1;
      .loc 2 40 7
      mov.u32 %r, 2;
      .loc 1 8 9, function_name $L__info_string0+4, inlined_at 2 40 7
      mov.u32 %r, 3;
      .loc 9 5 0
      mov.u32 %r, 4;
    }}
    .func f() {{ trap; }}
    .file 1 "/src/a.cuh", 12, 34
    .file 2 "/src/b cd.cu"
    .section .debug_str {{ $L__info_string0: .b8 102,105,0 {{ .b64 $L__info_string0+4 }} .b32 A-B }}
    .pragma "nounroll";
    """
    lines = describe(text)
    assert lines[1:3] == ["file 0 /src/a.cuh", "file 1 /src/b cd.cu"]
    moves = [line.partition(": mov")[0].partition(": ")[2] for line in lines if " mov" in line]
    assert moves == ["line 6", "line 8 source 1:40", "line 10 source 0:8", "line 12 source -1:5"]
    assert "  0: line 14: trap" in lines  # a function does not go on from the one before


def test_directives() -> None:
    lines = module("""
      .visible .entry k() .maxntid 128, 2,1 .minnctapersm 1 .pragma "nounroll"; .explicitcluster
        .reqnctapercluster 2 .maxclusterrank 8 .blocksareclusters .maxnreg 40 { ret; }
      .weak .entry l .reqntid 64 { ret; }
      .visible .func f() .noreturn { trap; }
      .func g() .abi_preserve 3 { ret; }""")
    got = {line.strip() for line in lines if "directive" in line}
    assert got == {
        "directive maxntid 128 2 1",
        "directive minnctapersm 1",
        "directive explicitcluster",
        "directive reqnctapercluster 2",
        "directive maxclusterrank 8",
        "directive blocksareclusters",
        "directive maxnreg 40",
        "directive reqntid 64",
        "directive noreturn",
        "directive abi_preserve 3",
    }


def test_parameters() -> None:
    lines = entry(
        "ld.param.b32 %r0, [b+4];",
        parameters=".param .u8 a, .param .u32 b[2], .param .u64 .ptr .global .align 16 c, .param .align 64 .b8 m[128]",
    )
    assert [line.strip() for line in lines if "parameter" in line] == [
        "parameter a .param .u8 align 1 bytes 1 offset 0",
        "parameter b .param .u32 align 4 bytes 8 offset 4",
        "parameter c .param .u64 align 8 bytes 8 offset 16",
        "parameter m .param .b8 align 64 bytes 128 offset 64",
    ]
    assert any("param 192 local 0" in line for line in lines)
    assert any("ld.param.b32 #4, [b@param4+4]" in line for line in lines)


def test_initial_numbers() -> None:
    got = variables("""
      .visible .global .align 4 .u32 one = 1;
      .global .align 1 .b8 bytes[5] = {104, 0x69, 0};
      .const .align 8 .s64 negative[2] = {-2, 0xFFFFFFFFFFFFFFFF};
      .global .f32 floats[] = {1.5, 0f40000000, -1e1, 0d3FF0000000000000};
      .global .f64 doubles[2] = {1.5, 0f40000000};
      .global .b32 bits = 0fffffffff;
      .weak .global .align 4 .b32 table[][3] = {{1, 2}, {3}, {}};
      .global .v2 .u16 pairs[2] = {{1, 2}, {3, 4}};
      .global .u32 sum = (1 << 4) | 3, more, none[2] = {};
      .common .global .align 16 .b8 plain[2][3][4];""")
    assert got == {
        "one": ".global .u32 align 4 bytes 4 offset 0 = 01000000",
        "bytes": ".global .b8 align 1 bytes 5 offset 0 = 686900",
        "negative": ".const .s64 align 8 bytes 16 offset 0 = feffffffffffffff" + "ff" * 8,
        "floats": ".global .f32 align 4 bytes 16 offset 0 = " + struct.pack("<4f", 1.5, 2, -10, 1).hex(),
        "doubles": ".global .f64 align 8 bytes 16 offset 0 = " + struct.pack("<2d", 1.5, 2).hex(),
        "bits": ".global .b32 align 4 bytes 4 offset 0 = ffffffff",
        "table": ".global .b32 align 4 bytes 24 offset 0 = " + struct.pack("<4I", 1, 2, 0, 3).hex(),
        "pairs": ".global .u16 align 4 bytes 8 offset 0 = 0100020003000400",
        "sum": ".global .u32 align 4 bytes 4 offset 0 = 13000000",
        "more": ".global .u32 align 4 bytes 4 offset 0",
        "none": ".global .u32 align 4 bytes 8 offset 0",
        "plain": ".global .b8 align 16 bytes 24 offset 0",
    }


def test_initial_addresses() -> None:
    got = variables("""
      .global .b32 x[4];
      .const .b32 c = 3;
      .func f() { ret; }
      .func g() { ret; }
      .global .u64 a = x, b = x+4, d = generic(x)+8, e = x+4+4*2;
      .const .u64 constant = generic(c);
      .global .align 8 .u64 ops[3] = {f, 7, g};
      .global .u8 tight[5] = {3, 0XFF(generic(x)), 0xFF00(generic(x)), 0xFF0000(x+4)};""")
    assert got["a"].splitlines()[1:] == ["at 0 bytes 8 shift 0 variable x"]
    assert got["b"].splitlines()[1:] == ["at 0 bytes 8 shift 0 variable x+4"]
    assert got["d"].splitlines()[1:] == ["at 0 bytes 8 shift 0 generic x+8"]
    assert got["e"].splitlines()[1:] == ["at 0 bytes 8 shift 0 variable x+12"]
    assert got["constant"].splitlines()[1:] == ["at 0 bytes 8 shift 0 generic c"]
    assert got["ops"].splitlines()[1:] == ["at 0 bytes 8 shift 0 function f", "at 16 bytes 8 shift 0 function g"]
    assert "= 0000000000000000070000000000000000" in got["ops"]
    assert got["tight"].splitlines()[1:] == [
        "at 1 bytes 1 shift 0 generic x",
        "at 2 bytes 1 shift 8 generic x",
        "at 3 bytes 1 shift 16 variable x+4",
    ]


def test_extern_variables() -> None:
    got = variables(".extern .global .b32 x[]; .visible .global .b32 x[2] = {1, 2}; .extern .global .b32 x[2];")
    assert got == {"x": ".global .b32 align 4 bytes 8 offset 0 = 0100000002000000"}
    assert variables(".extern .global .b32 unused;") == {"unused": ".global .b32 align 4 bytes 4 offset 0 extern"}


def test_variables_in_functions() -> None:
    lines = entry("""
      .local .align 16 .b8 frame[20]; .local .b64 more;
      .shared .align 4 .b8 tile[12];
      .global .b32 counter = 5;
      st.local.b32 [frame+4], %r0; mov.u64 %d0, more; st.shared.b32 [tile+8], %r0; ld.global.b32 %r0, [counter];""")
    text = "\n".join(lines)
    assert "variable counter .global .b32 align 4 bytes 4 offset 0 = 05000000" in lines
    assert "  variable more .local .b64 align 8 bytes 8 offset 24" in lines
    assert "param 0 local 32 shared 12" in text
    for access in ("[frame@local0+4]", "more@local24", "[tile@shared0+8]", "[counter@global0]"):
        assert access in text


def test_shared_memory_is_laid_out_for_each_kernel() -> None:
    """Kernels share what device functions use; nobody pays for what only another kernel names."""
    lines = module("""
      .shared .align 4 .b8 both[8];
      .shared .align 4 .b8 unused[300000];
      .shared .align 16 .b8 only_b[200000];
      .extern .shared .align 128 .b8 dynamic[];
      .func helper() { .shared .b32 own; .reg .b32 r; ld.shared.b32 r, [own]; ld.shared.b32 r, [dynamic]; ret; }
      .func leaf() { .shared .b64 lonely; .reg .b32 r; ld.shared.b32 r, [both]; ret; }
      .entry a() { .shared .align 4 .b8 mine[100]; call helper; call leaf; ret; }
      .entry b() { .reg .b32 r; ld.shared.b32 r, [only_b]; call leaf; ret; }
      .entry c() { .reg .b32 r; ld.shared.b32 r, [dynamic]; ret; }
      .entry d() { call helper; ret; }""")
    shared = {line.split()[1]: int(line.split()[-1]) for line in lines if line.startswith("entry")}
    places = {line.split()[1]: line for line in lines if " .shared " in line}
    offset = {name: int(re.findall(r"offset (\d+)", line)[0]) for name, line in places.items()}
    # both, lonely and only_b never meet unused; a has both, own, lonely and mine.
    assert offset["both"] == 0
    assert offset["only_b"] == 16
    assert offset["lonely"] == 200016
    assert offset["own"] == 8
    assert offset["mine"] == 200024
    assert shared == {"a": 200192, "b": 200024, "c": 0, "d": 200192}
    dynamic = [int(re.findall(r"offset (\d+)", line)[0]) for line in lines if "  variable dynamic" in line]
    assert dynamic == [0, 200192]  # of c, of helper


CALLEES = """
  .func plain() { ret; }
  .func (.param .b32 out) one(.param .b32 in) { ret; }
  .func wide(.param .align 8 .b8 in[24], .param .f32 factor) { ret; }
  .func (.reg .b32 out) registers(.reg .b32 a, .reg .b64 b) { mov.b32 out, a; ret; }
  .extern .func (.param .b32 out) vprintf(.param .b64 a, .param .b64 b);
  .extern .func unused(.param .b64 a);
"""


def test_calls() -> None:
    got = operands(
        """
        call plain;
        call.uni (%r0), one, (%r1);
        call (_), one, (5);
        { .param .b32 argument, result; st.param.b32 [argument], %r1; call.uni (result), one, (argument);
          ld.param.b32 %r0, [result]; }
        { .param .align 8 .b8 argument[24]; .param .f32 factor; call wide, (argument, factor); }
        { .param .align 8 .b8 argument[24]; call wide, (argument, 1.5); }
        call (%r0), registers, (%r1, %d0);
        call (%r0), vprintf, (%d0, %d1);
        """,
        CALLEES,
    )
    assert got == [
        "call {}, plain, {}",
        "call.uni {#4}, one, {#5}",
        "call {_}, one, {5}",
        "st.param.b32 [argument@param0], #5",
        "call.uni {result@param4}, one, {argument@param0}",
        "ld.param.b32 #4, [result@param4]",
        "call {}, wide, {argument@param8, factor@param32}",
        "call {}, wide, {argument@param40, f32:3fc00000}",
        "call {#4}, registers, {#5, #16}",
        "call {#4}, vprintf, {#16, #17}",
    ]


def test_frames() -> None:
    lines = module(CALLEES + ".func (.param .b64 o) f(.param .b8 a, .param .b32 b) { { .param .b16 c; } ret; }")
    assert "function f line 11 results 1 param 18 local 0 shared 0" in lines
    own = lines[lines.index("function f line 11 results 1 param 18 local 0 shared 0") + 1 :][:4]
    assert own == [
        "  parameter o .param .b64 align 8 bytes 8 offset 0",
        "  parameter a .param .b8 align 1 bytes 1 offset 8",
        "  parameter b .param .b32 align 4 bytes 4 offset 12",
        "  variable c .param .b16 align 2 bytes 2 offset 16",
    ]
    assert "  parameter b .param .b64 align 8 bytes 8 offset 8 register 2" in lines
    assert "function vprintf declared line 9 results 1 param 24 local 0 shared 0" in lines


def test_calls_by_address() -> None:
    got = operands(
        """
        mov.u64 %d0, one;
        P : .callprototype (.param .b32 _) _ (.param .b32 _);
        call (%r0), %d0, (%r1), P;
        T: .calltargets one;
        call (%r0), %d0, (%r1), T;
        Q: .callprototype ()_() .noreturn;
        call %d0, Q;
        R: .callprototype _;
        call %d0, R;
        call (%r0), %d0, (%r1), table;
        """,
        CALLEES + ".global .u64 table[2] = {0, one};",
    )
    assert got == [
        "mov.u64 #16, one",
        "call {#4}, #16, {#5}",
        "call {#4}, #16, {#5}",
        "call {}, #16, {}",
        "call {}, #16, {}",
        "call {#4}, #16, {#5}",
    ]


def test_alias_and_recursion() -> None:
    lines = module("""
      .func (.param .b32 r) fact(.param .b32 n);
      .func (.param .b32 r) alias_of_fact(.param .b32 n);
      .func (.param .b32 r) fact(.param .b32 n) { .reg .b32 x; call (x), fact, (x); call (x), alias_of_fact, (x); ret; }
      .alias alias_of_fact, fact;
      .entry k() { .reg .b32 x; call (x), alias_of_fact, (1); }""")
    calls = [line.split(": ")[2] for line in lines if "call" in line]
    assert calls == ["call {#0}, fact, {#0}", "call {#0}, fact, {#0}", "call {#0}, fact, {1}"]
    assert not any(line.startswith("function alias_of_fact") for line in lines)


def wrap(value: int, signed: bool = True) -> int:
    value %= 1 << 64
    return value - (1 << 64) if signed and value >> 63 else value


def test_constant_expressions() -> None:
    """Corners as ptxas evaluates them."""
    cases = {
        "-7 % 3": 0,  # of unsigned numbers
        "7 % -3": 7,
        "-7 / 2": -3,
        "(1<<63) >> 63": -1,
        "(.u64)(1<<63) >> 63": 1,
        "0x8000000000000000 >> 63": 1,
        "-1 > 0xFFFFFFFFFFFFFFFF": 0,
        "-1 < 0U": 0,
        "-1 / 2U": 0x7FFFFFFFFFFFFFFF,
        "(-1 & -1) > 0": 0,
        "(5 % 3) - 3 < 0": 0,
        "(1<2) - 2 < 0": 1,
        "!0 - 2 < 0": 1,
        "(0 ? 1U : -1) < 0": 1,
        "(1 ? -1 : 1U) < 0": 1,
        "~0 < 0": 0,
        "-(1U) < 0": 0,
        "(.s64)0xFFFFFFFFFFFFFFFF < 0": 1,
        "1 ? 2 : 0 ? 3 : 4": 2,
        "0 ? 2 : 0 ? 3 : 4": 4,
        "1 + 2 * 3 - 4 / 2 << 1 | 64": (5 << 1) | 64,
        "1.5 > 1.0": 1,
        "1.0 == 2.0": 0,
        "(-0x7FFFFFFFFFFFFFFF - 1) / -1": -(1 << 63),
    }
    body = "".join(f"mov.u64 %d0, {text};\n" for text in cases)
    assert [int(line.split(", ")[1]) for line in operands(body)] == list(cases.values())


def test_random_constant_expressions() -> None:
    """Against Python's integers, which have the same precedences where PTX has Python's operators."""
    rng = random.Random(3)
    apply: dict[str, Callable[[int, int], int]] = {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
        "&": operator.and_,
        "|": operator.or_,
        "^": operator.xor,
    }

    def expression(depth: int) -> tuple[str, int]:
        if depth == 0 or rng.random() < 0.2:
            value = rng.choice([0, 1, 31, rng.randrange(1 << 62)])
            return rng.choice([str(value), hex(value), f"0{value:o}"]), value
        if rng.random() < 0.2:
            text, value = expression(depth - 1)
            return f"-({text})", wrap(-value)
        (left, a), (right, b) = expression(depth - 1), expression(depth - 1)
        symbol = rng.choice(list(apply))
        return f"(({left}) {symbol} ({right}))", wrap(apply[symbol](a, b))

    cases = [expression(5) for _ in range(200)]
    body = "".join(f"mov.u64 %d0, {text};\n" for text, _ in cases)
    assert [int(line.split(", ")[1]) for line in operands(body)] == [value for _, value in cases]


def stays_within_64_bits(text: str) -> bool:
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.BinOp):
            shift = eval(ast.unparse(node.right)) if isinstance(node.op, (ast.LShift, ast.RShift)) else 0
            if not 0 <= shift < 64 or abs(eval(ast.unparse(node))) >= 1 << 63:
                return False
    return True


def test_precedence_is_that_of_c() -> None:
    """Chains without parentheses; the operators here have the same precedences in Python."""
    rng = random.Random(4)
    cases: list[str] = []
    while len(cases) < 200:
        text = str(rng.randrange(1, 1000))
        for _ in range(6):
            text += f" {rng.choice(['+', '-', '*', '&', '|', '^', '<<', '>>'])} {rng.randrange(60)}"
        with contextlib.suppress(ValueError):  # a negative count
            cases += [text] * stays_within_64_bits(text)
    body = "".join(f"mov.u64 %d0, {text};\n" for text in cases)
    assert [int(line.split(", ")[1]) for line in operands(body)] == [eval(text) for text in cases]
