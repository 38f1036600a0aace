"""A linear layer's three GEMMs on quantized operands: y = x w^T, dx = dy w, dw = dy^T x, as one custom derivative.

Each operand is quantized once for each GEMM that reads it (rowwise, columnwise); what the backward pass reads is kept
as packed codes, named for remat policies. See docs/training.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jqopt import _compat
from jqopt._numerics import from_bits, to_bits
from jqopt._recipe_train import TrainSpec
from jqopt.errors import UnsupportedError
from jqopt.train import _dither
from jqopt.train._conv import Windows
from jqopt.train._gather import Gather
from jqopt.train._operand import COLUMNS, ROWS, Measured, Packed, Quantizer, codes, measure, pinned, quantizer, unpacked
from jqopt.train._operand import values as quantized

NAME = "jqopt_q"
"""What the packed codes of the backward pass, and the outputs of quantized products, are called for remat policies."""

INPUT, WEIGHT, GRAD = 0, 1, 2
"""Places of the operands in the scales of delayed scaling."""


@dataclasses.dataclass(frozen=True)
class Gemms:
    """The static facts of a site: a quantizer, or None, for each copy of each operand.

    `dtypes`: of x, w and y. `amax_axes`: mesh axes of a shard_map over which largest values are shared. `spread`: how
    many devices' cotangents of the delayed scales are summed. `windows`: of a convolution, whose x is an image, and
    whose rows are its windows. `gather`: where w lies cut over a mesh, how its codes are gathered. `salt`: what this
    site's keys differ by from those of others.
    """

    input: tuple[Quantizer | None, Quantizer | None]
    weight: tuple[Quantizer | None, Quantizer | None]
    grad: tuple[Quantizer | None, Quantizer | None]
    backward: str = "quantized"
    scope: str = "global"
    dtypes: tuple[str, str, str] = ("float32", "float32", "float32")
    amax_axes: tuple[str, ...] = ()
    spread: int = 1
    ragged: bool = False
    where: str = ""
    windows: Windows | None = None
    gather: Gather | None = None
    salt: tuple[int, int] = (0, 0)

    @property
    def stochastic(self) -> bool:
        return any(q is not None and q.stochastic for q in self.grad)

    @property
    def delayed(self) -> bool:
        return any(q is not None and q.delayed for q in (*self.input, *self.weight, *self.grad))

    @property
    def shares(self) -> bool:
        """Can products of one x share its quantized copies? Not where each has scales, or a collective, of its own."""
        own = any(q is not None and q.delayed for q in self.input)
        return self.input[0] is not None and not own and not self.amax_axes

    @property
    def kept(self) -> tuple[tuple[Quantizer | None, int], tuple[Quantizer | None, int]]:
        """How x and w are kept for the backward pass: (quantizer, the axis its copy is contracted along)."""
        if self.backward == "high_precision":
            return (None, COLUMNS), (None, COLUMNS)
        if self.backward == "dequantized":
            return (self.input[0], ROWS), (self.weight[0], ROWS)
        return (self.input[1], COLUMNS), (self.weight[1], COLUMNS)

    def rows(self, x: Array) -> Array:
        """x as float32 [*stack, m, k], surely rounded to its own dtype before; of a convolution its windows."""
        return pinned(x) if self.windows is None else self.windows.rows(pinned(x))


def gemms(spec: TrainSpec, ragged: bool = False, where: str = "", name: str = "") -> Gemms:
    """What a recipe's section asks of a site. Ragged products have no Hadamard transform: it would mix groups.

    Args:
        name: by which its random numbers are told from those of other sites.
    """

    def both(o: Any) -> tuple[Quantizer | None, Quantizer | None]:
        return (None, None) if o is None else (quantizer(o), quantizer(o.columns, hadamard=not ragged))

    operands = (both(spec.input), both(spec.weight), both(spec.grad))
    first, second, *_ = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4").tolist()
    return Gemms(*operands, spec.backward, spec.amax_scope, ragged=ragged, where=where, salt=(first, second))


class Copies(NamedTuple):
    """x, quantized for all products that read it, floats as their bits (which no gradient passes through).

    `read`: what fprop multiplies, and the scale of the whole. `kept`: for the backward pass; None: x itself is kept.
    """

    read: tuple[Array, Array | None]
    kept: Packed | None


def copies(how: Gemms, x: Array) -> Copies:
    """The copies of x [*stack, m, k] that `linear` takes as `given`, for several products of one x.

    Without them each product makes its own: XLA would compute those once, but a scan keep each of them. (What is kept
    for a backward pass that isn't asked for, jit leaves out.)
    """
    assert how.shares, how
    rows = how.rows(lax.stop_gradient(x))
    wanted = _wanted(how, INPUT, True)
    measured = [measure(rows, q, axis) for _, q, axis in wanted]
    (first, (q, axis)) = how.input[0], how.kept[INPUT]
    assert first is not None
    read = quantized(measured[_at(wanted, INPUT, first, ROWS)], first, ROWS)
    kept = None
    if q is not None:
        at = _at(wanted, INPUT, q, axis)
        kept = checkpoint_name(_bits(codes(measured[at], q, wanted[at][2])), NAME)
    return Copies(_bits(read), kept)


def _bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: to_bits(x) if x.dtype == jnp.float32 else x, tree)


def _floats(tree: Any) -> Any:
    return jax.tree.map(lambda x: from_bits(x) if x.dtype == jnp.uint32 else x, tree)


def linear(
    how: Gemms,
    x: Array,
    w: Array,
    scales: Array | None = None,
    key: Array | None = None,
    groups: Array | None = None,
    place: Array | None = None,
    given: Copies | None = None,
) -> Array:
    """x [*stack, m, k] times w [*stack, n, k], transposed, on quantized operands: [*stack, m, n] in y's dtype.

    Args:
        x: with `how.windows` the input of a convolution; it is kept as such where its windows are not quantized.
        scales: of delayed scaling: encode scales float32 [3] of x, w and dy. Their cotangent is not a derivative but
            the largest values of this step, float32 [3].
        key: uint32 [2] for stochastic rounding of dy: the step's and layer's. Only gradients need it.
        groups: of ragged products (x [m, k], w [g, n, k]): int32 [g], how many rows each w has.
        place: uint32 [2], the first row and the first column of dy that this device holds, where it holds a part.
        given: `copies` of x.
    """
    return checkpoint_name(_product(how, x, w, scales, (key, place), groups, given), NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: Gemms, x: Array, w: Array, scales: Any, random: Any, groups: Any, given: Copies | None) -> Array:
    return _forward(how, x, w, scales, groups, given, False)[0]


def _forward(
    how: Gemms, x: Array, w: Array, scales: Any, groups: Any, given: Copies | None, training: bool
) -> tuple[Array, Any]:
    operands = {WEIGHT: pinned(w if how.gather is None else how.gather.lying(w))}
    if given is None:
        operands[INPUT] = how.rows(x)
    wanted = [each for i in (INPUT, WEIGHT) if i in operands for each in _wanted(how, i, training)]
    measured = _shared([(q, measure(operands[i], q, axis)) for i, q, axis in wanted], how.amax_axes)
    past = [None if scales is None else scales[i] for i in (INPUT, WEIGHT)]

    def packed(i: int, q: Quantizer, axis: int) -> Packed:
        at = _at(wanted, i, q, axis)
        made = codes(measured[at], q, wanted[at][2], _delayed(q, past[i]))
        return made if how.gather is None or i != WEIGHT else how.gather.lying(made)

    def copy(i: int, q: Quantizer | None, axis: int) -> tuple[Array, Array | None]:
        if q is None:
            return operands[i], None
        if how.gather is not None and i == WEIGHT:
            return _whole(how.gather, how.gather.gathered(packed(i, q, axis)), q, axis, w.shape[-1])
        return quantized(measured[_at(wanted, i, q, axis)], q, axis, _delayed(q, past[i]))

    a = copy(INPUT, how.input[0], ROWS) if given is None else _floats(given.read)
    b = copy(WEIGHT, how.weight[0], ROWS)
    y = FPROP[how.ragged](*a, *b, groups).astype(how.dtypes[2])
    if not training:
        return y, None
    kept = []
    for i, (q, axis) in enumerate(how.kept):
        if q is None:
            kept.append((x, w)[i])
        elif given is not None and i == INPUT:
            kept.append(given.kept)
        else:
            kept.append(checkpoint_name(_bits(packed(i, q, axis)), NAME))
    amax = None
    if scales is not None:
        amax = [jnp.max(measured[at].whole) if at is not None else jnp.zeros((), jnp.float32)
                for at in (_first(wanted, INPUT), _first(wanted, WEIGHT))]  # fmt: skip
    return y, (kept, jnp.zeros((0, w.shape[-1])), scales, amax)


def _wanted(how: Gemms, i: int, training: bool) -> list[tuple[int, Quantizer, int]]:
    """The copies of an operand (operand, quantizer, axis), each once."""
    out: list[tuple[int, Quantizer, int]] = []
    pairs = [((how.input, how.weight)[i][0], ROWS), *([how.kept[i]] if training else [])]
    for q, axis in pairs:
        if q is not None and _found(out, i, q, axis) is None:
            out.append((i, q, axis))
    return out


def _delayed(q: Quantizer, scale: Array | None) -> Array | None:
    return scale if q.delayed else None


def _found(wanted: Sequence[tuple[int, Quantizer, int]], i: int, q: Quantizer, axis: int) -> int | None:
    for at, (j, other, along) in enumerate(wanted):
        if i == j and q == other and (axis == along or q.same_both_ways(other)):
            return at
    return None


def _at(wanted: Sequence[tuple[int, Quantizer, int]], i: int, q: Quantizer, axis: int) -> int:
    at = _found(wanted, i, q, axis)
    assert at is not None
    return at


def _first(wanted: Sequence[tuple[int, Quantizer, int]], i: int) -> int | None:
    return next((at for at, (j, _, _) in enumerate(wanted) if i == j), None)


def _shared(measured: list[tuple[Quantizer, Measured]], axes: tuple[str, ...]) -> list[Measured]:
    """The largest values of whole tensors over these axes of a shard_map, in one collective."""
    at = [i for i, (q, _) in enumerate(measured) if q.global_amax]
    out = [m for _, m in measured]
    if not axes or not at:
        return out
    flat = lax.pmax(jnp.concatenate([out[i].whole.reshape(-1) for i in at]), axes)
    parts = jnp.split(flat, np.cumsum([out[i].whole.size for i in at])[:-1])
    for i, part in zip(at, parts, strict=True):
        out[i] = out[i]._replace(whole=part.reshape(out[i].whole.shape))
    return out


def _fwd(
    how: Gemms, x: Array, w: Array, scales: Any, random: Any, groups: Any, given: Copies | None
) -> tuple[Array, Any]:
    y, kept = _forward(how, x, w, scales, groups, given, True)
    return y, (kept, random, groups)


def _bwd(how: Gemms, residuals: Any, dy: Array) -> tuple:
    (kept, like, scales, amax), (key, place), groups = residuals
    if how.stochastic and key is None:
        raise UnsupportedError(
            f"{how.where or 'a linear layer'}: its recipe rounds gradients stochastically, and this gradient was asked "
            "for without random numbers; pass a new key in each step, `apply(..., quant_key=jax.random.key(step))`"
        )
    dy = pinned(dy)
    rows, columns = how.grad
    shared = rows is not None and rows.same_both_ways(columns)
    wanted = [(q, axis) for q, axis in ((rows, ROWS), (columns, COLUMNS)) if q is not None]
    wanted = wanted[:1] if shared else wanted
    measured = _shared([(q, measure(dy, q, axis)) for q, axis in wanted], how.amax_axes)
    given = None if scales is None else scales[GRAD]
    drawn = [(axis, m.values.shape) for (q, axis), m in zip(wanted, measured, strict=True) if q.stochastic]
    dithers = _dithers(copy_keys(how, key, [axis for axis, _ in drawn]), drawn, place) if drawn else {}

    def copy(q: Quantizer | None, axis: int) -> tuple[Array, Array | None]:
        if q is None:
            return dy, None
        m = measured[0 if shared else wanted.index((q, axis))]
        return quantized(m, q, axis, _delayed(q, given), dithers.get(axis))

    (xq, x_axis), (wq, w_axis) = how.kept
    x = _read(kept[0], xq, x_axis, like.shape[1], how.rows)
    if how.gather is None or wq is None:
        w = _read(kept[1], wq, w_axis, like.shape[1], pinned)
    else:
        w = _whole(how.gather, how.gather.again(_floats(kept[1])), wq, w_axis, like.shape[1])
    first = copy(rows, ROWS)
    second = first if shared else copy(columns, COLUMNS)
    dx = DGRAD[how.ragged](*first, *w, groups)
    dx = (dx if how.windows is None else how.windows.summed(dx)).astype(how.dtypes[0])
    dw = WGRAD[how.ragged](*second, *x, groups).astype(how.dtypes[1])
    dw = dw if how.gather is None else how.gather.lying(dw)
    seen = None
    if scales is not None:
        largest = jnp.max(measured[0].whole) if measured else jnp.zeros((), jnp.float32)
        seen = jnp.stack([*amax, largest]) * jnp.float32(1 / how.spread)
        seen = _compat.vary(seen, _compat.varying(scales))  # their sum over the devices is the largest value again
    return dx, dw, seen, (_no_gradient(key), _no_gradient(place)), _no_gradient(groups), None


def _whole(gather: Gather, p: Packed, q: Quantizer, axis: int, k: int) -> tuple[Array, Array | None]:
    """Decoded where it was gathered: a decoder cut over the devices would have its floats gathered."""
    values, scale = unpacked(p, q, axis, k)
    return gather.gathered(values), scale


def copy_keys(how: Gemms, key: Array, axes: Sequence[int]) -> Array:
    """Keys of the copies of dy that are contracted along these axes, uint32 [copies, 2]: the site's and copy's words go
    into the step's key."""
    return key ^ np.asarray([[a ^ b for a, b in zip(_COPY[axis], how.salt, strict=True)] for axis in axes], np.uint32)


_COPY = {ROWS: (0x9E3779B9, 0x7F4A7C15), COLUMNS: (0xF39CC060, 0x5CEDC834)}
"""What a copy's key differs by: the streams of two keys have nothing in common, however alike these are."""


def _dithers(keys: Array, copies: Sequence[tuple[int, tuple[int, ...]]], place: Array | None) -> dict[int, Array]:
    """Random numbers for copies of dy, {axis: of its shape}: each has its own, of one shape they are drawn at once."""
    row, column = (0, 0) if place is None else (place[0], place[1])
    if len({shape for _, shape in copies}) == 1:
        drawn = list(_dither.uniform(keys, copies[0][1], row, column))
    else:
        drawn = [_dither.uniform(k, shape, row, column) for k, (_, shape) in zip(keys, copies, strict=True)]
    return {axis: numbers for (axis, _), numbers in zip(copies, drawn, strict=True)}


def _no_gradient(x: Array | None) -> Any:
    return None if x is None else np.zeros(x.shape, jax.dtypes.float0)


_product.defvjp(_fwd, _bwd)


def _read(
    kept: Any, q: Quantizer | None, axis: int, k: int, plain: Callable[[Array], Array]
) -> tuple[Array, Array | None]:
    return (plain(kept), None) if q is None else unpacked(_floats(kept), q, axis, k)


# The products --------------------------------------------------------------------------------------------------------


def _dot(a: Array, a_whole: Array | None, a_axis: int, b: Array, b_whole: Array | None, b_axis: int) -> Array:
    """a, b contracted along these axes, leading axes batched: float32 [*stack, free of a, free of b]."""
    a, a_whole = _outside(a, a_whole, a_axis)
    b, b_whole = _outside(b, b_whole, b_axis)
    lead = tuple(range(a.ndim - 2))
    numbers = (((a.ndim + a_axis,), (b.ndim + b_axis,)), (lead, lead))
    out = lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST, preferred_element_type=np.dtype(np.float32))
    if a_whole is not None:
        out = out * (a_whole if a_axis == ROWS else a_whole.mT)
    return out if b_whole is None else out * (b_whole.mT if b_axis == ROWS else b_whole)


