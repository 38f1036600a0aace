"""Weights that lie cut over a mesh (FSDP): quantized where they lie, and gathered as packed codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jqopt._trace import Site
from jqopt._view import Atom
from jqopt.errors import PlanError
from jqopt.train._operand import ROWS, Quantizer

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Gather:
    """Where the matrices [*stack, n, k] of a weight lie, and where a product reads them; a static value."""

    cut: NamedSharding
    whole: NamedSharding

    def lying(self, tree: Tree) -> Tree:
        """Arrays [*stack, rows, columns] of a weight, each device's part where its part of the weight lies."""
        return jax.tree.map(lambda x: _placed(x, self.cut), tree)

    def gathered(self, tree: Tree) -> Tree:
        """The same, whole along the axes that are gathered."""
        return jax.tree.map(lambda x: _placed(x, self.whole), tree)

    def again(self, tree: Tree) -> Tree:
        """`gathered`, and not what was gathered for another product: nobody keeps that."""
        return self.gathered(lax.optimization_barrier(tree))


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x with this sharding of its matrices; an axis with fewer parts (one scale for all) is on every device."""
    sizes = sharding.mesh.shape
    spec = [None if n % _parts(names, sizes) else names for n, names in zip(x.shape, sharding.spec, strict=True)]
    return lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _parts(names: Any, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in _names(names))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


# The plan ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `prepare(..., gather=...)` asks for: the axes, and how each parameter lies, by path."""

    axes: tuple[str, ...]
    lies: Mapping[str, NamedSharding]


def asked(axes: str | Sequence[str], parameters: Mapping[str, Any]) -> Asked | None:
    """None without axes.

    Raises:
        PlanError: the parameters (arrays or shapes, by path) don't say that they lie on a mesh with these axes, Auto.
    """
    names = _names(axes)
    if not names:
        return None
    found = {p: getattr(leaf, "sharding", None) for p, leaf in parameters.items()}
    lies = {p: s for p, s in found.items() if isinstance(s, NamedSharding)}
    if not lies:
        raise PlanError(
            f"gather={axes!r}: no parameter says how it lies on a mesh; prepare with sharded parameters, such as "
            "jax.device_put(params, shardings), or with jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(...))"
        )
    for mesh in {s.mesh for s in lies.values()}:
        unknown = [n for n in names if n not in mesh.axis_names]
        if unknown:
            raise PlanError(
                f"gather={axes!r}: the parameters lie on a mesh with the axes {mesh.axis_names}, which has no "
                f"{unknown[0]!r}; write those along which weights are cut to be gathered, as FSDP does"
            )
        if AxisType.Explicit in mesh.axis_types:
            raise PlanError(
                f"gather={axes!r}: the mesh has Explicit axes. There the model itself says where a weight is gathered "
                "(jax.sharding.reshard), before its product; make the mesh with axis_types=(AxisType.Auto, ...)"
            )
    return Asked(names, lies)


def decide(
    want: Asked, site: Site, eqn: Any, inside: Sequence[str], copies: Sequence[tuple[Quantizer | None, int]]
) -> tuple[Gather | None, str]:
    """How a site's weight is gathered, and a note for the plan; '' of a weight that isn't cut along these axes.

    Args:
        inside: the primitives around the site. `copies`: of the weight: (quantizer, the axis that it is contracted
            along), of fprop and of dgrad.
    """
    lies = want.lies.get(site.path or "")
    if lies is None or not set(want.axes) & {n for entry in lies.spec for n in _names(entry)}:
        return None, ""
    floats = f"gathered over {', '.join(want.axes)} as floats: "
    if copies[0][0] is None:
        return None, floats + "the weight isn't quantized in fprop"
    if "shard_map" in inside:
        return None, floats + "it enters a shard_map whole"
    spec = _matrix_spec(site, eqn, lies)
    if isinstance(spec, str):
        return None, floats + spec
    why = next((w for q, axis in copies if (w := _uneven(q, axis, site, eqn, spec, lies.mesh.shape))), "")
    if why:
        return None, floats + why
    kept = [tuple(n for n in names if n not in want.axes) or None for names in spec]
    cut = NamedSharding(lies.mesh, PartitionSpec(*(names or None for names in spec)))
    back = "" if copies[1][0] is not None else ", of floats in dgrad"
    return Gather(cut, NamedSharding(lies.mesh, PartitionSpec(*kept))), (
        f"codes gathered over {', '.join(want.axes)}{back}"
    )


