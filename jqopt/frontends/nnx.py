"""Flax NNX: a module as a function of its state, and replacement of its layers by quantized ones."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jqopt import _stage
from jqopt._apply import check_paths
from jqopt._plan import Decision
from jqopt._qtensor import QTensor
from jqopt._stage import Function
from jqopt.errors import PlanError, TraceError, UnsupportedError
from jqopt.frontends import _native, _state, path_name


def function_of(model: nnx.Module, params: Any = None) -> Function:
    """An NNX module as a function of {"params": its nnx.Param state, "state": everything else}.

    The pure function returns the module's output; what the call writes to its state (batch statistics, caches) is
    dropped. `jqopt.nnx.quantize(model, qm)` gives a module that keeps its state as nnx does.

    Raises:
        TraceError: params were given: an NNX module holds its own.
    """
    if params is not None:
        raise TraceError(
            f"{type(model).__name__} is an NNX module and holds its own parameters: write jqopt.trace(model, *inputs)"
        )
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
    classes = {"/".join(map(str, p)): type(m).__name__ for p, m in nnx.iter_modules(model)}
    tree = {"params": weights, "state": rest}
    watch = functools.partial(contextlib.nullcontext, classes)
    return Function(Call(graphdef), tree, path_of, watch, "nnx", type(model).__name__, tree_of, untree)


def tree_of(params: Any) -> Any:
    """The tree of a module, or of its state, given in its place."""
    if isinstance(params, nnx.State) and set(params) != {"params", "state"}:
        weights, rest = nnx.split_state(params, nnx.Param, ...)
        return {"params": weights, "state": rest}
    return function_of(params).params if isinstance(params, nnx.Module) else params


def untree(tree: Any) -> Any:
    """The state of a module from its tree: for `nnx.update(module, state)`."""
    return nnx.merge_state(tree["params"], tree["state"])


@dataclasses.dataclass(frozen=True)
class Call:
    """A module of this structure, called: output only, or with the structure and state that the call leaves behind."""

    graphdef: Any

    def __call__(self, tree: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> Any:
        return nnx.merge(self.graphdef, tree["params"], tree["state"])(*inputs, **kwargs)

    def with_state(self, tree: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """(output, structure, state other than parameters) after the call."""
        module = nnx.merge(self.graphdef, tree["params"], tree["state"])
        out = module(*inputs, **kwargs)
        graphdef, _, state = nnx.split(module, nnx.Param, ...)
        return out, graphdef, state


def path_of(key: tuple) -> str | None:
    """`("params", "q", "kernel", .value)` -> `q/kernel`; None for other state."""
    collection, *rest = key
    if collection.key != "params":
        return None
    if rest and isinstance(rest[-1], jax.tree_util.GetAttrKey):
        rest = rest[:-1]
    return path_name(tuple(rest))


# ----------------------------------------------------------------------------------------------------- state


def with_state(function: Function) -> Function:
    """The same model as a function that returns (output, structure, state other than parameters)."""
    return function._replace(call=function.call.with_state)


def with_structure(function: Function, graphdef: Any) -> Function:
    """The same model after a call that has changed its structure."""
    return function._replace(call=Call(graphdef))


def check_unchanged(function: Function, tree: Any, inputs: tuple, kwargs: dict) -> None:
    """A call inside a transformation of JAX must leave the model's state as it was.

    Raises:
        UnsupportedError: naming the state that it changes.
    """
    shapes = jax.tree.map(_shape, tree, is_leaf=lambda x: isinstance(x, QTensor))
    closed, (_, _, after), _ = _stage.stage(with_state(function), shapes, inputs, kwargs)
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    before = {path_name(key[1:]): i for i, (key, _) in enumerate(flat) if path_of(key) is None}
    names = [path_name(key) for key, _ in jax.tree_util.tree_flatten_with_path(after)[0]]
    sources = _state.handed_on(closed)[len(closed.out_avals) - len(names) :]
    kept = {name for name, source in zip(names, sources, strict=True) if before.get(name, -1) == source}
    changed = sorted({*names, *before} - kept)
    if changed:
        raise UnsupportedError(
            f"{function.name} changes its state ({', '.join(n.removesuffix('/value') for n in changed[:6])}) inside a "
            "transformation of JAX, where qm can't keep it. Call qm outside, or use jqopt.nnx.quantize(model, qm): a "
            "module whose state nnx.jit, nnx.grad and nnx.scan keep."
        )


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype) if isinstance(leaf, QTensor) else leaf.dtype)


# ----------------------------------------------------------------------------------------------- replacement


LAYERS: Mapping[type[nnx.Module], tuple[tuple[str, ...], Callable[[Any], int]]] = {
    nnx.Linear: (("__call__",), lambda layer: 2),
    nnx.LinearGeneral: (
        ("__call__",),
        lambda layer: len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features),
    ),
    nnx.Einsum: (("__call__",), lambda layer: len(layer.kernel_shape)),
    nnx.Conv: (("__call__",), lambda layer: len(layer.kernel_shape)),
    nnx.ConvTranspose: (("__call__",), lambda layer: len(layer.kernel_shape)),
    nnx.Embed: (("__call__", "attend"), lambda layer: 2),
    nnx.LoRA: (("__call__",), lambda layer: 2),
}
"""Flax's layers that read parameters: the methods that do, and how many axes one layer's weight has."""


def quantize(model: nnx.Module, qm: Any, *, simulate: bool = False) -> nnx.Module:
    """A new module like `model` whose layers run on the packed weights of `qm`; `model` stays as it is.

    The result is an ordinary NNX module: nnx.jit, split, state, grad and scan work; shared modules are shared; batch
    statistics and caches are updated as ever. Parameters and state come from `qm`, only the structure from `model`.
    Packed weights are `QuantizedParam`s where `nnx.Param`s stood, under the same paths; other parameters stay
    `nnx.Param`s, so that an optimizer of `nnx.Param` trains them. Under jit it gives the bits that `qm(...)` gives.

    Args:
        model: the module that was quantized, or one of the same structure (`nnx.eval_shape` is enough).
        qm: from `jqopt.quantize_model` or `jqopt.load`.
        simulate: float32 quantize-dequantize arithmetic instead of packed kernels.

    Raises:
        UnsupportedError: qm isn't an NNX model, or its recipe quantizes attention's operands; a packed weight belongs
            to a module that isn't one of Flax's layers (the message names it); or its layers aren't stacked along
            axis 0.
        PlanError: model and qm differ in their parameters or state.
    """
    plan, tree = qm.plan, qm.params
    _native.no_attention(plan, "jqopt.nnx.quantize")
    if not (isinstance(tree, Mapping) and set(tree) == {"params", "state"}):
        raise UnsupportedError(
            f"jqopt.nnx.quantize needs an NNX model's qm; this one is of {getattr(plan.function, 'name', 'another')}. "
            "For Linen write `with jqopt.linen.intercept(qm)`; for functions `qm(...)`."
        )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    check_paths(plan, {"/".join(map(str, p)): v for p, v in nnx.to_flat_state(params)})
    _check_state(rest, tree["state"])
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QTensor))
    leaves = {p: leaf for key, leaf in flat if (p := path_of(key)) is not None}
    filled = nnx.map_state(lambda path, v: _variable(v, "/".join(map(str, path)), leaves), params)
    made = nnx.merge(graphdef, filled, tree["state"], copy=True)
    _replace_layers(made, _native.decisions(plan), simulate)
    return made


def _check_state(mine: Any, its: Any) -> None:
    mine, its = ({"/".join(map(str, p)) for p, _ in nnx.to_flat_state(state)} for state in (mine, its))
    if mine != its:
        raise PlanError(
            f"the model's state isn't that of qm. Only the model has {sorted(mine - its)[:6] or 'nothing'}, only qm "
            f"{sorted(its - mine)[:6] or 'nothing'}. Make caches after jqopt.nnx.quantize, on the module it returns."
        )


def _variable(found: nnx.Variable, path: str, leaves: Mapping[str, Any]) -> nnx.Variable:
    leaf = leaves[path]
    return QuantizedParam(_native.sliceable(leaf), path=path) if isinstance(leaf, QTensor) else found.replace(leaf)


class QuantizedParam(nnx.Variable):
    """A packed weight: `get_value()` is its QTensor. It has no array to read, so `param[...]` raises."""

    def get_value(self, **index: Any) -> Any:
        if index:
            self._refuse()
        return jax.tree.map(lambda x: x, self.get_raw_value())

    def _refuse(self, *args: Any) -> Any:
        instead = "call a method of its layer (`embed.attend(x)`)"
        raise UnsupportedError(
            _native.used_raw(self.get_metadata("path"), self.get_raw_value().format.name, "your code", instead)
        )

    __jax_array__ = __array__ = __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = _refuse

    @property
    def T(self) -> Any:
        return self._refuse()


class Packed(NamedTuple):
    """What a quantized layer remembers: its packed weights and what the plan asks of each. Static and hashable."""

    names: tuple[tuple[str, str], ...]  # (attribute, parameter path)
    decisions: tuple[tuple[tuple[str, str], Decision], ...]
    simulate: bool


_PACKED = "packed_layer"  # the attribute that holds it


def _replace_layers(module: nnx.Module, decisions: _native.Decisions, simulate: bool) -> None:
    """Makes each layer of a module that is nobody else's a quantized one, in place: shared layers stay shared."""
    left = {v.get_metadata("path"): v for _, v in nnx.iter_graph(module) if isinstance(v, QuantizedParam)}
    owners: dict[str, str] = {}
    for _, layer in list(nnx.iter_modules(module)):
        own = {name: v for name, v in vars(layer).items() if isinstance(v, QuantizedParam)}
        kind = next((k for k in LAYERS if isinstance(layer, k)), None)
        owners |= {v.get_metadata("path"): type(layer).__name__ for v in own.values()}
        if not own or kind is None:
            continue
        _check_stacked(layer, LAYERS[kind][1](layer), own)
        names = tuple((name, v.get_metadata("path")) for name, v in own.items())
        paths = [path for _, path in names]
        mine = tuple((key, d) for key, d in decisions.items() if key[0] in paths)
        setattr(layer, _PACKED, Packed(names, mine, simulate))
        layer.__class__ = quantized_class(type(layer), LAYERS[kind][0])
        left = {path: v for path, v in left.items() if path not in paths}
    for path, v in left.items():
        owner = owners.get(path, "a container that is no layer of Flax")
        raise UnsupportedError(_native.used_raw(path, v.get_raw_value().format.name, owner, _KEEP))


