"""What a compiled XLA program launches, read from its text: kernels, and the bytes that each reads and writes.

XLA's own count of bytes stands in `cost_analysis`, which a program that was compiled without its device does not give,
and which counts a loop's body once. Here a body counts as often as it runs, where XLA knows how often. As in XLA's
count, an operand of which a kernel takes a slice counts with the slice, one that is read twice counts once, an update
in place counts with the update, and caches are left out.
"""

import dataclasses
import math
import re

NO_KERNEL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "add-dependency",
}  # fmt: skip
CALLS = {
    "while": ("body",),
    "call": ("to_apply",),
    "conditional": ("true_computation", "false_computation"),
    "async": ("calls",),
}
SMALL = 4e6  # bytes: a launch that moves fewer is of vectors
SLICES = {"dynamic-slice", "slice", "gather"}
BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # of the types whose name does not end in their bits


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A launch.

    Attributes:
      name: of the instruction.
      kind: "product" (a GEMM, whoever runs it), "call" (other code that XLA did not write: Pallas, cuDNN) or "fusion"
        (all else that XLA generates, copies too).
      bytes: that one launch reads and writes.
      times: how often it is launched.
      source: the operation of the program that it comes from.
    """

    name: str
    kind: str
    bytes: int
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


def kernels(text: str) -> list[Kernel]:
    """The launches of a compiled module (`compiled.as_text()`), in the order of its schedule.

    Raises:
      ValueError: no entry computation in it.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("This is not the text of a compiled program: it has no ENTRY.")
    return list(_launches(computations, entry, 1))


def _parse(text):
    """({computation: its instructions by name}, the entry's name)."""
    computations, entry, body = {}, None, {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            body = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        # A type may be a tuple; an operand stands with or without its type.
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(([^)]*)\)(.*)", line):
            root, name, shape, opcode, operands, rest = found.groups()
            if opcode.endswith(("-done", "-update")):
                opcode = "bitcast"  # of something asynchronous, which its start launched
            names = tuple(x.split()[-1].lstrip("%") for x in operands.split(",") if x.strip())
            body[name] = _Instruction(name, shape, opcode.removesuffix("-start"), names, rest, bool(root))
    return computations, entry


def _launches(computations, name, times):
    body = computations[name]
    for x in body.values():
        if x.opcode in CALLS:
            inside = times
            if x.opcode == "while":  # where XLA does not know, the least that it can be
                count = re.search(r'known_trip_count":\{"n":"(\d+)"', x.rest)
                inside = times * int(count[1] if count else 1)
            called = re.findall(rf"(?:{'|'.join(CALLS[x.opcode])})=%?([\w.\-]+)", x.rest)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", x.rest):
                called = [branch.strip().lstrip("%") for branch in branches[1].split(",")]
            if x.opcode == "conditional":  # one of them runs: the dearest
                choices = [list(_launches(computations, one, inside)) for one in called]
                yield from max(choices, key=lambda found: sum(k.bytes for k in found), default=[])
            else:
                for one in called:
                    yield from _launches(computations, one, inside)
        elif x.opcode not in NO_KERNEL:
            fused = re.search(r"calls=%?([\w.\-]+)", x.rest) if x.opcode == "fusion" else None
            inner = computations[fused[1]] if fused else None
            source = re.search(r'op_name="([^"]*)"', x.rest)
            size = _moved(x, body, inner)
            yield Kernel(x.name, _kind(x, inner, computations), size, times, source[1] if source else "")


def _kind(x, inner, computations):
    if x.opcode == "custom-call":
        return "product" if re.search(r'custom_call_target="__cublas', x.rest) else "call"
    return "product" if x.opcode == "dot" or (inner and _has_dot(inner, computations)) else "fusion"


def _has_dot(body, computations):
    """Whether a fused computation, or a fusion within it, is a product."""
    if any(x.opcode == "dot" for x in body.values()):
        return True
    inner = (re.search(r"calls=%?([\w.\-]+)", x.rest) for x in body.values() if x.opcode == "fusion")
    return any(_has_dot(computations[found[1]], computations) for found in inner if found)


def _moved(x, body, inner):
    read = {name: size_of(body[name].shape) for name in x.operands if name in body}
    if inner is None:
        copied = x.opcode == "copy"  # whose asynchronous form has its operand in its type
        return sum(read.values()) + (sum(read.values()) if copied else size_of(x.shape))
    users = {}
    for y in inner.values():
        for operand in y.operands:
            users.setdefault(operand, []).append(y)
    for y in inner.values():
        if y.opcode == "parameter":
            operand = x.operands[int(y.operands[0])]
            read[operand] = min(read[operand], _read(y.name, inner, users))
    root = next(y for y in inner.values() if y.root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(read.values()) + sum(_written(y, inner) for y in results)


def _read(name, inner, users):
    """Bytes of a value that its users in a fusion take."""
    total = 0
    for y in users.get(name, ()):
        if y.opcode == "bitcast":
            total += _read(y.name, inner, users)
        elif y.opcode in SLICES and y.operands[0] == name:
            total += size_of(y.shape)
        elif y.opcode == "dynamic-update-slice" and y.operands[0] == name:
            continue
        else:
            return math.inf
    return total


def _written(y, inner):
    while y.opcode == "bitcast":
        y = inner[y.operands[0]]
    return size_of(inner[y.operands[1]].shape if y.opcode == "dynamic-update-slice" else y.shape)


def size_of(shape: str) -> int:
    """Bytes of a type as HLO writes it, "f32[2,3]{1,0}" or a tuple of such."""
    total = 0
    for kind, sizes in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = re.match(r"[a-z]+(\d+)", kind)
        one = BYTES.get(kind) or (int(bits[1]) / 8 if bits else 0)
        total += one * math.prod(int(n) for n in sizes.split(",") if n)
    return math.ceil(total)