def _outside(x: Array, whole: Array | None, axis: int) -> tuple[Array, Array | None]:
    """A scale that differs along the contraction can't be applied to the product: it goes into the values."""
    return (x, whole) if whole is None or whole.shape[axis] == 1 else (x * whole, None)


def _fprop(x, x_whole, w, w_whole, groups) -> Array:
    return _dot(x, x_whole, ROWS, w, w_whole, ROWS)


def _dgrad(dy, dy_whole, w, w_whole, groups) -> Array:
    return _dot(dy, dy_whole, ROWS, w, w_whole, COLUMNS)


def _wgrad(dy, dy_whole, x, x_whole, groups) -> Array:
    return _dot(dy, dy_whole, COLUMNS, x, x_whole, COLUMNS)


def _scaled(x: Array, whole: Array | None) -> Array:
    return x if whole is None else x * whole


def _ragged(a: Array, b: Array, groups: Array, contract: tuple[int, int], rows: bool) -> Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0] if rows else [],
    )
    return lax.ragged_dot_general(a, b, groups, numbers, precision=lax.Precision.HIGHEST,
                                  preferred_element_type=np.dtype(np.float32))  # fmt: skip


def _ragged_fprop(x, x_whole, w, w_whole, groups) -> Array:
    return _ragged(_scaled(x, x_whole), _scaled(w, w_whole), groups, (1, 2), True)


def _ragged_dgrad(dy, dy_whole, w, w_whole, groups) -> Array:
    return _ragged(_scaled(dy, dy_whole), _scaled(w, w_whole), groups, (1, 1), True)


def _ragged_wgrad(dy, dy_whole, x, x_whole, groups) -> Array:
    return _ragged(_scaled(dy, dy_whole), _scaled(x, x_whole), groups, (0, 0), False)


FPROP: tuple[Callable[..., Array], ...] = (_fprop, _ragged_fprop)
DGRAD: tuple[Callable[..., Array], ...] = (_dgrad, _ragged_dgrad)
WGRAD: tuple[Callable[..., Array], ...] = (_wgrad, _ragged_wgrad)
"""The three products of a plain and of a ragged site."""