def matrices(site: Site, eqn: Any) -> list[list[int]]:
    """Which axes of the weight operand make each axis of its matrices [*stack, n, k], outermost first.

    An equation may list contracted axes in any order (einsum reverses them); k, hence blocks, follow the parameter's
    memory, as those of packed weights do.
    """
    if site.op == "ragged_dot":
        return [[0], [2], [1]]
    if site.op == "conv":
        out, channels, *spatial = map(int, eqn.params["dimension_numbers"].rhs_spec)
        return [[out], [*spatial, channels]]
    view = site.view
    assert view is not None, site.key
    contract, batch = (list(map(int, d[site.operand])) for d in eqn.params["dimension_numbers"])
    contract.sort(key=lambda i: [(a.axis, -a.stride) for a in view.axes[i]])
    free = [i for i in range(eqn.invars[site.operand].aval.ndim) if i not in (*contract, *batch)]
    return [*([i] for i in batch), free, contract]


def _matrix_spec(site: Site, eqn: Any, lies: NamedSharding) -> list[tuple[str, ...]] | str:
    """The mesh axes that cut each axis of the matrices [*stack, n, k] in parts that follow each other; or why not."""
    view, sizes = site.view, lies.mesh.shape
    assert view is not None, site.key
    if site.op == "conv" and int(eqn.params["feature_group_count"]) > 1:
        return "its convolution has feature groups"
    first = [_first([a for d in dims for a in view.axes[d]]) for dims in matrices(site, eqn)]
    spec: list[tuple[str, ...]] = [() for _ in first]
    for axis, entry in enumerate(lies.spec):
        parts = _parts(entry, sizes)
        if parts == 1:
            continue
        outer = max((a for a in view.atoms() if a.axis == axis and a.full > 1), key=lambda a: a.stride)
        if outer in (a.whole for a in (*view.scanned, *view.fixed)):
            return f"axis {axis} of the parameter is cut, which holds layers"
        if outer not in first or outer.full % parts:
            return f"axis {axis} of the parameter is cut, and its matrix isn't in parts that follow each other"
        spec[first.index(outer)] = _names(entry)
    return spec


def _first(atoms: Sequence[Atom]) -> Atom | None:
    """The outermost of these factors, where it is whole."""
    found = next((a for a in atoms if a.size > 1), None)
    return found if found is not None and found.is_whole else None


def _uneven(
    q: Quantizer | None, axis: int, site: Site, eqn: Any, spec: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> str:
    """Why a device's part of a matrix isn't packed by itself: '' if it is in whole tiles and bytes."""
    if q is None:
        return ""
    shape = eqn.invars[site.operand].aval.shape
    n, k = (math.prod(shape[d] for d in dims) for dims in matrices(site, eqn)[-2:])
    parts = [_parts(names, sizes) for names in spec[-2:]]
    mine = (n // parts[0], k // parts[1])
    tile = (1, 1) if q.tile is None else q.tile if axis == ROWS else q.tile[::-1]
    if any(p > 1 and size % t for p, size, t in zip(parts, mine, tile, strict=True)):
        return f"a part of {mine[0]}x{mine[1]} isn't in whole tiles of {tile[0]}x{tile[1]}"
    return f"a part of {mine[1]} codes isn't in whole bytes" if mine[1] * q.format.element.bits % 8 else ""
