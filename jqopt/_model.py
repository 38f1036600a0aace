"""The verbs in a row: trace, plan, calibrate and quantize one model, and the quantized model they give."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from jqopt import _apply, _plan, _trace
from jqopt._apply import Quantized
from jqopt._calibrate import as_call
from jqopt._calibrate import calibrate as calibrate
from jqopt._plan import Plan
from jqopt._quantize import quantize as quantize
from jqopt._recipe import Recipe, load_recipe
from jqopt._trace import Graph
from jqopt.errors import CalibrationError
from jqopt.frontends import function_of
from flax import nnx


def trace(model: Any, *inputs: Any, **kwargs: Any) -> Graph:
    """Finds every site of a model: `trace(linen_module, variables, *inputs)`, `trace(fn, params, *inputs)`,
    `trace(nnx_module, *inputs)`.

    Parameters and inputs may be `jax.ShapeDtypeStruct`s: nothing is computed. Keywords go to the model.

    Raises:
        TraceError: the parameters aren't what this kind of model takes.
    """
    if isinstance(model, nnx.Module):
        return _trace.trace_function(function_of(model, None), inputs, kwargs)
    params, *rest = inputs or (None,)
    return _trace.trace_function(function_of(model, params), tuple(rest), kwargs)


def plan(recipe: str | dict | Recipe, graph: Graph) -> Plan:
    """One decision for each site of the graph, made before anything runs; `print` it.

    Raises:
        RecipeError: the recipe can't be read.
        PlanError: see `jqopt._plan.make_plan`; among others a rule that matches nothing.
    """
    return _plan.make_plan(load_recipe(recipe), graph)


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A model with packed weights: call it as the model; `params`, `plan` and `quant` are plain values."""

    model: Any
    plan: Plan
    quant: Quantized

    def __post_init__(self) -> None:
        object.__setattr__(self, "_run", _apply.apply(self.plan))

    @property
    def params(self) -> Any:
        """The parameter tree with QTensors in place of quantized arrays."""
        return self.quant.params

    @property
    def variables(self) -> Any:
        """For Linen: the whole variables dict, to use under `jqopt.linen.intercept`."""
        return self.quant.params

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        return self._run(self.quant, *inputs, **kwargs)  # type: ignore[attr-defined]


def quantize_model(
    model: Any,
    recipe: str | dict | Recipe,
    *,
    params: Any = None,
    batches: Iterable[Any] | None = None,
    inputs: Any = None,
    donate: bool = False,
    progress: Callable[[str, Any], Any] | None = None,
    **kwargs: Any,
) -> QuantizedModel:
    """Trace, plan, calibrate and quantize in one call.

    Args:
        model: Linen module, NNX module, or function of (params, *inputs).
        recipe: a shipped recipe's name, a path, or a dict.
        params: the variables dict (Linen) or parameter tree (function); NNX modules hold their own.
        batches: calibration data: an iterable of inputs (array, tuple, or dict of keywords). The first also gives
            the shapes to trace with.
        inputs: shapes to trace with when no calibration is needed: one batch of arrays or ShapeDtypeStructs.
        donate: delete each float weight once it is packed.
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
    lead = () if isinstance(model, nnx.Module) else (params,)
    graph = trace(model, *lead, *args, **keywords)
    made = plan(recipe, graph)
    tree = graph.function.params
    tell = progress or (lambda verb, what: None)
    data = () if first is None else itertools.chain([first], feed)
    stats = None
    if made.needs_data:
        stats = calibrate(made, tree, data, progress=lambda n: tell("calibrate", n), **kwargs)
    quant = quantize(made, tree, stats, donate=donate, progress=lambda p: tell("quantize", p))
    return QuantizedModel(model, made, quant)
