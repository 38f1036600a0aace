"""What an export will write, decided before a byte is: the scheme of each parameter, the cache, the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jqopt import _attention
from jqopt.errors import UnsupportedError
from jqopt.export import schemes
from jqopt.export.layouts import SHAPE, Size
from jqopt.export.parameters import Packed, Parameter, Parameters
from jqopt.export.schemes import KV, Asked, Module, Row, Target
from jqopt.hf import folder as _folder
from jqopt.hf import mapped
from jqopt.hf.families import Place
from jqopt.hf.folder import Identity
from jqopt.hf.mapped import Cut
from jqopt.hf.names import NameMap

WEIGHT = ".weight"
EXPERTS = ".experts."
"""What the names of experts' tensors hold, and of no others'."""


class Part(NamedTuple):
    """One parameter and what becomes of it; row None: it stays in floats. `cut`: it is one tensor of the parameter."""

    place: Place
    parameter: Parameter
    row: Row | None
    size: Size | None
    cut: Cut | None = None

    @property
    def modules(self) -> list[str]:
        return [name.removesuffix(WEIGHT) for name in self.place.tensors]

    @property
    def packed(self) -> Packed:
        assert self.parameter.packed is not None
        return self.parameter.packed


class Scale(NamedTuple):
    """The scales of one kind ("k", "v") of one attention's cache, for each of its modules."""

    key: str
    leaf: str
    names: tuple[str, ...]


class Job(NamedTuple):
    """Everything that is decided before a byte is written."""

    parts: tuple[Part, ...]
    scales: tuple[Scale, ...]
    kv: KV | None
    factor: float
    dtype: np.dtype
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    notes: tuple[str, ...]


def make_job(
    params: Parameters, model: Identity, target: Target, engine: str | None, dtype: Any, names: NameMap | None = None
) -> Job:
    """Decides everything; no array but the small ones that layers must share is read.

    Args:
        names: of a model that isn't jqopt's own decoder.

    Raises:
        UnsupportedError: something the target can't hold, or that the engine doesn't load.
    """
    cuts: list[tuple[Place, Cut | None]]
    if names is None:
        cuts = [(place, None) for place in _folder.places_of(model, params.leaves)]
    else:
        cuts = [*mapped.places_of(model, names, params.leaves)]
    places = [place for place, _ in cuts]
    parts = _chosen(params, cuts, target, engine)
    _check_fused(params, parts)
    kv, scales = _cache(params, places, target)
    if not any(p.row for p in parts):
        raise UnsupportedError(f"no linear layer is quantized, so there is nothing for {target.name} to hold")
    to = _model_dtype(params, model, dtype)
    modules = [m for p in parts if p.place.transpose for m in _modules(p)]
    linear = {m.name for m in modules}
    heads = [n.removesuffix(WEIGHT) for n in model.family.copies(model.parsed) if n.removesuffix(WEIGHT) not in linear]
    modules += [Module(head, None) for head in heads]
    tables = [m for p in parts if _is_table(p) for m in p.modules]
    quantization, files = target.describe(modules, tables, kv)
    config = {**model.with_dtype(to.name), _folder.QUANTIZATION: quantization}
    factor = 1.0 if kv is None else target.kv_factors[kv.algo]
    return Job(parts, scales, kv, factor, to, config, files, _notes(params, parts, to))


def _modules(part: Part) -> list[Module]:
    block = part.packed.format.block if part.row is not None and part.row.any_block else None
    block = block[1] if isinstance(block, tuple) else block
    return [Module(name, part.row, block) for name in part.modules]


def _is_table(part: Part) -> bool:
    return not part.place.transpose and mapped.rank_of(part.place, part.parameter, part.cut) == 2


def _chosen(
    params: Parameters, cuts: Sequence[tuple[Place, Cut | None]], target: Target, engine: str | None
) -> tuple[Part, ...]:
    """The row of each packed parameter."""
    asked: dict[str, Asked] = {}
    for place, cut in cuts:
        packed = params.leaves[place.path].packed
        if packed is not None:
            _check_oriented(place, packed, cut)
            decision = params.plan.quantized[place.path]
            asked[place.path] = Asked(
                packed.format, packed.granularity, decision.input_format, "pre_scale" in packed.leaves,
                "low_a" in packed.leaves, packed.rotation != 0, any(EXPERTS in t for t in place.tensors),
            )  # fmt: skip
    smoothed = {a._replace(pre_scale=False) for a in asked.values() if a.pre_scale}
    out = []
    for place, cut in cuts:
        leaf = params.leaves[place.path]
        if leaf.packed is None:
            out.append(Part(place, leaf, None, None, cut))
            continue
        a = asked[place.path]
        row = schemes.choose(target, place.path, a, engine, a._replace(pre_scale=False) in smoothed)
        format, layout = leaf.packed.format, leaf.packed.layout
        rows = layout.n if cut is None or cut.source is None else len(cut.source.rows)
        size = schemes.size_of(place.path, row, format, leaf.packed.granularity, rows, layout.k)
        _check_leaves(place.path, row, leaf.packed)
        out.append(Part(place, leaf, row, size, cut))
    return tuple(out)


