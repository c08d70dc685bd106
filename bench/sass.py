"""Machine code of compiled kernels, taken apart by the tools that come with the triton package or a CUDA toolkit."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .case import Unavailable

_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_TARGET = re.compile(r"`\((\.L\w+)\)")


class Instruction(NamedTuple):
    """Without its predicate. ``name`` has the modifiers, ``QGMMA.64x128x32.F32.E4M3.E4M3``."""

    address: int
    name: str
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel in the order of its addresses; ``labels`` say at which address each lies."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions)

    def loop(self, opcode: str) -> list[Instruction] | None:
        """Of the innermost spans that a branch back goes over again, the one that holds ``opcode`` most often.

        What the compiler moved out of the loop's span, such as the tail of a wait, is not in it; what it holds for one
        turn in many is.
        """
        spans = set()
        wanted = [i.address for i in self.instructions if i.opcode == opcode]
        for branch in (i for i in self.instructions if i.opcode == "BRA"):
            start = self.labels.get(next(iter(_TARGET.findall(branch.operands)), ""))
            if start is not None and any(start <= address < branch.address for address in wanted):
                spans.add((start, branch.address))
        innermost = [s for s in spans if not any(s[0] <= t[0] and t[1] <= s[1] for t in spans - {s})]
        if not innermost:
            return None
        # Where a wait's tail goes back into a loop, there seems to be a longer one from there.
        start, end = max(innermost, key=lambda s: (sum(s[0] <= address <= s[1] for address in wanted), s[0] - s[1]))
        return [i for i in self.instructions if start <= i.address <= end]


class Mix(NamedTuple):
    """The main loop of a GEMM kernel: how many k-blocks it takes a turn, and its instructions in one of them."""

    blocks: int
    qgmma: float
    ffma: float
    others: float

    @property
    def share(self) -> float:
        """Others, % of FFMA."""
        return 100 * self.others / self.ffma


def mix(code: Code, passes: int) -> Mix | None:
    """Every instruction of the loop's span counts as executed. Four wgmma make a pass of a k-block."""
    loop = code.loop("QGMMA")
    if loop is None:
        return None
    count = Counter(i.opcode for i in loop)
    blocks = count["QGMMA"] // (4 * passes)
    others = len(loop) - count["QGMMA"] - count["FFMA"]
    return Mix(blocks, count["QGMMA"] / blocks, count["FFMA"] / blocks, others / blocks)


@functools.cache
def tool(name: str) -> str:
    """The path of ``nvdisasm`` or ``cuobjdump``.

    Raises:
        Unavailable: there is none.
    """
    spec = find_spec("triton")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [str(path) for folder in folders for path in sorted(Path(folder).rglob(name))]
    path = found[0] if found else shutil.which(name)
    if path is None:
        raise Unavailable(f"no {name}: it comes with the triton package or a CUDA toolkit")
    return path


def _run(name: str, *arguments: str | Path) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def _disassembly(cubin: Path) -> str:
    return _run("nvdisasm", "-c", cubin)


def code(cubin: Path, kernel: str) -> Code:
    """The code of one kernel. A file is taken apart once in a process.

    Raises:
        Unavailable: there is no nvdisasm.
        ValueError: the file has no such kernel.
    """
    section = re.search(rf"\.section\s+\.text\.{kernel},.*?(?=\.section\s|\Z)", _disassembly(cubin), re.S)
    if section is None:
        raise ValueError(f"{cubin} has no kernel {kernel}")
    instructions: list[Instruction] = []
    waiting: list[str] = []
    labels: dict[str, int] = {}
    for line in section[0].splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(int(found[1], 16), found[2], found[3]))
            labels |= dict.fromkeys(waiting, instructions[-1].address)
            waiting.clear()
    return Code(instructions, labels)


def resources(cubin: Path, kernel: str) -> dict[str, int]:
    """What ptxas gave a thread and a block: ``REG``, ``STACK``, ``SHARED`` and the like, by cuobjdump's names.

    Raises:
        Unavailable: there is no cuobjdump.
        ValueError: the file has no such kernel.
    """
    usage = _run("cuobjdump", "--dump-resource-usage", cubin)
    line = re.search(rf"Function {kernel}:\s*\n(.*)", usage)
    if line is None:
        raise ValueError(f"{cubin} has no kernel {kernel}")
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line[1])}
