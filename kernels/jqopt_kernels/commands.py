"""The command `jqopt-kernels`: lists kernels, builds those in C++, tunes the Triton ones on the GPU at hand."""

from __future__ import annotations

import argparse
import sys

import jax.numpy as jnp

from . import ffi_build, tune
from ._device import here
from ._types import Operand, Shapes
from .table import KERNELS, explain

FORMATS = {
    "nvfp4": Operand("e2m1", 16, "e4m3", "block", global_scale=True),
    "mxfp4": Operand("e2m1", 32, "e8m0", "block"),
    "mxfp8": Operand("e4m3", 32, "e8m0", "block"),
    "fp8": Operand("e4m3", None, "float32", "channel"),
    "fp8_block": Operand("e4m3", (128, 128), "float32", "block"),
    "int8": Operand("int8", None, "float32", "channel"),
    "int4": Operand("int4", 128, "float32", "block"),
}
FLOATS = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
# scales of an activation belong to one row: "channel" is by token
ACTIVATIONS = dict.fromkeys(FLOATS, Operand("float")) | {
    **{name: FORMATS[name] for name in ("nvfp4", "mxfp4", "mxfp8", "fp8", "int8")},
    "fp8_block": Operand("e4m3", (1, 128), "float32", "block"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 after an error, which it prints."""
    asked = _parser().parse_args(arguments)
    try:
        asked.run(asked)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jqopt-kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    table = commands.add_parser("list", help="the kernels in order of preference, and which take a product and why not")
    table.add_argument("--device", default=None, help='such as "cuda:90" or "cpu"; default: this machine\'s')
    search = commands.add_parser("tune", help="search tiles of the Triton kernels on this machine's GPU")
    search.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256], help="rows of the activation")
    for one, run in ((table, _list), (search, _tune)):
        one.add_argument("--weight", default="nvfp4", choices=sorted(FORMATS), help="format of the weight")
        one.add_argument("--activation", default="bfloat16", choices=sorted(ACTIVATIONS), help="dtype or format")
        one.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"), help="of the weight")
        one.set_defaults(run=run)
    table.add_argument("--m", type=int, default=1, help="rows of the activation")
    build = commands.add_parser("build", help="compile the C++ kernels for the CPU into the user's cache")
    build.add_argument("--force", action="store_true", help="also where they are there")
    build.set_defaults(run=_build)
    return parser


def _list(asked: argparse.Namespace) -> None:
    shapes, device = Shapes(asked.m, *asked.shape), asked.device or here()
    print(f"qdot of {asked.activation} x {asked.weight} on {device}, m={shapes.m} n={shapes.n} k={shapes.k}")
    reasons = dict(explain("qdot", ACTIVATIONS[asked.activation], FORMATS[asked.weight], device, shapes))
    for kernel in KERNELS:
        if kernel.op == "qdot":
            print(f"  {kernel.name:<18} {kernel.backend:<10} {reasons[kernel.name] or 'can'}")
    for op in sorted({k.op for k in KERNELS} - {"qdot"}):
        print(f"{op}: {', '.join(k.name for k in KERNELS if k.op == op)}")


def _tune(asked: argparse.Namespace) -> None:
    device = tune.gpu()
    lhs, rhs, dtype = ACTIVATIONS[asked.activation], FORMATS[asked.weight], FLOATS.get(asked.activation)
    for m in asked.rows:
        found = tune.search(lhs, rhs, Shapes(m, *asked.shape), device, dtype)
        path = tune.keep(found, device)
        for result in found:
            print(f"{result.kernel} {result.key}: {result.microseconds:.1f} us {result.tile}")
        print(f"written to {path}")


def _build(asked: argparse.Namespace) -> None:
    path = ffi_build.build(force=asked.force)
    found = ffi_build.library()
    if isinstance(found, str):
        raise RuntimeError(found)
    print(f"{path}\ninstruction sets of this processor: {', '.join(found.isas)}")
