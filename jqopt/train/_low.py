"""Low-precision training of unmodified models: the traced program, its planned products as three quantized GEMMs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx
from jax import Array
from jax.extend import core as jex_core

from jqopt import _apply, _jaxpr, _stage, _trace
from jqopt._jaxpr import Address, State
from jqopt._model import trace
from jqopt._numerics import divide
from jqopt._recipe import Recipe, load_recipe
from jqopt._stage import Function
from jqopt._trace import Site
from jqopt.errors import PlanError, UnsupportedError
from jqopt.train import _gather, _low_ops, _low_plan
from jqopt.train._linear import NAME, Gemms
from jqopt.train._low_plan import Trained, TrainPlan
from jqopt.train._operand import Quantizer

remat_policy = jax.checkpoint_policies.save_only_these_names(NAME)
"""For `jax.checkpoint(policy=...)`, `nn.remat(policy=...)`: keeps packed codes and the outputs of quantized products.

So nothing is quantized twice and no GEMM runs twice; the rest is computed anew.
"""

QuantState = dict[str, dict[str, Array]]
"""State of delayed scaling, float32: {site: {"history": [*layers, length, 3], "scale": [*layers, 3]}}, of x, w, dy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A model that trains in low precision; see `prepare`. `print(prepared.plan)` says what each GEMM reads."""

    plan: TrainPlan = dataclasses.field(repr=False)

    def apply(self, params: Any, *inputs: Any, quant_key: Any = None, quant_state: Any = None, **kwargs: Any) -> Any:
        """The model's output, under `jax.grad` its gradients, with quantized products. Pure: jit, grad and shard it.

        Args:
            params: what the model takes: for Linen the variables, as `model.apply`, whose keywords this takes too.
            quant_key: for gradients that are rounded stochastically: a new key in each step (`jax.random.key`, or its
                uint32 data). Not for evaluation.
            quant_state: of delayed scaling, from `init_state` or `next_state`. Its gradient is what `next_state` takes.

        Raises:
            PlanError: the parameters, or the model at these inputs, aren't what was prepared.
            UnsupportedError: a gradient without the key it needs; no state for delayed scaling.
        """
        return self._static((params, quant_key, quant_state), *inputs, **kwargs)

    def init_state(self) -> QuantState:
        """The first state of delayed scaling: scales of 1 and empty histories; {} for recipes without it."""
        return {s.key: _first_state(s, self.plan.recipe) for s in self.plan.delayed}

    def next_state(self, state: QuantState, seen: QuantState) -> QuantState:
        """The state for the next step.

        Args:
            state: the one that the step was made with.
            seen: the gradient of the loss with respect to `quant_state`. It is no derivative: in place of each scale
                stands the largest value of this step.
        """
        return {s.key: _next_state(s, state[s.key], seen[s.key], self.plan.recipe) for s in self.plan.delayed}

    @functools.cached_property
    def _static(self) -> _apply.Static:
        return _apply.Static(self._run)

    def _run(self, given: tuple[Any, Any, Any], inputs: tuple, kwargs: dict) -> Any:
        params, key, state = given
        return run(self.plan, self.plan.ptq.function, params, inputs, kwargs, key, state)


def prepare(
    model: Any, recipe: str | dict | Recipe, *inputs: Any, gather: str | Sequence[str] = (), **kwargs: Any
) -> Prepared:
    """Low-precision training of a model, which stays as it is.

        prepared = jqopt.train.prepare(model, "train/nvfp4", variables, x)
        state = TrainState.create(apply_fn=prepared.apply, params=variables["params"], tx=tx)
        loss = lambda params: f(state.apply_fn({"params": params}, x, quant_key=jax.random.fold_in(key, state.step)))

    Args:
        model: a Linen module, an NNX module, or a function of (params, *inputs).
        recipe: one with a section `train`: a shipped recipe's name, a path, or a dict.
        inputs: as `jqopt.trace` takes them: for Linen the variables, for a function the parameters, and one batch;
            for an NNX module the batch. Arrays or `jax.ShapeDtypeStruct`s: nothing is computed.
        gather: axes of a mesh, Auto, over which weights are cut and for a product gathered (FSDP): they are gathered as
            packed codes. The shardings of the parameters given here say how weights lie.
        kwargs: keywords of the model's call.

    Raises:
        RecipeError, TraceError: as `jqopt.load_recipe` and `jqopt.trace` do.
        PlanError: no section `train`, a rule that matches nothing, or nothing to train in low precision; `gather`
            without shardings, with other axes than theirs, or with nothing to gather.
    """
    graph = trace(model, *inputs, **kwargs)
    params = model if isinstance(model, flax_nnx.Module) else inputs[0]
    want = _gather.asked(gather, _parameters(graph.function, graph.function.tree(params)))
    return Prepared(_low_plan.make(load_recipe(recipe), graph, want))


def run(
    plan: TrainPlan, function: Function, params: Any, inputs: tuple, kwargs: dict, key: Any = None, state: Any = None
) -> Any:
    """The model's output with quantized products; `function` may be another than the plan's, of the same parameters."""
    if isinstance(params, flax_nnx.Module):
        params = function.tree(params)
    leaves = _checked(plan, function, params)
    closed, out, views = _stage.stage(function, jax.tree.map(_abstract, params), inputs, kwargs)
    rule = Trainer(_sites(plan, closed, views), closed)
    start = _start(plan, key_data(key), state)
    outs, _ = _jaxpr.evaluate(closed, [*leaves, *_stage.split_static((inputs, kwargs))[0]], rule, start)
    return jax.tree.unflatten(jax.tree.structure(out), outs)


def _abstract(leaf: Any) -> Any:
    """A leaf's shape; with its sharding where that is a part of its type."""
    if not hasattr(leaf, "dtype"):
        return leaf
    sharding: Any = getattr(jax.typeof(leaf), "sharding", None) if isinstance(leaf, jax.Array) else None
    explicit = sharding is not None and jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if explicit else None)


