"""QTensor: the one array type that stands in a parameter tree where an array stood; Layout: how it maps to [n, k]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jqopt import _hadamard, formats
from jqopt._numerics import dequantize_matrix, quantize_matrix
from jqopt.errors import UnsupportedError
from jqopt.formats import Format


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter's axes become a stack of matrices [*stack, n, k], k contracted.

    `atoms` refines `shape`: each axis is the product of consecutive atoms. `stack`, `rows`, `cols` are atom indices, in
    the order of the data; together they name every atom once. Leading stack atoms may be missing from an array (a scan
    slices them off), and an array may have further axes in front (a vmap adds them): both directions allow for that.
    """

    shape: tuple[int, ...]
    atoms: tuple[int, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    def __post_init__(self):
        order = (*self.stack, *self.rows, *self.cols)
        axes = [math.prod(self.atoms[i] for i in axis) for axis in self.axes()]
        if sorted(order) != list(range(len(self.atoms))) or axes != list(self.shape):
            raise UnsupportedError(
                f"layout: stack {self.stack}, rows {self.rows} and cols {self.cols} must name each of the atoms "
                f"{self.atoms} once, and these must multiply, in order, to the axes of the shape {self.shape}"
            )

    @classmethod
    def of(cls, shape: Sequence[int], axis: int | Sequence[int] = -1, stack: Sequence[int] = ()) -> Layout:
        """The layout of an array of this shape whose contracted axes are `axis` and stacked ones `stack`.

        Raises:
            UnsupportedError: an axis is out of range or named twice.
        """
        ndim = len(shape)
        named = [axis] if isinstance(axis, int) else list(axis)
        wrong = [a for a in (*named, *stack) if not -ndim <= a < ndim]
        cols, front = tuple(a % ndim for a in named if a not in wrong), tuple(a % ndim for a in stack if a not in wrong)
        if wrong or len({*cols, *front}) != len(cols) + len(front):
            raise UnsupportedError(
                f"axis {axis!r} and stack {tuple(stack)!r} must name different axes of an array of shape "
                f"{tuple(shape)}; write axes from {-ndim} to {ndim - 1}"
            )
        rows = tuple(a for a in range(ndim) if a not in cols and a not in front)
        return cls(tuple(shape), tuple(shape), front, rows, cols)

    @property
    def n(self) -> int:
        """Rows of each matrix."""
        return math.prod(self.atoms[i] for i in self.rows)

    @property
    def k(self) -> int:
        """Columns of each matrix: the length of the contraction."""
        return math.prod(self.atoms[i] for i in self.cols)

    def sliced(self, count: int) -> Layout:
        """This layout with its first `count` stack atoms gone from the shape."""
        gone = set(self.stack[:count])
        kept = [i for i in range(len(self.atoms)) if i not in gone]
        index = {old: new for new, old in enumerate(kept)}
        axes = [[self.atoms[i] for i in axis if i in index] for axis in self.axes()]
        return Layout(
            tuple(math.prod(axis) for axis in axes if axis),
            tuple(self.atoms[i] for i in kept),
            *(tuple(index[i] for i in part if i in index) for part in (self.stack, self.rows, self.cols)),
        )

    def axes(self) -> list[list[int]]:
        """The atoms of each axis of the shape: each takes at least one, until their product is its size."""
        axes, start = [], 0
        for size in self.shape:
            stop = start + 1
            while math.prod(self.atoms[start:stop]) != size and stop < len(self.atoms):
                stop += 1
            axes.append(list(range(start, min(stop, len(self.atoms)))))
            start = stop
        if axes:
            axes[-1].extend(range(start, len(self.atoms)))
        return axes

    def for_stack(self, ndim: int) -> tuple[Layout, int]:
        """The layout of matrices with `ndim` axes in front of [n, k], and how many of them are not this layout's."""
        missing = len(self.stack) - ndim
        return (self.sliced(missing), 0) if missing > 0 else (self, -missing)

    def to_matrix(self, x: Array) -> Array:
        """[*shape] -> [*stack, n, k]; further leading axes stay in front; sliced-off stack atoms may be missing."""
        layout, extra = self, x.ndim - len(self.shape)
        dropped = 0
        while tuple(x.shape[max(extra, 0) :]) != layout.shape:
            dropped += 1
            if dropped > len(self.stack):
                raise UnsupportedError(
                    f"an array of shape {x.shape} does not have the layout's shape {self.shape}, with or without its "
                    f"{len(self.stack)} stacked axes"
                )
            layout = self.sliced(dropped)
            extra = x.ndim - len(layout.shape)
        return layout._to_matrix(x, extra)

    def _to_matrix(self, x: Array, extra: int) -> Array:
        lead = x.shape[:extra]
        order = [*range(extra), *(extra + i for i in (*self.stack, *self.rows, *self.cols))]
        atoms = x.reshape((*lead, *self.atoms)).transpose(order)
        return atoms.reshape((*lead, *(self.atoms[i] for i in self.stack), self.n, self.k))

    def from_matrix(self, m: Array) -> Array:
        """[*stack, n, k] -> [*shape]; leading stack atoms may be missing, and further axes may stand in front."""
        layout, extra = self.for_stack(m.ndim - 2)
        lead = m.shape[:extra]
        order = (*layout.stack, *layout.rows, *layout.cols)
        atoms = m.reshape((*lead, *(layout.atoms[i] for i in order)))
        back = [*range(extra), *(extra + order.index(i) for i in range(len(order)))]
        return atoms.transpose(back).reshape((*lead, *layout.shape))


_LEAVES = ("data", "scale", "global_scale", "zero_point", "input_scale", "pre_scale", "low_a", "low_b")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized parameter: a pytree of uint8, int8 and float32 arrays, each with the stacked axes first.

    Leaves: `data` [*stack, n, bytes] packed codes; `scale` [*stack, rows, cols] float32, or e4m3/e8m0 bits in uint8;
    `global_scale` [*stack]; `zero_point` like scale; `input_scale` [*stack], the static scale of the activation that
    meets this parameter; `pre_scale` [*stack, k], which the activation is multiplied with before it is quantized;
    `low_a` [*stack, r, k] and `low_b` [*stack, n, r] bfloat16, a low-rank part that reads the activation before that.
    `rotation`: the block of the Hadamard transform that the activation goes through first; 0: none.
    `feedback` [*stack, blocks, b, b] bfloat16: how the activation's rounding errors move the channels after them, as
    `jqopt._feedback.factors` makes it from the weights; it is not stored in checkpoints but made again.
    """

    BY_ROW: ClassVar[tuple[str, ...]] = ("data", "scale", "zero_point", "low_b")
    """Leaves [*stack, n or 1, ...] with something for each row of the matrix."""

    DERIVED: ClassVar = ("feedback",)
    """Leaves that are made from the others, and not stored in checkpoints."""

    data: Array
    scale: Array
    global_scale: Array | None
    zero_point: Array | None
    input_scale: Array | None
    pre_scale: Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    granularity: str = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    low_a: Array | None = None
    low_b: Array | None = None
    rotation: int = dataclasses.field(default=0, metadata={"static": True})
    feedback: Array | None = None

    @classmethod
    def quantize(
        cls,
        x: Array,
        format: str | Format,
        *,
        axis: int | Sequence[int] = -1,
        stack: Sequence[int] = (),
        granularity: str | None = None,
        tensor_amax: Array | None = None,
        layout: Layout | None = None,
    ) -> QTensor:
        """Quantize an array; for x [n, k] and axis -1 the leaves have the layout of the class's docstring.

        Args:
            axis: the contracted axis or axes (k); `stack`: axes that are independent matrices (layers, experts).
            granularity: "block", "channel", "token" or "tensor"; the format's own unless given.
            tensor_amax: [*stack] float32, an amax for the global scale (nvfp4) or the scale of the tensor.
            layout: instead of `axis` and `stack`.

        Raises:
            UnsupportedError: x holds inf or NaN, is not floating point, or the format cannot do what is asked.
        """
        fmt = formats.get(format)
        x = jnp.asarray(x)
        _check_values(x, fmt)
        layout = Layout.of(x.shape, axis, stack) if layout is None else layout
        matrix = layout.to_matrix(x)
        codes = quantize_matrix(matrix, fmt, granularity=granularity, tensor_amax=tensor_amax)
        return cls(*codes, None, None, fmt, granularity or fmt.granularity, layout, x.dtype.name)

    def matrix(self) -> Array:
        """float32 [*stack, n, k]: what the codes stand for, as the GEMM sees it (see `whole` for the rest)."""
        leaves = (self.data, self.scale, self.global_scale, self.zero_point)
        return dequantize_matrix(*leaves, self.format, self.layout.k)

    def whole(self) -> Array:
        """float32 [*stack, n, k]: what the plain activation meets, everything beside the codes included."""
        matrix = self.matrix()
        if self.low_a is not None and self.low_b is not None:
            matrix = matrix + jnp.matmul(self.low_b.astype(jnp.float32), self.low_a.astype(jnp.float32))
        if self.pre_scale is not None:
            matrix = matrix * self.pre_scale[..., None, :]
        return _hadamard.inverse(matrix, self.rotation) if self.rotation else matrix

    def dequantize(self) -> Array:
        """The parameter this stands for, in its own shape and dtype, everything beside the codes included."""
        return self.layout.from_matrix(self.whole()).astype(self.dtype)

    @property
    def is_plain(self) -> bool:
        """Does the activation meet the codes as it is: no rotation, scale or low-rank part beside them?"""
        return self.rotation == 0 and self.pre_scale is None and self.low_a is None

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, as sliced or stacked as the leaves are."""
        layout, extra = self.layout.for_stack(self.data.ndim - 2)
        return (*self.data.shape[:extra], *layout.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves as stored (packed); factors of feedback aren't."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self._arrays().values())

    @property
    def bits_per_value(self) -> float:
        """8 * nbytes / size: codes, scales and everything else that is stored."""
        return 8 * self.nbytes / max(self.size, 1)

    def replace(self, **changes: Any) -> QTensor:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def _arrays(self) -> dict[str, Any]:
        leaves = {name: getattr(self, name) for name in _LEAVES}
        return {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "dtype")}

    def __repr__(self) -> str:
        if not all(hasattr(leaf, "ndim") for leaf in (self.data, self.scale)):  # a tree of placeholders
            return f"QTensor({self.format.name}, layout={self.layout.shape})"
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"QTensor({self.format.name}, {self.dtype}[{shape}], {self.granularity}, {self.nbytes} bytes)"


def _check_values(x: Array, format: Format) -> None:
    """Refuse what has no codes. Under a trace values are unknown, and NaN shows up in the result instead."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UnsupportedError(
            f"cannot quantize an array of dtype {x.dtype} to {format.name!r}: expected floating point; "
            "write x.astype(jnp.float32)"
        )
    if x.ndim == 0:
        raise UnsupportedError(f"cannot quantize a scalar to {format.name!r}: expected at least one axis")
    if isinstance(x, Tracer) or bool(jnp.isfinite(x).all()):
        return
    bad = {"NaN": int(jnp.isnan(x).sum()), "inf": int(jnp.isinf(x).sum())}
    found = " and ".join(f"{count} {name}" for name, count in bad.items() if count)
    raise UnsupportedError(
        f"cannot quantize an array of shape {x.shape} to {format.name!r}: it holds {found} among {x.size} values; "
        "expected finite values; clean it first, e.g. with jnp.nan_to_num(x)"
    )
