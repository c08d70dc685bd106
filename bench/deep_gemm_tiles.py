"""Which tile DeepGEMM 2.6.1 takes for a dense product on sm_90, derived from the rule that it publishes.

Written from the description of its heuristic (``csrc/jit_kernels/heuristics/sm90.hpp`` at 54e2261) and never compared
with a run of the library: enumerate the tiles that fit, and take the one with the fewest cycles of L1 or L2, whichever
are more, over the share of SMs that the waves fill. HBM, tensor cores and promotion have no part in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from fastfp8.layout import BLOCK, ceil_div

SHARED_BYTES, MOST_STAGES = 232448, 16
WIDE = 128  # one side of a tile may be wider
L2_BYTES = 8e6 / 1.3e3  # a clock, all SMs
OUT_BYTES = 2  # BF16
WGMMA_M = 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """``cluster``: how many CTAs one below the other and beside one another share what they load."""

    m: int
    n: int
    cluster: tuple[int, int]
    stages: int
    #: CTAs with a tile of their own in all waves together.
    tiles: int
    waves: int
    cycles: int

    def fill(self, num_sms: int) -> float:
        """The share of the waves' SMs that have a tile."""
        return self.tiles / (self.waves * num_sms)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}" + (" pair" if self.cluster != (1, 1) else "")


def choose(m: int, n: int, k: int, num_sms: int) -> Tile:
    """For A in 1x128 blocks, B in 128x128 blocks and BF16 output. Of equal ones the first counts."""
    return min(candidates(m, n, k, num_sms), key=lambda tile: tile.cycles)


def candidates(m: int, n: int, k: int, num_sms: int) -> Iterator[Tile]:
    heights = [64, 128, *([16] if m <= 16 else []), *([32] if m <= 32 else []), 256]
    # Above 128 columns a tile has scales of two blocks, and the code for that wants the rest to divide.
    widths = [w for w in range(16, 193, 16) if w <= WIDE or w % (w - WIDE) == 0 or WIDE % (w - WIDE) == 0]
    for cluster in ((1, 1), (1, 2), (2, 1)):
        for tile_m in heights:
            for tile_n in widths:
                count = stages(tile_m, tile_n, k)
                if min(tile_m, tile_n) > WIDE or count < (3 if tile_m * tile_n >= 128 * 192 else 4):
                    continue
                tiles = ceil_div(m, tile_m) * ceil_div(n, tile_n)
                waves = ceil_div(tiles, num_sms)
                if cluster == (1, 1) or (waves > 1 and num_sms % 2 == 0):
                    spent = cycles(tile_m, tile_n, cluster, k, tiles, num_sms)
                    yield Tile(tile_m, tile_n, cluster, count, tiles, waves, int(spent / (tiles / (waves * num_sms))))


def stages(tile_m: int, tile_n: int, k: int) -> int:
    """As many as fit beside the output's tile, the barriers and all of K's scales of B."""

    def up(value: int, multiple: int) -> int:
        return ceil_div(value, multiple) * multiple

    columns_of_scales = 1 if WIDE % tile_n == 0 else 2
    fixed = up(tile_m * tile_n * OUT_BYTES, 1024) + MOST_STAGES * 16 + up(ceil_div(k, BLOCK) * 4 * columns_of_scales, 8)
    return min((SHARED_BYTES - fixed) // ((tile_m + tile_n) * BLOCK + up(tile_m * 4, 128)), MOST_STAGES)


def cycles(tile_m: int, tile_n: int, cluster: tuple[int, int], k: int, tiles: int, num_sms: int) -> int:
    """Of L1 or L2 for all tiles, at their rates: bytes loaded, bytes that wgmma reads, and the output."""
    out = tile_m * tile_n * OUT_BYTES
    from_l2 = k * (tile_m // cluster[1] + tile_n // cluster[0]) + out
    through_l1 = k * (tile_m + tile_n) + k * (max(WGMMA_M, tile_m) + tile_n) + 2 * out
    l2_rate = math.floor(min(64.0 * num_sms, L2_BYTES))
    return max(from_l2 * tiles // l2_rate, through_l1 * tiles // (128 * num_sms))
