"""Which kernel does an op: the first of the table that can, or every candidate's reason why it cannot."""

from __future__ import annotations

from ._types import Kernel, Operand, Shapes
from .reference import reference
from .xla_dot import xla_decode, xla_fp8, xla_fp8_dot, xla_int8, xla_int8_row
from .xla_tiled import xla_tiled, xla_tiled_bf16

# Order is preference. A new kernel is one file and one line here.
KERNELS: tuple[Kernel, ...] = (
    xla_int8,
    xla_int8_row,
    xla_fp8,
    xla_fp8_dot,
    xla_tiled_bf16,
    xla_tiled,
    xla_decode,
    reference,
)


class NoKernelError(Exception):
    """No kernel does what was asked; the message holds each candidate's reason."""


def explain(op: str, lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> list[tuple[str, str | None]]:
    """(kernel name, None if it can, else why not) for every kernel of `op`, in order of preference."""
    return [(k.name, k.supports(lhs, rhs, device, shapes)) for k in KERNELS if k.op == op]


def find(op: str, lhs: Operand, rhs: Operand, device: str, shapes: Shapes, backend: str | None = None) -> Kernel:
    """The first kernel of `op` that can do it, or the one named `backend`.

    device: `jax.default_backend()` ("cpu", "gpu", "cuda", "tpu", ...).
    Raises NoKernelError if none can, if the named one cannot, or if no kernel has that name.
    """
    reasons = explain(op, lhs, rhs, device, shapes)
    if backend is not None and backend not in dict(reasons):
        names = ", ".join(name for name, _ in reasons) or f"none; ops are {', '.join(sorted(_ops()))}"
        raise NoKernelError(f"no kernel named {backend!r} for {op!r}; kernels of {op!r}: {names}")
    wanted = [(name, why) for name, why in reasons if backend in (None, name)]
    for name, why in wanted:
        if why is None:
            return next(k for k in KERNELS if (k.name, k.op) == (name, op))
    raise NoKernelError(_refusal(op, lhs, rhs, device, shapes, wanted))


def _ops() -> set[str]:
    return {k.op for k in KERNELS}


def _refusal(op, lhs, rhs, device, shapes, reasons) -> str:
    if not reasons:
        return f"no kernels for op {op!r}; ops are {', '.join(sorted(_ops()))}"
    lines = [f"  {name}: {why}" for name, why in reasons]
    head = f"no kernel can do {op} on {device!r} with m={shapes.m} n={shapes.n} k={shapes.k}"
    return "\n".join([head, f"  lhs {_describe(lhs)}", f"  rhs {_describe(rhs)}", "reasons:", *lines])


def _describe(spec: Operand) -> str:
    return ", ".join(f"{name}={value}" for name, value in spec._asdict().items() if value)
