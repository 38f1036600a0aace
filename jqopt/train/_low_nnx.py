"""Low-precision training of a Flax NNX module: a module again, for nnx.Optimizer and nnx.value_and_grad."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jqopt.errors import UnsupportedError
from jqopt.frontends.nnx import Call, with_state
from jqopt.train import _low
from jqopt.train._low import Prepared


class LowPrecision(nnx.Module):
    """A module that runs the one inside with quantized products, as a recipe says.

    `model` is a copy of the float module with the weights that are trained; its other state (batch statistics, random
    streams) is kept there as ever. In training mode (`module.train()`, the default) each call draws a key for
    stochastic rounding from `rngs`; after `module.eval()` none is drawn, and gradients of such recipes are refused.

    Args:
        model: the NNX module that was prepared; it stays as it is.
        prepared: from `jqopt.train.prepare` for that module.
        rngs: with a stream `quant` (or the default one); for recipes that round gradients stochastically.

    Raises:
        UnsupportedError: prepared isn't of an NNX module; no rngs for a recipe that needs them; delayed scaling, whose
            state travels as a gradient (use `prepared.apply` on `nnx.state`).
    """

    def __init__(self, model: nnx.Module, prepared: Prepared, rngs: nnx.Rngs | None = None):
        plan = prepared.plan
        if plan.ptq.function.kind != "nnx":
            raise UnsupportedError(
                f"{plan.ptq.function.name} is no NNX module: LowPrecision wraps those; use prepared.apply"
            )
        if plan.needs_key and rngs is None:
            raise UnsupportedError(
                f"recipe {plan.recipe.name!r} rounds gradients stochastically: write rngs=nnx.Rngs(quant=0)"
            )
        if plan.delayed:
            raise UnsupportedError(
                f"recipe {plan.recipe.name!r} has delayed scaling, whose state is a value beside the parameters: use "
                "prepared.apply(module_or_state, x, quant_state=...), or train/fp8_current"
            )
        self.prepared = nnx.static(prepared)
        self.model = nnx.clone(model)
        self.stream = None if rngs is None or not plan.needs_key else rngs.quant.fork()
        self.deterministic = False

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's output."""
        plan = self.prepared.plan
        graphdef, weights, rest = nnx.split(self.model, nnx.Param, ...)
        function = with_state(plan.ptq.function._replace(call=Call(graphdef)))
        key = None if self.stream is None or self.deterministic else self.stream()
        tree = {"params": weights, "state": rest}
        out, after, state = _low.run(plan, function, tree, inputs, kwargs, key)
        if after != graphdef:
            raise UnsupportedError(
                f"{function.name} makes new state in this call (a cache, sown values): make it before, on the module "
                "that is trained"
            )
        nnx.update(self.model, state)
        return out