_KEEP = "use one of Flax's layers for it, or keep it in high precision with a rule `{match: ..., keep: true}`"


def _check_stacked(layer: nnx.Module, rank: int, own: Mapping[str, QuantizedParam]) -> None:
    for v in own.values():
        layout = v.get_raw_value().layout
        if not _native.leads(layout, len(layout.shape) - rank):
            raise UnsupportedError(_native.unsliceable(v.get_metadata("path"), layout))


@functools.cache
def quantized_class(base: type[nnx.Module], methods: tuple[str, ...]) -> type[nnx.Module]:
    """The subclass of a layer's class whose methods run on packed weights."""
    body = {method: functools.partialmethod(_run, base, method) for method in methods}
    return type(f"Quantized{base.__name__}", (base,), {**body, "__doc__": f"{base.__name__} on packed weights."})


def _run(layer: Any, base: type[nnx.Module], method: str, *args: Any, **kwargs: Any) -> Any:
    """A method of a layer on its packed weights: the method of the float layer, evaluated as whole models are."""
    names, decisions, simulate = getattr(layer, _PACKED)
    packed = {path: vars(layer)[name].get_value() for name, path in names}

    def call(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        twin = object.__new__(base)
        params = {name: nnx.Param(weights[path]) for name, path in names}
        vars(twin).update({**vars(layer), **params})
        return getattr(base, method)(twin, *args, **kwargs)

    return _native.run(call, packed, dict(decisions), args, kwargs, simulate=simulate)
