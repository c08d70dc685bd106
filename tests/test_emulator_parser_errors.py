"""What the emulator's parser says of text that is no PTX: always an EmulationError with the line and its text."""

from __future__ import annotations

import pytest
from backends import backend_params
from test_emulator_parser import CALLEES, HEADER, REGISTERS, describe

pytestmark = backend_params(["emulator"])[0].marks


def error(text: str) -> str:
    from emulator import EmulationError

    with pytest.raises(EmulationError) as caught:
        describe(text)
    return str(caught.value)


MALFORMED = [
    # The module.
    ("", "expected .version before the end of the text"),
    (".version 8.0", "expected .target before the end"),
    (".version 8.0 .target sm_90a .address_size 32", "only addresses of 64 bits"),
    (HEADER + ".bogus x;", "line 4: unknown at module level, .bogus: .bogus x;"),
    (HEADER + "add.s32 a, b, c;", "unknown at module level, add.s32"),
    (HEADER + "/* never closed", "comment without an end"),
    (HEADER + '.file 1 "never closed\n', "string without an end"),
    (HEADER + '.file 1 "a" .file 1 "b"', "a file of this number was declared before"),
    (HEADER + ".section .debug_str { { }", "expected } before the end"),
    (HEADER + ".pragma nounroll;", "expected a string before nounroll"),
    (HEADER + ".visible .visible .entry k() { ret; }", "unknown at module level, .visible"),
    (HEADER + "\u00e9", "character '\\xc3' has no meaning here: \\xc3\\xa9"),
    (HEADER + "\0", "character '\\x00' has no meaning here"),
    (HEADER + "\n\n` " + "x" * 1000, "line 6: character '`' has no meaning here: ` " + "x" * 198 + "..."),
    # Functions.
    (HEADER + ".entry k() {", "expected } before the end"),
    (HEADER + ".entry k() { ret }", "expected an operand before }"),
    (HEADER + ".entry k() {{ } ret;", "expected } before the end"),
    (HEADER + ".entry k(.param .b32 a,) { }", "expected .param before )"),
    (HEADER + ".entry k(.param .b32 a, .param .b32 a) { }", "a is declared twice"),
    (HEADER + ".entry k(.reg .b32 a) { }", "expected .param before .reg"),
    (HEADER + ".entry k(.param .b8 a[]) { }", "an array without a size"),
    (HEADER + ".entry k(.param .b8 a[40000]) { }", "line 4: k, parameters: 40000 bytes, but the most is 32764"),
    (HEADER + ".entry k() { ret; } .entry k() { ret; }", "k is defined twice"),
    (HEADER + ".func f(.param .b32 a); .func f(.param .b64 a) { ret; }", "f was declared with other parameters"),
    (HEADER + ".func f(); .entry k() { call f; }", "function f has no body"),
    (HEADER + ".func f(); .global .u64 table = f;", "function f has no body"),
    (HEADER + ".extern .func f() { ret; }", "expected ; before {"),
    (HEADER + ".func f(.reg .v2 .b32 a) { ret; }", "a parameter in a register must be one number"),
    (HEADER + ".entry k() .maxntid 0 { }", "expected a positive number"),
    (HEADER + ".entry k() .maxntid { }", "bad number {"),
    (HEADER + ".entry k() .minnctapersm 1, 2 { }", "expected { before ,"),
    (HEADER + ".entry k() .explicitcluster 3 { }", "expected { before 3"),
    (HEADER + ".entry k() .noreturn { }", "unknown directive .noreturn"),
    (HEADER + ".func f() .maxntid 3 { }", "unknown directive .maxntid"),
    (HEADER + ".alias f, g;", "an alias of a function that is not declared"),
    (HEADER + ".func f(); .func g(); .alias f, g;", "an alias needs a declared function and a defined one"),
    (HEADER + ".entry k() {" + "{" * 300 + "}" * 300 + "}", "scopes nested too deep"),
    (HEADER + ".entry k() { .local .b8 a[600000]; }", "k, .local variables: 600000 bytes, but the most is 524288"),
    (HEADER + ".entry k() { .shared .b8 a[300000]; }", "k, .shared variables: 300000 bytes, but the most is 232448"),
    (HEADER + ".entry k() { .param .b8 a[2000000]; }", "k, .param variables: 2000000 bytes"),
    # Variables.
    (HEADER + ".global .b32 x; .global .b32 x;", "x is declared twice"),
    (HEADER + ".global x;", "expected a type before x"),
    (HEADER + ".global .v3 .b32 x;", "unknown attribute of a variable .v3"),
    (HEADER + ".global .pred x;", "unknown attribute of a variable .pred"),
    (HEADER + ".global .bf16 x;", "unknown attribute of a variable .bf16"),
    (HEADER + ".global .align 3 .b32 x;", "an alignment must be a power of two"),
    (HEADER + ".global .align 0 .b32 x;", "an alignment must be a power of two"),
    (HEADER + ".global .align 99999999 .b32 x;", "bad number 99999999"),
    (HEADER + ".global .b32 x[];", "an array without a size"),
    (HEADER + ".global .b32 x[0];", "an array without a size"),
    (HEADER + ".global .b32 x[2][] = {};", "bad number ]"),
    (HEADER + ".global .b32 x[2][0];", "an array without a size"),
    (HEADER + ".global .b32 x[4294967295][4294967295][4294967295];", "too large an array"),
    (HEADER + ".global .b32 x" + "[1]" * 9 + ";", "an array of too many dimensions"),
    (HEADER + ".global .b8 x[2000000000];", ".global variables of the module: 2000000000 bytes"),
    (HEADER + ".global .b8 x[2][1000000000] = {{}, {1}};", "more bytes of initial values than the emulator takes"),
    (HEADER + ".const .b8 x[65537];", ".const variables of the module: 65537 bytes, but the most is 65536"),
    (HEADER + ".global .b32 x[2] = {1, 2, 3};", "too many initial values"),
    (HEADER + ".global .b32 x[2][3] = {1, 2};", "expected { before 1"),
    (HEADER + ".global .b32 x[3] = {1, 2,};", "expected a number before }"),
    (HEADER + '.global .b8 x[6] = "hello";', "a string is no initial value: its bytes are"),
    (HEADER + ".global .u8 x = 256;", "initial value too large for .u8"),
    (HEADER + ".global .u8 x = -129;", "initial value too large for .u8"),
    (HEADER + ".global .b32 x = 0x100000000;", "initial value too large for .b32"),
    (HEADER + ".global .f32 x = 1;", "expected a floating-point number"),
    (HEADER + ".global .u32 x = 1.5;", "a floating-point literal has no place in type .u32"),
    (HEADER + ".global .f16 x = 1.5;", "a variable of type .f16 takes no initial value"),
    (HEADER + ".global .b32 x = y;", "an address needs a variable of type .u64"),
    (HEADER + ".global .u64 x = y;", "y has no address"),
    (HEADER + ".global .u64 x = x;", "x has no address"),
    (HEADER + ".shared .b32 s; .global .u64 x = s;", "s is in shared memory"),
    (HEADER + ".global .b32 y; .global .u8 x = y;", "and .u8 if it is masked"),
    (HEADER + ".global .b32 y; .global .u8 x = 0x1ff(y);", "a mask must be one byte"),
    (HEADER + ".global .b32 y; .global .u8 x = 0xff0(y);", "a mask must be one byte"),
    (HEADER + ".global .b32 y; .global .u8 x = 0(y);", "a mask must be one byte"),
    (HEADER + ".func f() { ret; } .global .u64 x = generic(f);", "f has no address"),
    (HEADER + ".extern .global .b32 y; .global .u64 x = y;", "extern variable y is not defined"),
    (HEADER + ".extern .global .b32 y; .visible .global .b64 y;", "y was declared otherwise"),
]
# Of the body of a kernel; the error is on its line 5.
BAD_BODIES = [
    (";", "unknown in a function, ;"),
    (".bogus 3;", "unknown in a function, .bogus"),
    ("Add.s32 %r0, 1, 2;", "expected an opcode, not Add.s32"),
    ("mov.u32 %r0, 1", "expected ; before }"),
    ("mov.u32 %r0 1;", "expected ; before 1"),
    ("mov.u32 %r0, ;", "expected an operand before ;"),
    ("mov.u32 %r8, 1;", "undeclared register %r8"),
    ("mov.u32 %r0, x;", "undeclared symbol x"),
    ("mov.u32 %r0, %tid.q;", "undeclared register %tid.q"),
    ("mov.u32 %r0, 089;", "bad number 089"),
    ("mov.u32 %r0, 0x;", "bad number 0x"),
    ("mov.u32 %r0, 5u;", "bad number 5u"),
    ("mov.u32 %r0, 18446744073709551616;", "bad number 18446744073709551616"),
    ("mov.f32 %f0, 0f3f8;", "bad number 0f3f8"),
    ("mov.f32 %f0, 1.2.3;", "bad number 1.2.3"),
    ("mov.b32 %r0, 1.5;", "a floating-point literal has no place in type .b32"),
    ("mov.b32 %r0, 0d3ff0000000000000;", "a floating-point literal has no place in type .b32"),
    ("add.s32 %r0, %r0, 0f3f800000;", "a floating-point literal has no place in type .s32"),
    ("add %r0, %r0, 1.5;", "a floating-point literal has no place in type ."),
    ("mov.u32 %r0, 7 / 0;", "division by zero"),
    ("mov.u32 %r0, 7 % 0;", "division by zero"),
    ("mov.u32 %r0, 1 << 64;", "shift by 64 bits or more"),
    ("mov.u32 %r0, 1 + 1.0;", "no operands for +"),
    ("mov.f32 %f0, 0f3f800000 + 1.0;", "no operands for +"),
    ("mov.f32 %f0, -0f3f800000;", "no operand for -"),
    ("mov.f32 %f0, 1.0 ? 1.0 : 2.0;", "the condition before ? must be an integer"),
    ("mov.f32 %f0, 1.0 | 2.0;", "no floating-point operands for |"),
    ("mov.u32 %r0, (.s64)1.0;", "only an integer can be cast"),
    ("mov.u32 %r0, (1;", "expected ) before ;"),
    ("mov.u32 %r0, " + "(" * 200 + "1" + ")" * 200 + ";", "constant expression too deep"),
    ("mov.u32 %r0, " + "-" * 200 + "1;", "constant expression too deep"),
    ("mov.u32 %r0, " + "1?" * 200 + "1;", "constant expression too deep"),
    ("add.s32 %r0, -%r1, 3;", "expected a number before %r1"),
    ("mov.u32 !x, 1;", "undeclared symbol x"),
    ("mov.u32 %r0, !_;", "undeclared symbol _"),
    ("mov.u32 %r0, {%r1, {%r2}};", "expected a register, a symbol or a number"),
    ("mov.u32 %r0, {%r1, [%d0]};", "expected a register, a symbol or a number"),
    ("mov.u32 %r0, {%r1;", "expected } before ;"),
    ("mov.u32 %r0, {};", "expected an operand before }"),
    ("ld.u32 %r0, [%d0;", "expected ] before ;"),
    ("ld.u32 %r0, [];", "expected a base before ]"),
    ("ld.u32 %r0, [%d0+%d1];", "expected a number before %d1"),
    ("ld.u32 %r0, [%d0+1.5];", "an offset must be an integer"),
    ("ld.u32 %r0, [%tid.x];", "no base of an address, %tid.x"),
    ("ld.u32 %r0, [1.5];", "no base of an address, 1.5"),
    ("ld.u32 %r0, [%d0, %r1];", "expected { before %r1"),
    (".local .b32 a[4]; ld.u32 %r0, a[1];", "an array is indexed by its address in bytes"),
    ("setp.eq.s32 %p0|3, %r0, 1;", "a pair must be of registers"),
    ("@%r0 mov.u32 %r0, 1;", "a guard must be a predicate"),
    ("@%p9 mov.u32 %r0, 1;", "undeclared register %p9"),
    ("@5 mov.u32 %r0, 1;", "expected a predicate before 5"),
    ("bra;", "a branch has one label"),
    ("bra L, %r0; L:", "a branch has one label"),
    ("bra L;", "undeclared label L"),
    ("bra L; { L: }", "undeclared label L"),
    ("L: L:", "label L is declared twice"),
    ("L: L: .branchtargets L;", "label L is declared twice"),
    ("brx.idx %r0, L; L:", "undeclared list of labels L"),
    ("brx.idx %r0;", "a branch has one label or list of labels"),
    ("T: .branchtargets L; brx.idx %r0, T;", "undeclared label L"),
    (".reg .b32 a, a;", "a is declared twice"),
    (".reg .b32 %r<3>;", "%r0 is declared twice"),
    (".reg .tf32 a;", "unknown type of a register .tf32"),
    (".reg .v2 .b32 w; mov.b32 %r0, w.z;", "undeclared symbol w.z"),
    (".reg .v4 .b32 w; mov.b32 %r0, w.q;", "undeclared symbol w.q"),
    (".reg .v4 .b32 w; mov.b32 %r0, w.xy;", "undeclared symbol w.xy"),
    (".reg .v4 .b32 w; mov.b32 %r0, w.;", "character '.' has no meaning here"),
    ("mov.b32 %r0, %r1.x;", "undeclared register %r1.x"),
    (".reg .v4 .b32 w; @w mov.b32 %r0, 1;", "a guard must be a predicate"),
    (".reg .v4 .b32 w; mov.b32 %r0, {w, w};", "expected a register, a symbol or a number"),
    (".reg b32 a;", "unknown type of a register b32"),
    (".reg .b32 a[3];", "expected ; before ["),
    (".reg .b32 a<999999999>;", "bad number 999999999"),
    (".reg .b32 a<131072>;", "more registers than the emulator takes"),
    (".reg .v3 .b32 a;", "unknown type of a register .v3"),
    (".extern .shared .b8 dynamic[];", "an extern variable is declared at module level"),
    (".local .b32 a = 5;", "expected ; before ="),
    (".shared .b32 a = 5;", "expected ; before ="),
    (".local .b32 a[];", "an array without a size"),
    (".maxnreg 5;", "unknown in a function, .maxnreg"),
    ("call nobody;", "undeclared symbol nobody"),
    ("call 5;", "expected a function before 5"),
    ("call kernel;", "kernel is no function that can be called"),
    ("call %d0;", "a call by address needs a prototype"),
    ("call %d0, P;", "undeclared prototype P"),
    ("call one, (%r0);", "one has 1 results and 1 arguments, not 0 and 1"),
    ("call (%r0), one;", "one has 1 results and 1 arguments, not 1 and 0"),
    ("call (%r0), one, (%d0);", "no such argument for one, whose parameter in is of type .b32 and 4 bytes"),
    ("call (%d0), one, (%r0);", "no such argument for one, whose parameter out is of type .b32 and 4 bytes"),
    ("call (5), one, (%r0);", "a result of one cannot be a number"),
    ("call (%r0), one, (!%p0);", "no such argument for one"),
    ("call (%r0), one, (_);", "no such argument for one"),
    ("call (%r0), one, ({%r0});", "expected a register, a symbol or a number"),
    (".local .b32 a; call (%r0), one, (a);", "no such argument for one"),
    ("{ .param .b64 a; call (%r0), one, (a); }", "no such argument for one"),
    ("{ .param .b32 a; call (%r0), one, (a+4); }", "no such argument for one"),
    ("{ .param .align 4 .b8 a[4]; call (%r0), one, (a); }", "no such argument for one"),
    ("{ .param .align 4 .b8 a[24]; call wide, (a, 1.0); }", "no such argument for wide"),
    ("call wide, (%d0, 1.0);", "no such argument for wide"),
    ("{ .param .b32 a; } call (%r0), one, (a);", "undeclared symbol a"),
    ("P: .callprototype (.param .b32 _) _ (.param .b32 _); call (%r0), %d0, (%d1), P;", "no such argument for %d0"),
    ("T: .calltargets nobody;", "nobody is no function that can be called"),
    ("T: .calltargets kernel;", "kernel is no function that can be called"),
]


