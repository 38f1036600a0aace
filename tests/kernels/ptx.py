"""Runs the few PTX instructions that `triton_words` is written in, on numpy arrays, by the PTX ISA manual (9.7).

Registers are uint32 arrays; 16-bit outputs `$0` ... are uint16 arrays. An instruction that is not known is an error.
"""

import re

import ml_dtypes
import numpy as np

U32 = np.uint32


def run(text: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every register after the assembly `text`, which begins with `inputs` (uint32, or float32, by name as "$8")."""
    registers = dict(inputs)

    def value(name: str):
        return U32(int(name, 16)) if name.startswith("0x") else registers[name]

    for line in text.strip().removeprefix("{").removesuffix("}").strip().splitlines():
        name, _, rest = line.strip().removesuffix(";").partition(" ")
        if name == ".reg":
            continue
        if unpacked := re.fullmatch(r"\{(\S+), (\S+)\}, (\S+)", rest):
            assert name == "mov.b32"
            low, high, source = unpacked.groups()
            registers[low] = (value(source) & U32(0xFFFF)).astype(np.uint16)
            registers[high] = (value(source) >> U32(16)).astype(np.uint16)
            continue
        target, *sources = rest.split(", ")
        numbers = [int(s) if s.isdigit() else value(s) for s in sources]
        registers[target] = KNOWN[name](*numbers)
    return registers


def prmt(a, b, selector) -> np.ndarray:
    """Default mode: a nibble of the selector picks a byte of {b, a}; with its highest bit, 8 times that byte's sign."""
    both = [(x >> U32(8 * i)) & U32(0xFF) for x in (a, b) for i in range(4)]
    out = np.zeros_like(a)
    for i in range(4):
        pick = int(selector) >> 4 * i & 15
        byte = both[pick & 7]
        out |= (np.where(byte & U32(0x80), U32(0xFF), U32(0)) if pick & 8 else byte) << U32(8 * i)
    return out


def lop3(a, b, c, table) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def halves(x) -> list[np.ndarray]:
    """Two bfloat16 -> float64, low half first; subnormal numbers are kept (bf16x2 instructions without .ftz)."""
    x = np.asarray(x, U32)
    return [((x >> U32(s)).astype(np.uint16)).view(ml_dtypes.bfloat16).astype(np.float64) for s in (0, 16)]


def joined(low, high) -> np.ndarray:
    with np.errstate(over="ignore"):  # to inf, as it is meant
        low, high = (np.asarray(v).astype(ml_dtypes.bfloat16).view(np.uint16).astype(U32) for v in (low, high))
    return low | high << U32(16)


def pairwise(op):
    return lambda a, b: joined(*(op(x, y) for x, y in zip(halves(a), halves(b), strict=True)))


KNOWN = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, by: a << U32(by),
    "shf.l.wrap.b32": lambda a, b, by: (b << U32(by)) | (a >> U32(32 - by)),
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "mul.rn.bf16x2": pairwise(np.multiply),
    "add.rn.bf16x2": pairwise(np.add),
    "cvt.rn.bf16x2.f32": lambda high, low: joined(low, high),
}
