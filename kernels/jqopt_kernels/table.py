"""Which kernel does an op: the first of the table that can, or every candidate's reason why it cannot."""

from __future__ import annotations

import difflib
from contextlib import AbstractContextManager

import jax

from ._gradient import held_constant
from ._types import Kernel, Operand, Shapes
from .attend import reference_attend, xla_attend
from .ffi_gemm import ffi_gemm
from .pallas_attend import pallas_attend
from .pallas_dot import pallas_gemm, pallas_gemv, pallas_skinny
from .pallas_grouped import pallas_ragged
from .quantize_table import QUANTIZERS
from .reference import reference, reference_ragged
from .triton_dot import (
    triton_fp8_block,
    triton_gemm,
    triton_gemm_large,
    triton_gemv,
    triton_scaled_gemm,
    triton_skinny,
)
from .xla_dot import xla_decode, xla_fp8, xla_fp8_dot, xla_int8, xla_int8_row
from .xla_grouped import xla_ragged
from .xla_lookup import xla_lookup
from .xla_row import xla_row
from .xla_scaled import xla_scaled
from .xla_tiled import xla_tiled, xla_tiled_bf16

# Order is preference. A new kernel is one file and one line here.
_KERNELS: tuple[Kernel, ...] = (
    xla_int8,
    xla_int8_row,
    xla_fp8,
    xla_fp8_dot,
    xla_scaled,
    triton_scaled_gemm,
    triton_fp8_block,
    triton_skinny,
    triton_gemv,
    triton_gemm,
    ffi_gemm,
    xla_tiled_bf16,
    xla_row,
    xla_tiled,
    pallas_gemv,
    pallas_skinny,
    pallas_gemm,
    xla_lookup,
    xla_decode,
    triton_gemm_large,
    reference,
    *QUANTIZERS,
    pallas_ragged,
    xla_ragged,
    reference_ragged,
    pallas_attend,
    xla_attend,
    reference_attend,
)

KERNELS = tuple(held_constant(k) if k.op in ("qdot", "ragged", "attend") else k for k in _KERNELS)

FAMILIES = ("xla", "triton", "pallas", "ffi", "reference")

# JAX keeps what was traced under one value of it apart from what was traced under another.
_ASKED = jax.make_user_context(None)


def backends(op: str = "qdot") -> tuple[str, ...]:
    """What may be asked for in place of the first that can: a family of kernels, or one kernel of `op` by its name."""
    return (*FAMILIES, *(k.name for k in KERNELS if k.op == op and k.name not in FAMILIES))


def using(backend: str) -> AbstractContextManager:
    """Within it, `find` takes the kernels of this family or name only, where its caller names none.

    An op that has no such kernel is left as it is.

        with jqopt_kernels.using("xla"):
            y = model(quant, x)

    Kernels are chosen when a function is traced, and JAX traces again for each value: what was jitted outside is not
    what runs inside. Takes effect in this thread.

    Raises:
        ValueError: no family and no kernel has that name.
    """
    every = (*FAMILIES, *(k.name for k in KERNELS if k.name not in FAMILIES))
    if backend not in every:
        close = difflib.get_close_matches(str(backend), every, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"no kernel or family is called {backend!r}{hint} Known: {', '.join(every)}")
    return _ASKED(backend)


def asked(op: str | None = None) -> str | None:
    """The backend that `using` asks for here, or None; also None where it has no kernel for `op`."""
    return _ASKED.value if op is None or _candidates(op, _ASKED.value) else None


class KernelRefusal(Exception):
    """One kernel's reason why it cannot do what was asked."""

    def __init__(self, kernel: str, reason: str) -> None:
        super().__init__(f"{kernel}: {reason}")
        self.kernel, self.reason = kernel, reason


class NoKernelError(ExceptionGroup[KernelRefusal]):
    """No kernel does what was asked; holds each candidate's KernelRefusal, and tells them all in its message."""

    def derive(self, excs):
        return NoKernelError(self.message, excs)

    def __str__(self) -> str:
        return self.message  # it names every reason already: not "(8 sub-exceptions)"


def explain(
    op: str, lhs: Operand, rhs: Operand, device: str, shapes: Shapes, backend: str | None = None
) -> list[tuple[str, str | None]]:
    """(kernel name, None if it can, else why not) for the kernels of `op`, in order of preference.

    backend: only the kernel of this name, or the kernels of this family (xla, triton, pallas, ffi, reference).
    """
    return [(k.name, k.supports(lhs, rhs, device, shapes)) for k in _candidates(op, backend or asked(op))]


def find(op: str, lhs: Operand, rhs: Operand, device: str, shapes: Shapes, backend: str | None = None) -> Kernel:
    """The first kernel of `op` that can do it; with `backend`, or else within `using`, of that name or family.

    device: "cpu", "tpu", "gpu", "cuda", "rocm", or "cuda:90" with its capability (`jqopt_kernels.here()`).
    Raises NoKernelError if none can, if the named ones cannot, or if no kernel or family has that name.
    """
    backend = backend or asked(op)
    candidates = _candidates(op, backend)
    if not candidates:
        raise _unknown(op, backend)
    refusals = []
    for kernel in candidates:
        why = kernel.supports(lhs, rhs, device, shapes)
        if why is None:
            return kernel if kernel.on is None else kernel._replace(run=kernel.on(device))
        refusals.append(KernelRefusal(kernel.name, why))
    raise NoKernelError(_refusal(op, lhs, rhs, device, shapes, refusals), refusals)


def _candidates(op: str, backend: str | None) -> list[Kernel]:
    return [k for k in KERNELS if k.op == op and backend in (None, k.name, k.backend)]


def _unknown(op: str, backend: str | None) -> NoKernelError:
    of_op = [k for k in KERNELS if k.op == op]
    if not of_op:
        reason = f"no kernels for op {op!r}; ops are {', '.join(sorted({k.op for k in KERNELS}))}"
        return NoKernelError(reason, [KernelRefusal(str(backend or "any"), reason)])
    families = dict.fromkeys(k.backend for k in of_op)
    reason = (
        f"no kernel named {backend!r} for {op!r}; kernels of {op!r}: {', '.join(k.name for k in of_op)}; "
        f"families: {', '.join(families)}"
    )
    return NoKernelError(reason, [KernelRefusal(str(backend), reason)])


def _refusal(op, lhs, rhs, device, shapes, refusals: list[KernelRefusal]) -> str:
    head = f"no kernel can do {op} on {device!r} with m={shapes.m} n={shapes.n} k={shapes.k}"
    return "\n".join(
        [head, f"  lhs {_describe(lhs)}", f"  rhs {_describe(rhs)}", "reasons:", *(f"  {r}" for r in refusals)]
    )


def _describe(spec: Operand) -> str:
    return ", ".join(f"{name}={value}" for name, value in spec._asdict().items() if value)
