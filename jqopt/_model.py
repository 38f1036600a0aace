"""The verbs in a row: trace, plan, calibrate and quantize one model, and the quantized model they give."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import jax
import numpy as np
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from jax.core import Tracer

from jqopt import _apply, _plan, _quantize, _report, _stage, _trace
from jqopt._apply import Quantized
from jqopt._calibrate import as_call
from jqopt._calibrate import calibrate as calibrate
from jqopt._plan import Plan
from jqopt._quantize import quantize as quantize
from jqopt._recipe import Recipe, load_recipe
from jqopt._trace import Graph
from jqopt.algorithms import Table
from jqopt.errors import CalibrationError, CheckpointError, UnsupportedError
from jqopt.export.checkpoint import Checkpoint, PathLike
from jqopt.export.orbax import load_params
from jqopt.export.orbax import save as save
from jqopt.export.tree import compare, describe, some
from jqopt.frontends import function_of, linen, nnx


def trace(model: Any, *inputs: Any, **kwargs: Any) -> Graph:
    """Finds every site of a model: `trace(linen_module, variables, *inputs)`, `trace(fn, params, *inputs)`,
    `trace(nnx_module, *inputs)`.

    Parameters and inputs may be `jax.ShapeDtypeStruct`s: nothing is computed. Keywords go to the model.

    Raises:
        TraceError: the parameters aren't what this kind of model takes.
    """
    if isinstance(model, flax_nnx.Module):
        return _trace.trace_function(function_of(model, None), inputs, kwargs)
    params, *rest = inputs or (None,)
    return _trace.trace_function(function_of(model, params), tuple(rest), kwargs)


def plan(recipe: str | dict | Recipe, graph: Graph, *, algorithms: Table | None = None) -> Plan:
    """One decision for each site of the graph, made before anything runs; `print` it.

    Args:
        algorithms: your own, by the names that the recipe calls them: functions that take the recipe's options and
            give a `jqopt.algorithms.Algorithm`.

    Raises:
        RecipeError: the recipe can't be read.
        PlanError: see `jqopt._plan.make_plan`; among others a rule that matches nothing.
    """
    return _plan.make_plan(load_recipe(recipe), graph, algorithms)


@dataclasses.dataclass(eq=False)
class QuantizedModel:
    """A model with packed weights: call it as the model; `params`, `plan` and `quant` are plain values.

    The state of an NNX model (batch statistics, caches, random number streams) lives here, not in the float model:
    a call that changes it puts it into `quant`, as an NNX module would keep it.
    """

    model: Any
    plan: Plan
    quant: Quantized
    inputs: tuple[tuple, dict] | None = None
    """(args, kwargs) it was traced with, as shapes: a checkpoint keeps them, so that `load` knows another model."""
    floats: Callable[[], Any] | None = dataclasses.field(default=None, init=False, repr=False)
    """The float tree while somebody else holds it; a quantized model holds packed weights only."""
    source: Any = dataclasses.field(default=None, init=False, repr=False)
    """The Hugging Face folder that says which model it is (config.json, tokenizer), where that is known."""

    def __post_init__(self) -> None:
        function, made = self.plan.function, self.plan
        if function is not None and function.kind == "nnx":
            made = dataclasses.replace(self.plan, function=nnx.with_state(function))
        self._stateful = made is not self.plan
        self._run = _apply.apply(made)

    @property
    def params(self) -> Any:
        """The parameter tree with QTensors in place of quantized arrays."""
        return self.quant.params

    @property
    def variables(self) -> Any:
        """For Linen: the whole variables dict, as `model.apply` takes it under `jqopt.linen.intercept`."""
        return linen.sliceable(self.quant.params)

    def report(self, params: Any = None) -> _report.Report:
        """What quantization did to each weight: bytes, bits and, against the float weights, error. `print` it.

        Args:
            params: the float tree (NNX: the float module). Without it: the one the model was quantized from, while it
                is still there (it isn't after `donate=True`, nor in a loaded model).

        Raises:
            PlanError: params aren't those of the plan.
        """
        if isinstance(params, flax_nnx.Module):
            params = function_of(params, None).params
        floats = self.floats() if params is None and self.floats is not None else params
        return _report.report(self.plan, self.quant, floats)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's output.

        Raises:
            UnsupportedError: an NNX model would change its state inside a transformation of JAX (jit, grad, ...).
        """
        out = self._run(self.quant, *inputs, **kwargs)
        return self._keep(out, inputs, kwargs) if self._stateful else out

    def _keep(self, result: tuple[Any, Any, Any], inputs: tuple, kwargs: dict) -> Any:
        """Keeps the structure and state that a call of an NNX model has left behind; its output."""
        out, graphdef, state = result
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
            nnx.check_unchanged(self.plan.function, self.params, inputs, kwargs)
            return out
        self.quant = dataclasses.replace(self.quant, params={**self.params, "state": state})
        if graphdef != self.plan.function.call.graphdef:  # the call has made state that wasn't there before
            self.plan = dataclasses.replace(self.plan, function=nnx.with_structure(self.plan.function, graphdef))
            self.__post_init__()
        return out


def quantize_model(
    model: Any,
    recipe: str | dict | Recipe,
    *,
    params: Any = None,
    batches: Iterable[Any] | None = None,
    inputs: Any = None,
    donate: bool = False,
    memory: int | None = None,
    algorithms: Table | None = None,
    progress: Callable[[str, Any], Any] | None = None,
    **kwargs: Any,
) -> QuantizedModel:
    """Trace, plan, calibrate and quantize in one call.

    Args:
        model: Linen module, NNX module, or function of (params, *inputs).
        recipe: a shipped recipe's name, a path, or a dict.
        params: the variables dict (Linen) or parameter tree (function); None for NNX modules, which hold their own.
        batches: calibration data: an iterable of inputs (array, tuple, or dict of keywords). The first also gives
            the shapes to trace with.
        inputs: shapes to trace with when no calibration is needed: one batch of arrays or ShapeDtypeStructs.
        donate: delete each float weight once it is packed.
        memory: most bytes of calibration statistics to hold at a time; the batches are gone through as often as that
            takes.
        algorithms: your own algorithms, see `plan`.
        progress: called with ("calibrate", batch number) and ("quantize", path).
        kwargs: keywords for every call of the model (`train=False`, `method="encode"`).

    Raises:
        CalibrationError: the recipe needs data and `batches` gave none, or not for every site.
        RecipeError, TraceError, PlanError, UnsupportedError: as the verbs do.
    """
    feed = iter(batches) if batches is not None else iter(())
    first = next(feed, None)
    example = first if inputs is None else inputs
    if example is None:
        raise CalibrationError(
            "quantize_model needs `batches` (one or more inputs), or `inputs` (one batch of arrays or shapes) when "
            "the recipe needs no calibration: the model is traced with them."
        )
    args, keywords = as_call(example, kwargs)
    graph = _trace.trace_function(function_of(model, params), args, keywords)
    made = plan(recipe, graph, algorithms=algorithms)
    tree = graph.function.tree(model if isinstance(model, flax_nnx.Module) else params)
    tell = progress or (lambda verb, what: None)
    data = () if first is None else itertools.chain([first], feed)
    feed = data if made.needs_batches else None
    quant = quantize(
        made, tree, batches=feed, memory=memory, donate=donate, progress=lambda p: tell("quantize", p),
        calibrating=lambda n: tell("calibrate", n), **kwargs,
    )  # fmt: skip
    qm = QuantizedModel(model, made, quant, _shapes((args, keywords)))
    qm.floats = _Weak(tree)
    return qm


class _Weak:
    """A tree that lives as long as somebody else holds its arrays."""

    def __init__(self, tree: Any):
        leaves, self.treedef = jax.tree.flatten(tree)
        self.leaves = [weakref.ref(x) if isinstance(x, jax.Array | np.ndarray) else (lambda x=x: x) for x in leaves]

    def __call__(self) -> Any:
        """The tree, or None once an array is gone, or was donated."""
        leaves = [leaf() for leaf in self.leaves]
        gone = any(x is None or (isinstance(x, jax.Array) and x.is_deleted()) for x in leaves)
        return None if gone else self.treedef.unflatten(leaves)


def _shapes(tree: Any) -> Any:
    """Arrays as shapes; everything else as it is."""
    arrays, rebuild, _ = _stage.split_static(tree)
    return rebuild([jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for x in arrays])


@overload
def load(
    directory: PathLike,
    model: None = None,
    *,
    only: str | Sequence[str] | None = None,
    shardings: Any = None,
    verify: bool = True,
) -> dict[str, Any]: ...


@overload
def load(
    directory: PathLike,
    model: Any,
    *,
    shardings: Any = None,
    params: Any = None,
    inputs: Any = None,
    verify: bool = True,
) -> QuantizedModel: ...


def load(
    directory: PathLike,
    model: Any = None,
    *,
    only: str | Sequence[str] | None = None,
    shardings: Any = None,
    params: Any = None,
    inputs: Any = None,
    verify: bool = True,
) -> Any:
    """Reads what `save` wrote: a QuantizedModel, bit-equal to the saved one; needs no data and no float weights.

    Without a model: {parameter path: QTensor or array}, of the parameters that `only` names.

    Args:
        directory: the checkpoint's folder.
        model: the Linen module, NNX module or function that was quantized. Its own weights (NNX) aren't read.
        only: a glob over parameter paths, or several (`"layers_0/*"`); only these are read from disk. Without a model.
        shardings: where leaves go (default: the first device): one Sharding, a tree of Shardings like the parameters,
            or a function of (parameter path, leaf, ShapeDtypeStruct), where leaf is "data", "scale", ... of a packed
            tensor and "" for a plain array.
        params: an example of the parameter tree (arrays or shapes); only needed where it holds containers of other
            classes than dict, list and tuple. NNX modules are their own example.
        inputs: one batch, or its shapes, to compare model and checkpoint with; default: those the model was quantized
            with, if the checkpoint has them.
        verify: compare each leaf with its sha256 (reads every byte once more).

    Raises:
        CheckpointError: nothing there; damaged, incomplete, of a newer version, or of another model. The message names
            the leaf or the file.
        UnsupportedError: a sharding doesn't fit a leaf, or `only` together with a model.
    """
    if model is None:
        return load_params(directory, only=only, shardings=shardings, verify=verify)
    if only is not None:
        raise UnsupportedError("a model needs all its parameters: load(dir, only=...) without a model gives a part.")
    checkpoint = Checkpoint(directory)
    checkpoint.check_kind(_kind(model), type(model).__name__)
    module = isinstance(model, flax_nnx.Module)
    example = function_of(model, None).params if module else params
    shapes = checkpoint.tree(checkpoint.shapes(), example)
    function = function_of(model, None if module else shapes)._replace(params=shapes)
    read = checkpoint.plan(function)
    call = as_call(inputs, {}) if inputs is not None else checkpoint.call()
    if call is not None:
        _check_model(model, read, *call)
    tree = checkpoint.tree(checkpoint.load(list(checkpoint.manifest.tensors), shardings, verify), example)
    checkpoint.check_params(read, tree)
    scales = checkpoint.attention(verify)
    checkpoint.check_attention(read, scales)
    tree = _quantize.with_feedback(read, tree)
    qm = QuantizedModel(model, read, Quantized(tree, scales), None if call is None else _shapes(call))
    kept = checkpoint.directory / "hf"
    qm.source = kept if (kept / "config.json").is_file() else None
    return qm


def _kind(model: Any) -> str:
    if isinstance(model, flax_nnx.Module):
        return "nnx"
    return "linen" if isinstance(model, flax_linen.Module) else "function"


def _check_model(model: Any, made: Plan, args: tuple, kwargs: dict) -> None:
    """The model, traced with a checkpoint's parameters, must have the sites of its plan."""
    if isinstance(model, flax_linen.Module) and "method" not in kwargs:
        _check_init(model, made.function.params, args, kwargs)
    try:
        graph = _trace.trace_function(made.function, args, kwargs)
    except Exception as e:
        raise CheckpointError(
            f"this checkpoint is of another model: {made.function.name} can't be traced with its parameters: {e}"
        ) from e
    mine = {f"{s.key} ({s.op})" for s in graph.sites if s.path is not None}
    saved = {f"{d.key} ({d.op})" for d in made.decisions if d.path is not None}
    # what can't be quantized may be recorded now and not yet when the plan was made
    mine -= {f"{s.key} ({s.op})" for s in graph.sites if s.reason is not None} - saved
    if made.attention:
        mine |= {f"{s.key} (attention)" for s in graph.attention.sites}
        saved |= {f"{d.key} (attention)" for d in made.attention}
    if mine != saved:
        raise CheckpointError(
            f"this checkpoint is of another model. Sites that {made.function.name} has, and the checkpoint's plan "
            f"lacks: {some(sorted(mine - saved))}; sites that the plan has, and the model lacks: "
            f"{some(sorted(saved - mine))}."
        )


def _check_init(model: flax_linen.Module, variables: Any, args: tuple, kwargs: dict) -> None:
    """A Linen module's own parameters, from the shapes that `init` gives, must be the checkpoint's."""
    streams = kwargs.get("rngs")
    names = {"params", *(streams if isinstance(streams, dict) else ())}
    arrays, rebuild, _ = _stage.split_static((args, {k: v for k, v in kwargs.items() if k not in ("rngs", "mutable")}))

    def init(arrays: list) -> Any:
        positional, keywords = rebuild(arrays)
        return model.init({name: jax.random.key(0) for name in names}, *positional, **keywords)

    try:
        made = jax.eval_shape(init, arrays)
    except Exception:  # not every model can make its parameters with a call that it can be applied to; tracing decides
        return
    compare(_named(made["params"]), _named(variables["params"]))


def _named(params: Any) -> dict[str, tuple]:
    return {"/".join(parts): tuple(x.shape) for parts, x in describe(params)[1].items()}