def _checked(plan: TrainPlan, function: Function, params: Any) -> list:
    _apply.check_paths(plan.ptq, _parameters(function, params))
    return jax.tree.leaves(params)


def _parameters(function: Function, tree: Any) -> dict[str, Any]:
    """{path: leaf} of the parameters in a tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {p: leaf for key, leaf in flat if (p := _stage.parameter_path(function, key, leaf)) is not None}


def _sites(plan: TrainPlan, closed: Any, views: Sequence[Any]) -> list[tuple[Site, Trained]]:
    sites, _ = _trace.walk(closed, views, {})
    unknown = next((s for s in sites if s.path is not None and s.reason is None and s.key not in plan.by_key), None)
    if unknown is not None:
        raise PlanError(
            f"site {unknown.key} ({unknown.op}) appeared that the plan doesn't know: the model runs differently at "
            "these inputs than at those it was prepared with. Prepare with inputs (and keywords) like those you run."
        )
    return [(s, d) for s in sites if (d := plan.by_key.get(s.key)) is not None and d.gemms is not None]


# ------------------------------------------------------------------------------------------------------- state


def key_data(key: Any) -> Array | None:
    """uint32 [2] of a key: a `jax.random.key`, its data, or None."""
    if key is None:
        return None
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jnp.asarray(key)
    if data.dtype != jnp.uint32 or data.ndim != 1 or data.shape[0] < 2:
        raise UnsupportedError(
            f"quant_key: found {data.dtype}{list(data.shape)}, expected one key, such as jax.random.key(step)"
        )
    return data[:2] if data.shape[0] == 2 else data[:2] ^ data[-2:]


def layer_keys(key: Array, outer: tuple[int, ...]) -> Array:
    """The step's key for each layer of scans, uint32 [*outer, 2]: its first word counts them. (A site has words of its
    own, `_linear.copy_keys`: of keys that differ in one bit the streams have nothing in common.)"""
    numbers = np.zeros((*outer, 2), np.uint32)
    numbers[..., 0] = np.arange(math.prod(outer)).reshape(outer)
    return key + numbers


def _start(plan: TrainPlan, key: Array | None, state: Any) -> State:
    """The evaluator's state: for each site its key and its scales."""
    missing = [s.key for s in plan.delayed if s.key not in (state or {})]
    if missing:
        raise UnsupportedError(
            f"{missing[0]}: recipe {plan.recipe.name!r} scales by the largest values of past steps; pass "
            "quant_state=prepared.init_state(), then what prepared.next_state gives"
        )
    start: State = {}
    for s in plan.trained:
        assert s.gemms is not None
        start[s.key] = {"key": layer_keys(key, s.outer)} if key is not None and s.gemms.stochastic else {}
        if s.gemms.delayed:
            start[s.key]["scale"] = state[s.key]["scale"]
    return start


def _quantizers(g: Gemms) -> tuple[Quantizer | None, ...]:
    return g.input[0], g.weight[0], g.grad[0]


def _first_state(s: Trained, recipe: Recipe) -> dict[str, Array]:
    longest = max(o.history for o in _operands(recipe))
    return {"history": jnp.zeros((*s.outer, longest, 3), jnp.float32), "scale": jnp.ones((*s.outer, 3), jnp.float32)}


def _operands(recipe: Recipe) -> list[Any]:
    assert recipe.train is not None
    return [o for o in (recipe.train.input, recipe.train.weight, recipe.train.grad) if o is not None]


def _next_state(s: Trained, state: Mapping[str, Array], seen: Mapping[str, Array], recipe: Recipe) -> dict[str, Array]:
    """TransformerEngine's order: this step's value goes to slot 0, the scale is found, the history rolls by one."""
    assert s.gemms is not None and recipe.train is not None
    history = state["history"].at[..., 0, :].set(seen["scale"])
    scales = []
    specs = (recipe.train.input, recipe.train.weight, recipe.train.grad)
    for i, (spec, q) in enumerate(zip(specs, _quantizers(s.gemms), strict=True)):
        old = state["scale"][..., i]
        if spec is None or q is None or not q.delayed:
            scales.append(old)
            continue
        past = history[..., : spec.history, i]
        amax = past[..., 0] if spec.amax == "most_recent" else jnp.max(past, axis=-1)
        scales.append(delayed_scale(amax, old, q.format.element.max, spec.margin))
    rolled = jnp.roll(history, -1, axis=-2).at[..., 0, :].set(0.0)
    return {"history": rolled, "scale": jnp.stack(scales, axis=-1)}


