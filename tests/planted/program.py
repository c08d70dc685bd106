"""What a planted bug is, and the PTX around its body.

A body has its mistake and the correction side by side, as ``<<wrong||right>>``. It may use:
    %t %l %w %c %i   thread of the CTA, lane, warp, CTA, thread of the grid; %lead: thread 0 of the CTA
    %a %d %ai %di    input and output, and the thread's own words of them
    %s %si %b        8 KB of shared memory at a multiple of 1024, the thread's own word of it, four mbarriers
    %in %out         the tensor maps
    %v %r<> %x<> %f<> %p<>   for its own use
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

WRONG_DATA = "wrong data"
ROWS, COLUMNS = 64, 32  # of the input and the output, in words of 4 bytes

TEXT = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 pd, .param .u64 pa, .param .align 64 .b8 pin[128], .param .align 64 .b8 pout[128])
{directives}
{{
  .reg .pred %lead, %p<8>;
  .reg .b32 %t, %l, %w, %c, %i, %n, %s, %si, %b, %v, %r<32>;
  .reg .b64 %a, %d, %ai, %di, %o, %in, %out, %x<16>;
  .reg .f32 %f<16>;
  .shared .align 1024 .b8 smem[8192];
  .shared .align 8 .b64 bars[4];
  mov.u32 %t, %tid.x;
  mov.u32 %c, {number};
  mov.u32 %n, %ntid.x;
  mad.lo.u32 %i, %c, %n, %t;
  shr.u32 %w, %t, 5;
  and.b32 %l, %t, 31;
  setp.eq.u32 %lead, %t, 0;
  ld.param.u64 %d, [pd];
  ld.param.u64 %a, [pa];
  cvta.to.global.u64 %d, %d;
  cvta.to.global.u64 %a, %a;
  mul.wide.u32 %o, %i, 4;
  add.u64 %di, %d, %o;
  add.u64 %ai, %a, %o;
  mov.u32 %s, smem;
  mad.lo.u32 %si, %t, 4, %s;
  mov.u32 %b, bars;
  mov.b64 %in, pin;
  cvta.param.u64 %in, %in;
  mov.b64 %out, pout;
  cvta.param.u64 %out, %out;
{body}
  ret;
}}
"""


def _words() -> Array:
    return np.random.default_rng(7).integers(1, 1 << 32, (ROWS, COLUMNS), dtype=np.uint32)


@dataclass(frozen=True)
class Bug:
    """A kernel with one mistake.

    Attributes:
        mistake: in a line.
        body: of the kernel, see above.
        words: one of them must be in the report; WRONG_DATA stands for a result that differs from the expected one.
        expected: the first words of the output, from the input. What lies behind them must stay as it is.
        block, grid, cluster: extents in x.
        data: makes the input.
        box, swizzle: of both tensor maps, for the wrong kernel and the right one where they differ.
        directives: of the entry.
        devices: each runs the kernel, with its number in place of %c.
    """

    mistake: str
    body: str
    words: tuple[str, ...]
    expected: Callable[[Array], Array]
    block: int = 64
    grid: int = 1
    cluster: int = 1
    data: Callable[[], Array] = _words
    box: tuple[tuple[int, int], tuple[int, int]] = ((ROWS, COLUMNS), (ROWS, COLUMNS))
    swizzle: tuple[int, int] = (0, 0)
    directives: str = ""
    devices: int = 1

    def text(self, wrong: bool, device: int = 0) -> str:
        body, marks = re.subn(r"<<(.*?)\|\|(.*?)>>", r"\1" if wrong else r"\2", self.body, flags=re.S)
        differs = self.box[0] != self.box[1] or self.swizzle[0] != self.swizzle[1]
        assert marks or differs, "nothing distinguishes the wrong kernel from the right one"
        number = "%ctaid.x" if self.devices == 1 else device
        return TEXT.format(body=body, directives=self.directives, number=number)


def words(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """``function`` of the input as a flat array."""
    return lambda a: function(a.reshape(-1))


def wait(barrier: str, parity: int | str) -> str:
    return (
        "{ .reg .pred done; AGAIN: "
        f"mbarrier.try_wait.parity.shared::cta.b64 done, [{barrier}], {parity}; @!done bra AGAIN; }}"
    )


def arrive(barrier: str) -> str:
    return f"mbarrier.arrive.shared::cta.b64 _, [{barrier}];"


def init(barrier: str, count: int) -> str:
    return f"@%lead mbarrier.init.shared::cta.b64 [{barrier}], {count};"


def expect(barrier: str, nbytes: int | str) -> str:
    return f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {nbytes};"


def load(shared: str, barrier: str, x: int = 0, y: int = 0) -> str:
    return (
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[{shared}], [%in, {{{x}, {y}}}], [{barrier}];"
    )


def store(shared: str, x: int = 0, y: int = 0) -> str:
    return (
        f"cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%out, {{{x}, {y}}}], [{shared}]; "
        "cp.async.bulk.commit_group;"
    )
