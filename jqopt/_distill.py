"""Distilling a quantized model: gains and scales trained on the calibration batches towards the float model's outputs.

Codes, shapes and formats stay. Weights are decoded with their trained scales in every step, activations quantized as
the plan says; gradients go straight through both roundings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _apply, _numerics, _stage
from jqopt._apply import Quantized, is_qtensor
from jqopt._calibrate import as_call
from jqopt._plan import Decision, Plan, solver
from jqopt._qtensor import QTensor
from jqopt._simulated import Differentiable, Simulated
from jqopt.algorithms import Training
from jqopt.analysis.folds import norm_gains
from jqopt.errors import CalibrationError

Logs = dict[str, jax.Array]
"""What is trained, by path: the logarithm of what a gain, or a tile's scale, is multiplied with. It starts at zero."""

FIRST, SECOND = 0.9, 0.98  # Adam's decays of the gradient's mean and mean square


class _State(NamedTuple):
    logs: Logs
    mean: Logs
    square: Logs


def training_of(plan: Plan) -> Training | None:
    """How the plan's recipe trains the quantized model; None where it doesn't.

    Raises:
        CalibrationError: two rules say different things.
    """
    found = {d.key: solver(d.algorithm, plan.algorithms).training for d in plan.quantized.values()}
    first = {how: key for key, how in reversed(found.items()) if how is not None}
    if len(first) > 1:
        raise CalibrationError(
            f"distill trains the whole model once; {' and '.join(first.values())} ask for it with different options. "
            "Write the same in every rule, or once beside the rules"
        )
    return next(iter(first), None)


def distill(
    plan: Plan,
    quant: Quantized,
    floats: Any,
    batches: Iterable[Any],
    progress: Callable[[int], Any] | None = None,
    **kwargs: Any,
) -> Quantized:
    """The quantized model with its trained gains and scales; as it was if the loss over the batches isn't lower.

    Args:
        floats: the parameters that the plan was made for, whose outputs are the target.
        batches: repeatable; one step a batch, in turn.
        progress: called with the number of each finished step.
        kwargs: keywords for every call of the model.

    Raises:
        CalibrationError: no batches, outputs that are no floating-point arrays, or a loss that isn't finite.
    """
    how = training_of(plan)
    logs = {} if how is None else trainable(plan, quant, how)
    if how is None or not logs or not how.steps:
        return quant
    feed = [as_call(b, kwargs) for b in batches]
    if not feed:
        raise CalibrationError("distill got no batches: the iterable is empty (a generator that was already used up?)")
    steps = _Steps(plan, how)
    zero = jax.tree.map(jnp.zeros_like, logs)
    state = _State(logs, zero, zero)
    before = steps.loss(state, quant, floats, feed)
    for i in range(how.steps):
        state, _ = steps(state, quant, floats, feed[i % len(feed)], i)
        if progress is not None:
            progress(i + 1)
    after = steps.loss(state, quant, floats, feed)
    return changed(plan, quant, state.logs) if after < before else quant


def trainable(plan: Plan, quant: Quantized, how: Training) -> Logs:
    """What is trained, at its start: gains of norms that stayed float, scales that can take small steps."""
    found, graph = _by_path(plan, quant.params), plan.graph
    gains = norm_gains(graph.flow) if how.gains and graph is not None else {}
    logs = {p: jnp.zeros(found[p].shape, jnp.float32) for p in gains if not is_qtensor(found.get(p, 0)) and p in found}
    for path, d in plan.quantized.items():
        if how.scales and _has_scales(d) and solver(d.algorithm, plan.algorithms).training is not None:
            logs[path] = jnp.zeros(found[path].scale.shape, jnp.float32)
    return logs


def _has_scales(d: Decision) -> bool:
    """Has it scales of its own that can take small steps? (One scale of a tensor may be that of others too.)"""
    return d.granularity != "tensor" and d.format.scale.name != "e8m0"


def changed(plan: Plan, quant: Quantized, logs: Logs) -> Quantized:
    """The quantized model with these factors on its gains and stored scales."""

    def new(path: str, leaf: Any) -> Any:
        if not is_qtensor(leaf):
            return _gain(leaf, logs[path], _offset(plan, path))
        return leaf.replace(scale=_numerics.encode_scale(_scale(leaf, logs[path]), leaf.format))

    return Quantized(_mapped(plan, quant.params, lambda p, leaf: new(p, leaf) if p in logs else leaf), quant.attention)


# ------------------------------------------------------------------------------------------------- one step


