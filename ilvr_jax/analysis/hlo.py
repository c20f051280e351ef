"""Communication between chips, and reads from their memory, in a compiled program: read from its HLO text."""

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
NAME = re.compile(r"%([\w.\-]+) = ")
OPERAND = re.compile(r"%([\w.\-]+)")
CALLS = re.compile(r"calls=%([\w.\-]+)")
BODY = re.compile(r"body=%([\w.\-]+)")
NO_READS = ("parameter", "get-tuple-element", "tuple", "bitcast", "conditional", "dynamic-update-slice")
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
            trips = (_known_trips(computations[condition[1]]) if condition else None) or 1  # 1: a lower bound
            for group in CALLED.findall(line):
                for called in re.findall(r"%([\w.\-]+)", group):
                    visit(called, times * trips)

    visit(entry, 1)
    counts, sizes = Counter(), Counter()
    for kind, times, size in calls.values():
        counts[kind] += times
        sizes[kind] += times * size
    return [Collective(kind, counts[kind], sizes[kind]) for kind in KINDS if counts[kind]]


def memory_reads(program: str, other_trips: int = 1) -> int:
    """Return the bytes that a chip reads from its memory in a program's optimised HLO text.

    Loops are counted as they run, those without a known number of iterations once, and such loops inside these
    `other_trips` times. Of an operand that a fusion slices, the slice is read. Branches are not counted.
    """
    computations, entry = _computations(program)

    def fusion_reads(name: str, number: int, size: int) -> int:
        """Return the bytes that a fused computation reads of an operand of `size` bytes."""
        read, aliases = 0, set()
        for line in computations[name]:
            operation, result = OPERATION.search(line), NAME.search(line)
            if not operation:
                continue
            used = OPERAND.findall(line[operation.end() :].split(")")[0])
            if f" parameter({number})" in line or (operation[2] == "bitcast" and aliases & {*used}):
                aliases.add(result[1])
                if line.lstrip().startswith("ROOT"):
                    return size
            for place, operand in enumerate(used):
                if operand not in aliases or operation[2] == "bitcast":
                    continue
                if operation[2] in ("dynamic-slice", "slice") or (operation[2] == "gather" and not place):
                    read += _largest(operation[1])
                elif operation[2] == "fusion":
                    read += fusion_reads(CALLS.search(line)[1], place, size)
                elif operation[2] != "dynamic-update-slice" or place:
                    return size
        return min(read, size)

    def reads(name: str, in_other_loop: bool) -> int:
        sizes, total = {}, 0  # of the values in main memory
        for line in computations[name]:
            operation = OPERATION.search(line)
            if not operation:
                continue
            sizes[NAME.search(line)[1]] = _main_memory(operation[1])
            used = OPERAND.findall(line[operation.end() :].split(")")[0])
            if operation[2] == "while":
                trips = _known_trips(computations[CONDITION.search(line)[1]])
                times = trips or (other_trips if in_other_loop else 1)
                total += times * reads(BODY.search(line)[1], in_other_loop or trips is None)
            elif operation[2] == "fusion":
                called = CALLS.search(line)[1]
                total += sum(fusion_reads(called, place, sizes.get(used[place], 0)) for place in range(len(used)))
            elif operation[2] == "dynamic-slice":
                total += _main_memory(operation[1])
            elif operation[2] not in NO_READS:
                total += sum(sizes.get(operand, 0) for operand in used)
        return total

    return reads(entry, False)


def _main_memory(shape: str) -> int:
    """Return the bytes of an array in main memory; 0 for a tuple, and for an array in the chip's fast memory."""
    return 0 if shape.startswith("(") or "S(" in shape else _largest(shape)


def _known_trips(condition: list[str]) -> int | None:
    """Return the iterations of a loop that counts from 0 to a constant, None for any other loop."""
    constants = {int(value) for line in condition for value in CONSTANT.findall(line)}
    return constants.pop() if len(constants) == 1 and constants != {0} else None


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
