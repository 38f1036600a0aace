"""Quantization-aware training: float weights that are trained through the quantizers of a plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _apply, _numerics, _quantize, _stage
from jqopt._apply import Quantized
from jqopt._calibrate import Stats, check_stats
from jqopt._model import QuantizedModel
from jqopt._plan import Decision, Plan
from jqopt._qtensor import QTensor
from jqopt.errors import CalibrationError, PlanError, UnsupportedError
from jqopt.train import _scales, _straight
from jqopt.train._simulated import Trainer, simulated

SCALES = "quantizers"
"""The key of learned scales: beside the parameters in Linen's collection `params`, else at the top of the tree."""

LEARN = (False, "weights", "inputs", "both")
ALGORITHMS = ("max", "mse")


@dataclasses.dataclass(frozen=True, eq=False)
class QAT:
    """The model of a plan as a function of float weights that are quantized on their way; see `qat`."""

    plan: Plan = dataclasses.field(repr=False)
    stats: Stats | None = dataclasses.field(repr=False)
    input_amax: Mapping[str, jax.Array] = dataclasses.field(repr=False)  # of static input scales, by parameter path
    weight_owners: Mapping[str, str]  # path -> the path whose learned weight scales it has; empty: none are learned
    input_owners: Mapping[str, str]  # the same of input scales
    dual: bool
    clip_gradient: bool

    def init(self, params: Any) -> Any:
        """The tree to train: the float parameters (for Linen the variables), and learned scales under `quantizers`.

        Args:
            params: the tree the plan was made for; of an NNX model, the module. It stays the caller's.

        Raises:
            PlanError: params aren't those of the plan; or scales are learned and the tree can't hold them.
        """
        tree = self.plan.function.tree(params)
        scales = self.first_scales(tree)
        return self._joined(tree, scales) if scales else tree

    def apply(self, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """The quantized model's output: what `jqopt.apply(plan, simulate=True)` gives for `quantize(params)`.

        Args:
            params: as `init` gave them, trained or not; for Linen with the other collections that `model.apply`
                takes, and with its keywords. Pure: jit, grad, vmap and shard it.
        """
        return self._static(params, *inputs, **kwargs)

    def quantize(self, params: Any) -> Quantized:
        """The trained tree, packed, with the scales that were learned: what `jqopt.apply(plan)` takes."""
        return self.quantize_parts(*self.split(params))

    def convert(self, model: Any, params: Any) -> QuantizedModel:
        """The trained model with packed weights, as `jqopt.quantize_model` gives it; `jqopt.save` takes it.

        Args:
            model: the Linen module, NNX module or function that was traced.
        """
        return QuantizedModel(model, self.plan, self.quantize(params))

    # ---------------------------------------------------------------------------------------- in two parts

    def first_scales(self, tree: Any) -> dict[str, dict[str, Any]]:
        """What learned scales start from: {"weights": {path: amax [*stack, rows, cols]}, "inputs": {path: [*outer]}}.

        With `dual` each weight has {"pre": amax, "post": amax}.
        """
        found, scales = self._found(tree), {}
        if self.weight_owners:
            amax = _scales.first_weight_amax(self.plan, found, self.weight_owners)
            scales["weights"] = {p: {"pre": a, "post": jnp.array(a)} if self.dual else a for p, a in amax.items()}
        if self.input_owners:
            scales["inputs"] = {p: jnp.array(self.input_amax[p]) for p in dict.fromkeys(self.input_owners.values())}
        return scales

    def quantize_parts(self, tree: Any, scales: Mapping[str, Any]) -> Quantized:
        """`quantize` of a float tree and its learned scales."""
        quant = _quantize.quantize(self.plan, tree, self.stats)
        if not scales:
            return quant
        found = self._found(tree)
        shared = _quantize.group_amax(self.plan, found)
        flat, treedef = jax.tree_util.tree_flatten_with_path(quant.params, is_leaf=_apply.is_qtensor)
        leaves = []
        for key, leaf in flat:
            path = _stage.parameter_path(self.plan.function, key, leaf)
            if path is not None and path in self.plan.quantized:
                leaf = self._with_scales(path, leaf, found[path], scales, shared.get(path))
            leaves.append(leaf)
        return Quantized(treedef.unflatten(leaves))

    def run(self, plan: Plan, tree: Any, scales: Mapping[str, Any], inputs: tuple, kwargs: dict) -> Any:
        """`apply` in two parts and without jit, of a plan whose function may be another of the same parameters."""
        rule = functools.partial(Trainer, clip=self.clip_gradient, learn=bool(self.input_owners))
        return _apply.run(plan, rule, self._simulated(tree, scales), inputs, kwargs)

    @functools.cached_property
    def _static(self) -> _apply.Static:
        return _apply.Static(lambda params, inputs, kwargs: self.run(self.plan, *self.split(params), inputs, kwargs))

    # -------------------------------------------------------------------------------------------- the tree

    def split(self, params: Any) -> tuple[Any, Mapping[str, Any]]:
        """(the float tree, learned scales) of what `init` gave.

        Raises:
            PlanError: scales are learned, and the tree holds none.
        """
        if not (self.weight_owners or self.input_owners):
            return params, {}
        linen = self.plan.function.kind == "linen"
        inner = params.get("params") if linen and isinstance(params, Mapping) else params
        if not isinstance(inner, Mapping) or SCALES not in inner:
            raise PlanError(f"the tree holds no learned scales ({SCALES!r}): pass what `init` gave, trained or not")
        rest = {name: x for name, x in inner.items() if name != SCALES}
        return ({**params, "params": rest} if linen else rest), inner[SCALES]

    def _joined(self, tree: Any, scales: Mapping[str, Any]) -> Any:
        linen = self.plan.function.kind == "linen"
        inner = tree["params"] if linen else tree
        if not isinstance(inner, Mapping) or SCALES in inner:
            raise PlanError(
                f"learned scales stand beside the parameters under {SCALES!r}: these must be a dict without such a "
                f"key; found {sorted(inner) if isinstance(inner, Mapping) else type(inner).__name__}"
            )
        joined = {**inner, SCALES: dict(scales)}
        return {**tree, "params": joined} if linen else joined

    def _found(self, tree: Any) -> dict[str, Any]:
        """The parameters by path, checked against the plan."""
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        function = self.plan.function
        found = {p: leaf for key, leaf in flat if (p := _stage.parameter_path(function, key, leaf)) is not None}
        _apply.check_paths(self.plan, found)
        return found

    # --------------------------------------------------------------------------------------------- weights

    def _simulated(self, tree: Any, scales: Mapping[str, Any]) -> Any:
        """The tree with a Simulated in place of each weight that the plan quantizes."""
        shared = _quantize.group_amax(self.plan, jax.lax.stop_gradient(self._found(tree)))
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        leaves = []
        for key, leaf in flat:
            path = _stage.parameter_path(self.plan.function, key, leaf)
            d = self.plan.quantized.get(path) if path is not None else None
            if path is not None and d is not None:
                values = self._values(path, d, leaf, scales, shared.get(path))
                leaf = simulated(values, d, self._input_scale(path, d, scales), np.dtype(leaf.dtype).name)
            leaves.append(leaf)
        return treedef.unflatten(leaves)

    def _values(
        self, path: str, d: Decision, w: jax.Array, scales: Mapping[str, Any], tensor_amax: jax.Array | None
    ) -> jax.Array:
        """What the codes of a weight stand for, float32 [*stack, n, k]."""
        assert d.layout is not None, path
        matrix = d.layout.to_matrix(w)
        if self.weight_owners:
            whole = tensor_amax if d.format.global_scale else None
            return _straight.learned(matrix, *self._learned(path, scales), whole, _how(d))
        fixed = jax.lax.stop_gradient(matrix)
        if d.algorithm[-1].name == "max":  # no weight lies beyond its own maximum: there is nothing to clip
            values = _numerics.qdq_matrix(fixed, d.format, granularity=d.granularity, tensor_amax=tensor_amax)
            return _straight.straight_through(matrix, values)
        packed = _scales.packed(d, jax.lax.stop_gradient(w), tensor_amax)
        keep = _scales.within(fixed, _scales.saturation(packed), d) if self.clip_gradient else None
        return _straight.straight_through(matrix, packed.matrix(), keep)

    def _learned(self, path: str, scales: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
        """The amax whose scale divides a weight, and the one whose scale its codes stand for (None: the same)."""
        leaf = scales["weights"][self.weight_owners[path]]
        return (jnp.abs(leaf["pre"]), jnp.abs(leaf["post"])) if self.dual else (jnp.abs(leaf), None)

    def _input_scale(self, path: str, d: Decision, scales: Mapping[str, Any]) -> jax.Array | None:
        if d.input is None or not d.has_static_input:
            return None
        owner = self.input_owners.get(path)
        amax = self.input_amax[path] if owner is None else jnp.abs(scales["inputs"][owner])
        return _numerics.scale_from_amax(amax, d.input.element_format())

    def _with_scales(
        self, path: str, packed: QTensor, w: jax.Array, scales: Mapping[str, Any], tensor_amax: jax.Array | None
    ) -> QTensor:
        """A packed weight with its learned scales in place of the plan's."""
        d = self.plan.quantized[path]
        packed = packed.replace(input_scale=self._input_scale(path, d, scales))
        if not self.weight_owners:
            return packed
        whole = tensor_amax if d.format.global_scale else None
        codes, _ = _straight.stored(packed.layout.to_matrix(w), *self._learned(path, scales), whole, _how(d))
        return packed.replace(**codes._asdict())


def _how(d: Decision) -> _straight.Quantizer:
    return _straight.Quantizer(d.format, d.granularity)


def qat(
    plan: Plan,
    stats: Stats | None = None,
    *,
    learn_scales: bool | str = False,
    dual: bool = False,
    clip_gradient: bool = False,
) -> QAT:
    """Quantization-aware training of the model of a plan: three pure functions.

        training = jqopt.train.qat(plan, stats)
        params = training.init(params)              # the tree to train: the float one, and learned scales, if any
        y = training.apply(params, *inputs)         # what the quantized model gives: differentiate and jit it
        quant = training.quantize(params)           # packed: jqopt.apply(plan)(quant, *inputs)

    Args:
        plan: its algorithm is `max` or `mse`. Scales follow the weights in every step, unless they are learned.
        stats: from `jqopt.calibrate`, where activations have static scales. These stay as they are, unless learned.
        learn_scales: train scales too (LSQ, Esser et al. 2020): "weights", the largest absolute value of each tile of
            a weight; "inputs", that of each activation with one static scale; "both". They start from the plan's.
        dual: two learned scales for each tile of a weight (dual LSQ): one that it is divided by, one that its codes
            stand for.
        clip_gradient: no gradient to what lies beyond the range of its scale. Without it gradients go straight
            through. Where scales are learned gradients are always clipped: that is a part of LSQ.

    Raises:
        PlanError: the plan has no model, or another algorithm, or rounds inputs with feedback.
        CalibrationError: activations with static scales, and no statistics of them.
        UnsupportedError: scales can't be learned in these formats; the message names the parameter.
    """
    if plan.function is None:
        raise PlanError("this plan was read from a file and has no model; trace the model and plan again")
    for path, d in plan.quantized.items():
        other = [a.name for a in d.algorithm if a.name not in ALGORITHMS]
        if other:
            raise PlanError(
                f"{path}: training quantizes anew in every step, which {other[0]} can't do. Plan with "
                "`algorithm: max` (or mse)"
            )
        if d.input is not None and d.input.feedback:
            raise PlanError(
                f"{path}: its input is rounded with feedback, by factors of weights that stay; training changes them "
                "in every step. Train with a recipe without `feedback`, and quantize what is trained with it"
            )
    if learn_scales not in LEARN or (dual and learn_scales not in ("weights", "both")):
        raise UnsupportedError(
            f"learn_scales={learn_scales!r}, dual={dual}: write learn_scales=False, 'weights', 'inputs' or 'both'; "
            "`dual` is for learned scales of weights"
        )
    static = [p for p, d in plan.quantized.items() if d.has_static_input]
    if static and stats is None:
        raise CalibrationError(
            f"{len(static)} activations have static scales (first: that of {static[0]}). Call stats = "
            "jqopt.calibrate(plan, params, batches) and pass it, or use dynamic inputs."
        )
    if static:
        check_stats(plan, stats or {})
    weights = _scales.weight_owners(plan) if learn_scales in ("weights", "both") else {}
    inputs = _scales.input_owners(plan) if learn_scales in ("inputs", "both") else {}
    amax = _quantize.input_amax(plan, stats or {}) if static else {}
    return QAT(plan, stats, amax, weights, inputs, dual, clip_gradient)