class _Steps:
    """Compiled steps of training, one for each kind of batch."""

    def __init__(self, plan: Plan, how: Training):
        self.plan, self.how = plan, how
        self.jitted: dict[Any, Callable] = {}

    def __call__(self, state: _State, quant: Quantized, floats: Any, call: tuple, i: int | None) -> tuple[_State, Any]:
        """The state after a step, and the loss before it; `i` None: the state stays."""
        arrays, rebuild, key = _stage.split_static(call)
        if key not in self.jitted:
            self.jitted[key] = jax.jit(functools.partial(self._step, rebuild))
        number = 0 if i is None else i
        rate = 0.0 if i is None else self.how.rate * (1 - i / self.how.steps)
        after, loss = self.jitted[key](state, quant, floats, arrays, np.float32(number + 1), np.float32(rate))
        return (state if i is None else after), loss

    def loss(self, state: _State, quant: Quantized, floats: Any, feed: list[tuple]) -> float:
        """The mean over the batches.

        Raises:
            CalibrationError: it isn't finite.
        """
        found = float(np.mean([self(state, quant, floats, call, None)[1] for call in feed]))
        if not np.isfinite(found):
            raise CalibrationError(f"distill: the {self.how.loss} loss is {found}: the outputs hold NaN or inf")
        return found

    def _step(self, rebuild: Callable, state: _State, quant: Quantized, floats: Any, arrays: list, t: Any, rate: Any):
        inputs, kwargs = rebuild(arrays)
        wanted = self.plan.function.call(floats, *inputs, **kwargs)

        def of(logs: Logs) -> jax.Array:
            tree = Quantized(simulated(self.plan, quant.params, logs), quant.attention)
            got = _apply.run(self.plan, lambda s: Differentiable(s, True, None), tree, inputs, kwargs)
            return _distance(wanted, got, self.how.loss)

        loss, g = jax.value_and_grad(of)(state.logs)
        mean = jax.tree.map(lambda m, x: FIRST * m + (1 - FIRST) * x, state.mean, g)
        square = jax.tree.map(lambda m, x: SECOND * m + (1 - SECOND) * x * x, state.square, g)
        root = lambda s: jnp.sqrt(s / (1 - SECOND**t)) + jnp.float32(1e-20)  # noqa: E731
        logs = jax.tree.map(lambda x, m, s: x - rate * m / (1 - FIRST**t) / root(s), state.logs, mean, square)
        return _State(logs, mean, square), loss


def _distance(wanted: Any, got: Any, loss: str) -> jax.Array:
    pairs = [
        (w.astype(jnp.float32), g.astype(jnp.float32))
        for w, g in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True)
        if jnp.issubdtype(w.dtype, jnp.floating)
    ]
    if not pairs:
        raise CalibrationError("distill: the model gives no floating-point output to compare")
    return sum((_LOSSES[loss](*pair) for pair in pairs), jnp.float32(0))


def _kl(wanted: jax.Array, got: jax.Array) -> jax.Array:
    p, q = jax.nn.log_softmax(wanted, -1), jax.nn.log_softmax(got, -1)
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))


def _mse(wanted: jax.Array, got: jax.Array) -> jax.Array:
    size = jnp.maximum(jnp.mean(jnp.square(wanted)), jnp.float32(1e-30))
    return jnp.mean(jnp.square(got - wanted)) / size


_LOSSES: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"kl": _kl, "mse": _mse}


# --------------------------------------------------------------------------------------------------- the tree


def simulated(plan: Plan, params: Any, logs: Logs) -> Any:
    """The tree with decoded weights, as functions of what is trained."""

    def new(path: str, leaf: Any) -> Any:
        if is_qtensor(leaf):
            return _decoded(leaf, logs.get(path))
        return _gain(leaf, logs[path], _offset(plan, path)) if path in logs else leaf

    return _mapped(plan, params, new)


def _decoded(leaf: QTensor, logs: jax.Array | None) -> Simulated:
    values = leaf.matrix() if logs is None else _values(leaf, logs)
    fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
    scale = jnp.zeros(leaf.scale.shape, jnp.float32)
    return Simulated(**{**fields, "data": values, "scale": scale, "global_scale": None, "zero_point": None})


def _values(leaf: QTensor, logs: jax.Array) -> jax.Array:
    """What the codes stand for with trained scales [*stack, n, k]: linear in the scales as they are stored."""
    stored = leaf.replace(scale=_numerics.encode_scale(_scale(leaf, logs), leaf.format))
    one = jnp.exp(logs - jax.lax.stop_gradient(logs))  # with the gradient of a factor
    return jax.lax.stop_gradient(stored.matrix()) * _spread(one, leaf)


def _spread(per_tile: jax.Array, leaf: QTensor) -> jax.Array:
    n, k = leaf.layout.n, leaf.layout.k
    tile = leaf.format.tile_for(n, k, leaf.granularity)
    like = _numerics.to_tiles(jnp.zeros((*per_tile.shape[:-2], n, k), jnp.float32), tile)
    return _numerics.from_tiles(jnp.broadcast_to(_numerics.spread(per_tile), like.shape), n, k)


def _scale(leaf: QTensor, logs: jax.Array) -> jax.Array:
    return _numerics.decode_scale(leaf.scale, leaf.format) * jnp.exp(logs)


def _gain(leaf: Any, logs: jax.Array, offset: float) -> jax.Array:
    """A gain (or 1 + gain) times the factor, in its own dtype."""
    whole = leaf.astype(jnp.float32) + jnp.float32(offset)
    return (whole * jnp.exp(logs) - jnp.float32(offset)).astype(leaf.dtype)


def _offset(plan: Plan, path: str) -> float:
    """What the norm adds to its parameter before it multiplies: 1 for some, else 0."""
    assert plan.graph is not None
    found = (a.offset for fold in plan.graph.folds.values() for a in fold.absorbers if a.path == path)
    return next(found, 0.0)


def _by_path(plan: Plan, params: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    return {p: leaf for key, leaf in flat if (p := _stage.parameter_path(plan.function, key, leaf)) is not None}


def _mapped(plan: Plan, params: Any, new: Callable[[str, Any], Any]) -> Any:
    """The tree with each parameter replaced."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    leaves = [
        leaf if (p := _stage.parameter_path(plan.function, key, leaf)) is None else new(p, leaf) for key, leaf in flat
    ]
    return treedef.unflatten(leaves)