def delayed_scale(amax: Array, old: Array, largest: float, margin: int) -> Array:
    """largest / amax / 2^margin; the old one where amax is 0 or not finite; at most the largest float32."""
    scale = divide(largest, amax) * jnp.float32(2.0**-margin)
    scale = jnp.minimum(scale, jnp.float32(np.finfo(np.float32).max))
    return jnp.where((amax > 0) & jnp.isfinite(amax), scale, old)


# -------------------------------------------------------------------------------------------------------- rule


class Trainer:
    """What the evaluator does at a planned site: its product as three quantized GEMMs."""

    unrolls = False

    def __init__(self, sites: Sequence[tuple[Site, Trained]], jaxpr: Any):
        self.at: dict[Address, tuple[Site, Trained]] = {}
        self.below: dict[Address, list[Site]] = {}
        for site, decision in sites:
            if site.address in self.at:
                continue  # concatenated weights: one product
            self.at[site.address] = (site, decision)
            for n in range(1, len(site.address)):
                self.below.setdefault(site.address[:n], []).append(site)
        self.differ: dict[Address, _low_ops.Varying] = {
            a: (_low_plan.varying(jaxpr, a, 1 - s.operand), _low_plan.varying(jaxpr, a, s.operand))
            for a, (s, _) in self.at.items()
        }
        self.group = _readers(jaxpr, self.at)
        self.copies: dict[Address, _low_ops.Shared] = {}  # of each group, by its first site
        self.blind = {a for a in self.at if any(_blind(e) for _, e in _low_plan.around(jaxpr, a))}

    def is_site(self, address: Address) -> bool:
        return address in self.at

    def sites_below(self, address: Address) -> bool:
        return address in self.below

    def state_below(self, address: Address) -> frozenset[str]:
        return frozenset(s.key for s in self.below.get(address, ()))

    def stacked_at(self, address: Address) -> frozenset[str]:
        return frozenset(s.key for s in self.below.get(address, ()) if address in s.scans)

    def allreduce(self, before: State, after: State, axes: tuple[str, ...]) -> State:
        return after

    def __call__(self, address: Address, eqn: Any, values: Sequence[Any], state: State) -> tuple[list, State]:
        site, decision = self.at[address]
        mine = state[site.key]
        if address in self.blind:
            raise UnsupportedError(
                f"{site.key}: inside a shard_map with check_vma=False nothing says over which axes of the mesh a value "
                "differs, hence where its largest value and its random numbers belong. Use check_vma=True (the default)"
            )
        assert decision.gemms is not None
        out = eqn.outvars[0].aval
        how = dataclasses.replace(
            decision.gemms, dtypes=(*(v.aval.dtype.name for v in _pair(eqn, site)), out.dtype.name)
        )
        shared = self._shared(address)
        if _apply.on_explicit_axes(out):  # values inside of `placed` are not to be seen outside
            shared = None
        op = functools.partial(_low_ops.OPS[site.op], eqn, site, how, self.differ[address], shared)
        made = _apply.placed(op, out)
        result = made(*values, mine.get("scale"), mine.get("key"))
        if "key" in mine:  # another use of the site, in a loop that isn't over its layers, draws other numbers
            mine = {**mine, "key": mine["key"] + np.asarray([1 << 16, 0], np.uint32)}
        return [result], {**state, site.key: mine}

    def _shared(self, address: Address) -> _low_ops.Shared | None:
        """Copies of this site's x, where others read the same; forgotten after the last of them."""
        group = self.group.get(address)
        if group is None:
            return None
        shared = self.copies.setdefault(group[0], {})
        if address == group[-1]:
            del self.copies[group[0]]
        return shared


def _readers(jaxpr: Any, sites: Mapping[Address, tuple[Site, Trained]]) -> dict[Address, list[Address]]:
    """{site: all sites that read the same x, in order}, of those that aren't alone."""
    found: dict[Any, list[Address]] = {}
    for address in sorted(sites):
        x = _pair(_low_plan.at(jaxpr, address), sites[address][0])[0]
        if not isinstance(x, jex_core.Literal):
            found.setdefault((address[:-1], x), []).append(address)
    return {address: group for group in found.values() if len(group) > 1 for address in group}


def _blind(eqn: Any) -> bool:
    return eqn.primitive.name == "shard_map" and not eqn.params["check_vma"]


def _pair(eqn: Any, site: Site) -> tuple[Any, Any]:
    return eqn.invars[1 - site.operand], eqn.invars[site.operand]
