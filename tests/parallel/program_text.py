"""What must not be in a program for a pod of TPUs, read from its text: lowered (StableHLO) and compiled (HLO)."""

import math
import re

_HOST = re.compile(r"callback|xla_python|is_host_transfer *= *true|\b(?:infeed|outfeed)\(")
_LARGE = re.compile(r"stablehlo\.constant dense<[\"\[][^\n]*tensor<((?:\d+x)*)(\w+)>")
_FOLDED = re.compile(r"= (\w+)\[([\d,]+)\]\S* constant\(")
_PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)[^\n]*")
_COMPILED_PRODUCT = re.compile(r"= f32\S+ (?:dot|convolution)\((?P<operands>[^)]*)\)[^\n]*")
_WIDE = re.compile(r"(%[\w.-]+) = f32\[")
_BYTES = {
    "f64": 8,
    "i64": 8,
    "s64": 8,
    "bf16": 2,
    "f16": 2,
    "i1": 1,
    "pred": 1,
    "i8": 1,
    "ui8": 1,
    "s8": 1,
    "u8": 1,
}


def to_the_host(lowered, compiled):
    """Lines by which the program talks with the host while it runs."""
    lines = (line for text in (lowered, compiled) for line in _bare(text).splitlines())
    return [line.strip()[:200] for line in lines if _HOST.search(line)]


def doubles(lowered, compiled):
    """How many float64 arrays there are."""
    return len(re.findall(r"(?:x|<)f64>", lowered)) + len(re.findall(r"\bf64\[", compiled))


def largest_constant(lowered, compiled):
    """Bytes of the largest constant that is not one number over and over; what the compiler folded is there too."""
    written = [(dtype, shape.split("x")) for shape, dtype in _LARGE.findall(lowered)]
    folded = [(dtype, shape.split(",")) for dtype, shape in _FOLDED.findall(compiled)]
    sizes = (
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape if n) for dtype, shape in written + folded
    )
    return max(sizes, default=0)


def products(lowered, compiled):
    """How many products of float32 there are, in both texts, and those that are not at the highest precision."""
    asked = [line for line in _PRODUCT.findall(lowered) if "f32>" in line.partition("->")[0]]
    wide = set(_WIDE.findall(compiled))
    made = [
        found[0] for found in _COMPILED_PRODUCT.finditer(compiled)
        if wide.intersection(re.findall(r"%[\w.-]+", found["operands"]))
    ]  # fmt: skip
    loose = [line for line in asked if "[HIGHEST, HIGHEST]" not in line]
    loose += [line for line in made if "operand_precision={highest,highest}" not in line]
    return len(asked), len(made), [line[:300] for line in loose]


def _bare(text):
    """The text without where each operation comes from: a function of ours may be called anything."""
    return re.sub(r"metadata=\{[^}]*\}", "", text)
