"""Communication between chips in a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
OPERATION = re.compile(r"= (.*?) ([a-z][\w\-]*)\(")
CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
CONDITION = re.compile(r"condition=%([\w.\-]+)")
CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
CHANNEL = re.compile(r"channel_id=(\d+)")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication of a chip: its number of calls, loops counted as they run, and bytes of results."""

    kind: str
    count: int
    bytes: int


def collectives(program: str) -> list[Collective]:
    """Return the communication in a program's optimised HLO text."""
    computations, entry = _computations(program)
    calls = {}  # by channel: a call that overlaps arithmetic appears once per piece of it

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            operation = OPERATION.search(line)
            if not operation:
                continue
            kind = operation[2].removesuffix("-start")
            if kind in KINDS:
                channel = CHANNEL.search(line)
                calls[channel[1] if channel else line] = (kind, times, _largest(operation[1]))
            condition = CONDITION.search(line)
            trips = _trips(computations[condition[1]]) if condition else 1
            for group in CALLED.findall(line):
                for called in re.findall(r"%([\w.\-]+)", group):
                    visit(called, times * trips)

    visit(entry, 1)
    counts, sizes = Counter(), Counter()
    for kind, times, size in calls.values():
        counts[kind] += times
        sizes[kind] += times * size
    return [Collective(kind, counts[kind], sizes[kind]) for kind in KINDS if counts[kind]]


def _trips(condition: list[str]) -> int:
    """Return the iterations of a loop that counts from 0 to a constant; 1 for any other loop, a lower bound."""
    constants = {int(value) for line in condition for value in CONSTANT.findall(line)}
    return constants.pop() if len(constants) == 1 else 1


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation by name, and the name of the entry computation."""
    computations, entry, name = {}, "", ""
    for line in program.splitlines():
        if head := COMPUTATION.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _largest(shape: str) -> int:
    """Return the bytes of an array, or of the largest in a tuple: the result, which comes with its operands."""
    return max(
        (
            BYTES.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)
            for dtype, sizes in SHAPE.findall(shape)
        ),
        default=0,
    )