@pytest.mark.parametrize(("text", "expected"), MALFORMED, ids=[m[1] for m in MALFORMED])
def test_malformed_modules(text: str, expected: str) -> None:
    assert expected in error(text)


@pytest.mark.parametrize(("body", "expected"), BAD_BODIES, ids=[b[0][:60] for b in BAD_BODIES])
def test_malformed_bodies(body: str, expected: str) -> None:
    callees = " ".join(CALLEES.split("\n"))
    message = error(f"{HEADER}{callees}\n.entry kernel() {{ {REGISTERS} {body} }}")
    assert message.startswith("line 5: ")
    assert expected in message


def test_limits_of_a_module() -> None:
    from emulator import EmulationError

    many = " ".join(f".entry k{i}() {{ .reg .b32 r<100000>; }}" for i in range(11))
    assert "more registers than the emulator takes" in error(HEADER + many)
    assert "more functions than the emulator takes" in error(
        HEADER + ".func f();" + " ".join(f".func f{i}();" for i in range(1 << 13))
    )
    targets = "T: .branchtargets " + ", ".join(["L"] * 1100) + "; L:"
    assert "more branches than the emulator takes" in error(
        f"{HEADER}.entry k() {{ .reg .b32 r; {targets} {'brx.idx r, T; ' * 1000} }}"
    )
    shared = " ".join(f".shared .b8 s{i};" for i in range(5000))
    assert "more .shared variables of the module" in error(HEADER + shared)
    with pytest.raises(EmulationError, match="more than 16 MiB"):
        describe(HEADER + " " * (16 << 20))