def _check_oriented(place: Place, packed: Packed, cut: Cut | None) -> None:
    """The packed matrix must be [out, in], as a linear layer's weight stands in the files."""
    if cut is not None and place.transpose:
        return  # its rows and columns have been found
    layout, lead = packed.layout, len(_folder.stack_of(place))
    axes = layout.axes()
    stack = tuple(i for axis in axes[:lead] for i in axis)
    fits = place.transpose and len(axes) == lead + 2 and (layout.stack, layout.cols, layout.rows) == (
        stack, tuple(axes[lead]), tuple(axes[lead + 1])
    )  # fmt: skip
    if not fits:
        turned = not place.transpose and len(axes) == lead + 2 and layout.cols == tuple(axes[lead])
        why = (
            "stands as [in, out] in the files (a Conv1D of transformers), and is no linear layer to the engines: none "
            "has a scheme for it. Serve it with target='stablehlo'."
            if turned
            else "isn't the weight of a linear layer that is packed along its inputs; engines read packed weights of "
            "linear layers only. Keep it with `keep: true` (embedding tables, and heads tied to them, are kept by "
            "defaults/skip_sensitive)."
        )
        raise UnsupportedError(f"{place.path}: {place.tensors[0]} {why}")


def _check_leaves(path: str, row: Row, packed: Packed) -> None:
    held = {s.leaf for s in row.tensors}
    needed = {s.leaf for s in row.tensors if not s.optional and s.leaf != SHAPE}
    if missing := sorted(needed - set(packed.leaves)):
        raise UnsupportedError(f"{path}: {row.name} needs its {missing[0]}, which it lacks; calibrate the model first")
    lost = sorted(set(packed.leaves) - held)
    if lost:
        raise UnsupportedError(f"{path}: {row.name} has no place for its {lost[0]}")


def _check_fused(params: Parameters, parts: Sequence[Part]) -> None:
    """Layers that engines run as one matrix product must have one scheme and the same tensor-level scales."""
    at = {name: (part, i) for part in parts if part.place.transpose for i, name in enumerate(part.modules)}
    values: dict[tuple[str, str], np.ndarray] = {}

    def value(part: Part, i: int, leaf: str) -> np.ndarray | None:
        if leaf not in part.packed.leaves:
            return None
        key = (part.place.path, leaf)
        if key not in values:
            values[key] = by_tensor(part, params.read(*key), leaf)
        return values[key][i]

    for names in schemes.fused(list(at)):
        found = [at[name] for name in names]
        kinds = {None if p.row is None else (p.row.name, p.packed.format.block) for p, _ in found}
        if len(kinds) > 1:
            said = ", ".join(f"{n}: {'floats' if p.row is None else p.row.name}" for n, (p, _) in zip(names, found))
            raise UnsupportedError(
                f"engines run {' and '.join(names)} as one product, so all must have one scheme; found {said}. Write "
                "one rule for them in the recipe."
            )
        first = found[0][0]
        for stored in first.row.tensors if first.row is not None else ():
            scales = [value(part, i, stored.leaf) for part, i in found] if stored.shared else []
            if any((x is None) != (scales[0] is None) or not np.array_equal(x, scales[0]) for x in scales):  # type: ignore[arg-type]
                raise UnsupportedError(
                    f"{' and '.join(names)}: engines run them as one product with one {stored.leaf}, but theirs differ "
                    f"({', '.join('none' if x is None else str(np.ravel(x)[0]) for x in scales)}). Quantize them with "
                    "one rule, and without a `fuse` that parts them."
                )


def _cache(params: Parameters, places: Sequence[Place], target: Target) -> tuple[KV | None, tuple[Scale, ...]]:
    """The cache's format in the target, and its scales."""
    decisions = _attention.by_key(params.plan.attention)
    algos = {_cache_algo(key, roles, target) for key, roles in decisions.items()}
    if not algos:
        return None, ()
    if len(algos) > 1:
        raise UnsupportedError(f"attentions with different caches ({', '.join(sorted(algos))}); engines have one")
    algo, out = algos.pop(), []
    for key in decisions:
        own = [t for p in places if p.path.startswith(f"{key}/") for t in p.tensors if t.endswith(".k_proj.weight")]
        if not own:
            raise UnsupportedError(f"{key}: {target.name} keeps a cache's scales beside k_proj, which isn't there")
        for part in "kv":
            names = tuple(target.kv_name(t.removesuffix(".k_proj.weight"), part) for t in own)
            out.append(Scale(key, f"{part}_scale", names))
    return KV(algo), tuple(out)


