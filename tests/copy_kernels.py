"""PTX of small kernels for the tests of asynchronous copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emulator import Machine
from emulator.kernel import Counters


def kernel(body: str, params: Sequence[str], shared: int = 65536) -> str:
    """A module with the entry ``k``: ``params`` are "map" or "ptr", whose generic addresses are in %rd0, %rd1, ...

    Shared memory is `buf` and the mbarriers `bar`; %r0 is the thread, %r1 `buf`, %r2 `bar`, and %p0 holds in thread 0.
    """
    kinds = {"map": ".param .align 128 .b8 p{}[128]", "ptr": ".param .u64 p{}"}
    loads = {"map": "mov.b64 %rd{0}, p{0}; cvta.param.u64 %rd{0}, %rd{0};", "ptr": "ld.param.u64 %rd{0}, [p{0}];"}
    declared = ", ".join(kinds[kind].format(i) for i, kind in enumerate(params))
    loaded = "\n".join(loads[kind].format(i) for i, kind in enumerate(params))
    return f"""
.version 8.6
.target sm_90a
.address_size 64
.visible .entry k({declared})
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<64>; .reg .b64 %rd<32>;
.shared .align 1024 .b8 buf[{shared}];
.shared .align 8 .b8 bar[64];
mov.u32 %r0, %tid.x;
mov.u32 %r1, buf;
mov.u32 %r2, bar;
setp.eq.u32 %p0, %r0, 0;
{loaded}
{body}
ret;
}}
"""


def init(count: int = 1, at: str = "%r2") -> str:
    return f"@%p0 mbarrier.init.shared::cta.b64 [{at}], {count};\nbar.sync 0;\n"


def expect(nbytes: int, at: str = "%r2") -> str:
    return f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{at}], {nbytes};\n"


def wait(parity: int = 0, at: str = "%r2", label: str = "WAIT") -> str:
    return f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p7, [{at}], {parity};\n@!%p7 bra {label};\n"


def _loop(nbytes: int, body: str, label: str, end: str) -> str:
    return f"""
mul.lo.u32 %r40, %r0, 4;
{label}: setp.ge.u32 %p6, %r40, {nbytes};
@%p6 bra {label}_END;
add.u32 %r41, %r1, %r40;
cvt.u64.u32 %rd30, %r40;
{body}
mov.u32 %r43, %ntid.x;
mad.lo.u32 %r40, %r43, 4, %r40;
bra {label};
{label}_END: {end}
bar.sync 0;
"""


def dump(nbytes: int, to: str, label: str = "DUMP") -> str:
    """Stores shared memory from %r1 on to global memory at the address in register ``to``."""
    body = f"add.u64 %rd31, {to}, %rd30; ld.shared.b32 %r42, [%r41]; st.global.b32 [%rd31], %r42;"
    return _loop(nbytes, body, label, "")


def fetch(nbytes: int, origin: str, label: str = "FETCH") -> str:
    """The opposite, for the async proxy to read."""
    body = f"add.u64 %rd31, {origin}, %rd30; ld.global.b32 %r42, [%rd31]; st.shared.b32 [%r41], %r42;"
    return _loop(nbytes, body, label, "fence.proxy.async.shared::cta;")


def cluster_sync(size: int, flags: str, label: str) -> str:
    """By words of global memory, one for each CTA and call, at the address in register ``flags``, which it moves on."""
    waits = "\n".join(
        f"{label}_{i}: ld.acquire.gpu.global.b32 %r45, [{flags}+{4 * i}];\n"
        f"setp.eq.u32 %p5, %r45, 0;\n@%p5 bra {label}_{i};"
        for i in range(size)
    )
    return f"""
bar.sync 0;
mov.u32 %r44, %cluster_ctarank;
cvt.u64.u32 %rd28, %r44;
shl.b64 %rd28, %rd28, 2;
add.u64 %rd29, {flags}, %rd28;
@%p0 st.release.gpu.global.b32 [%rd29], 1;
{waits}
add.u64 {flags}, {flags}, {4 * size};
bar.sync 0;
"""


def peer(to: str, address: str, rank: str) -> str:
    """The shared::cluster address of the CTA with the rank in a register, as mapa gives it."""
    return f"and.b32 {to}, {address}, 0xffffff; shl.b32 %r46, {rank}, 24; or.b32 {to}, {to}, %r46;\n"


def run(text: str, args: Sequence[Any], seed: int = 0, threads: int = 32, **launch: Any) -> Counters:
    return Machine(seed).load(text)["k"].launch(block=threads, args=list(args), **launch)
