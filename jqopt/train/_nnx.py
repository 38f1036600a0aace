"""Quantization-aware training of a Flax NNX module: a module again, for nnx.Optimizer and nnx.value_and_grad."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jqopt._model import QuantizedModel
from jqopt.errors import UnsupportedError
from jqopt.frontends.nnx import Call, function_of, with_state, with_structure
from jqopt.train._qat import QAT


class QuantizedTraining(nnx.Module):
    """A module that runs the one inside through the quantizers of a plan.

    `model` is a copy of the float module with the weights that are trained; `scales` holds the learned scales. All of
    them are `nnx.Param`s, so that `nnx.Optimizer(module, tx, wrt=nnx.Param)` trains them; other state (batch
    statistics, random streams) is updated in `model` as ever.

    Args:
        model: the NNX module that was traced; it stays as it is.
        training: from `jqopt.train.qat`, for the plan of that module.

    Raises:
        UnsupportedError: the plan isn't of an NNX module.
        PlanError: the module's parameters aren't those of the plan.
    """

    def __init__(self, model: nnx.Module, training: QAT):
        if training.plan.function.kind != "nnx":
            raise UnsupportedError(
                f"{training.plan.function.name} is no NNX module: QuantizedTraining wraps those; use training.apply"
            )
        self.training = training
        self.model = nnx.clone(model)
        first = training.first_scales(function_of(model).params)
        self.scales = nnx.data(jax.tree.map(nnx.Param, first))

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The quantized model's output."""
        graphdef, weights, rest = nnx.split(self.model, nnx.Param, ...)
        function = with_state(self.training.plan.function._replace(call=Call(graphdef)))
        plan = dataclasses.replace(self.training.plan, function=function)
        tree = {"params": weights, "state": rest}
        out, after, state = self.training.run(plan, tree, self._learned(), inputs, kwargs)
        if after != graphdef:
            raise UnsupportedError(
                f"{function.name} makes new state in this call (a cache, sown values): make it before, on the module "
                "that is trained"
            )
        nnx.update(self.model, state)
        return out

    def convert(self, model: nnx.Module) -> QuantizedModel:
        """The trained module with packed weights, in the mode it is in now (`train()`, `eval()`).

        Args:
            model: the module that was traced: its structure, not its weights.

        Returns:
            What `jqopt.quantize_model` gives; `jqopt.save` takes it.
        """
        function = function_of(self.model)
        plan = dataclasses.replace(
            self.training.plan, function=with_structure(self.training.plan.function, function.call.graphdef)
        )
        return QuantizedModel(model, plan, self.training.quantize_parts(function.params, self._learned()))

    def _learned(self) -> Any:
        return jax.tree.map(lambda p: p[...], self.scales, is_leaf=lambda x: isinstance(x, nnx.Param))