def _cache_algo(key: str, roles: Mapping[str, _attention.OperandDecision], target: Target) -> str:
    extra = sorted(set(roles) - {"k", "v"})
    k, v = roles.get("k"), roles.get("v")
    odd = [d for d in roles.values() if d.spec is None or d.affine or d.rotated or not d.has_scale]
    if extra or odd or k is None or v is None or k.spec is None or v.spec is None:
        said = "; ".join(f"{r}: {', '.join(_attention.describe(d))}" for r, d in roles.items())
        raise UnsupportedError(
            f"{key}: {target.name} holds one known scale for keys and one for values, and nothing of queries, softmax "
            f"outputs, rotations or biases; found {said}. Quantize with `kv_cache: fp8` (or nvfp4), or without."
        )
    algos = {d.spec.element_format().name.upper() for d in (k, v) if d.spec is not None}
    if len(algos) > 1 or not algos <= set(target.kv_factors):
        raise UnsupportedError(
            f"{key}: a cache in {' and '.join(sorted(algos)).lower()} isn't held by {target.name}; it holds "
            f"{', '.join(target.kv_factors).lower()}" + (". Export it to modelopt." if algos <= {"NVFP4"} else ".")
        )
    return algos.pop()


def _model_dtype(params: Parameters, model: Identity, dtype: Any) -> np.dtype:
    """What unquantized parameters are written in: as told, else as config.json says, else as they are."""
    named = dtype or model.dtype
    if named is None:
        named = next((p.dtype for p in params.leaves.values() if p.packed is None), "float32")
    try:
        found = np.dtype(jnp.dtype(named))
    except TypeError:
        found = None
    if found is None or found.name not in ("float32", "bfloat16", "float16"):
        raise UnsupportedError(f"dtype {named!r} of unquantized parameters; expected float32, bfloat16 or float16")
    return found


def _notes(params: Parameters, parts: Sequence[Part], to: np.dtype) -> tuple[str, ...]:
    cast = {p.place.path for p in parts if p.row is None and p.parameter.dtype != to.name}
    notes = []
    if cast:
        froms = sorted({p.parameter.dtype for p in parts if p.row is None and p.parameter.dtype != to.name})
        notes.append(f"{len(cast)} unquantized parameters are written as {to.name}, from {', '.join(froms)}")
    if params.rest:
        notes.append(f"{len(params.rest)} arrays that are no parameters are left out: {', '.join(params.rest[:4])}")
    short = [p.place.path for p in parts if p.size is not None and _cut_tiles(p.packed, p.size)]
    if short:
        notes.append(f"{len(short)} weights have rows that are no multiple of their 128-row block, which vLLM asks for")
    packed = [p.place.path for p in parts if p.row is not None]
    specs = [f for path in packed if (f := params.plan.quantized[path].input_format) is not None]
    if any(f.feedback for f in specs):
        count = sum(1 for f in specs if f.feedback)
        notes.append(f"{count} weights have inputs that jqopt rounds with feedback; engines round them to nearest")
    if any(len(f.format.ranges) > 1 for f in specs):
        count = sum(1 for f in specs if len(f.format.ranges) > 1)
        notes.append(f"{count} weights have inputs whose scales jqopt chooses from several; engines take the largest")
    return tuple(notes)


def _cut_tiles(packed: Packed, size: Size) -> bool:
    tile = packed.format.tile
    return packed.granularity == "block" and tile is not None and tile[0] > 1 and size.n % tile[0] != 0


def by_tensor(part: Part, x: np.ndarray, leaf: str) -> np.ndarray:
    """A leaf [*stack, ...] as [tensors, ...]; one that inner stacked axes share is repeated for them."""
    if part.cut is not None:
        return part.cut.leaf(x, leaf, part.packed)[None]
    stack, own = _folder.stack_of(part.place), mapped.OWN[leaf]
    lead, rest = x.shape[: x.ndim - own], x.shape[x.ndim - own :]
    wide = x.reshape((*lead, *[1] * (len(stack) - len(lead)), *rest))
    return np.broadcast_to(wide, (*stack, *rest)).reshape((len(part.place.tensors), *rest))
