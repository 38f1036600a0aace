"""Low-rank adapters over a quantized model (QLoRA): packed weights stay as they are, two thin matrices are trained."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jqopt import _apply, _ops, _stage
from jqopt._apply import Executor, Quantized
from jqopt._plan import Decision, Plan
from jqopt._qtensor import QTensor
from jqopt._simulated import products
from jqopt.errors import PlanError, UnsupportedError

Adapters = dict[str, dict[str, jax.Array]]
"""{parameter path: {"a": [*stack, rank, k], "b": [*stack, n, rank]}}, float32: a plain tree for any optimizer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Adapted(QTensor):
    """A packed parameter with an adapter beside it: it stands for dequantized + gain * b @ a."""

    BY_ROW: ClassVar[tuple[str, ...]] = (*QTensor.BY_ROW, "b")

    a: jax.Array
    b: jax.Array
    gain: float = dataclasses.field(metadata={"static": True})

    def dequantize(self) -> jax.Array:
        """The parameter this stands for: where an operation can't run on packed weights, and to merge."""
        return self.layout.from_matrix(self.whole() + self.gain * jnp.matmul(self.b, self.a)).astype(self.dtype)


class Adapter(Executor):
    """The executor's rule, with the adapter's product beside the packed one."""

    def product(self, rows: jax.Array, taken: _ops.Activation, tensor: QTensor, decision: Decision) -> jax.Array:
        packed = super().product(rows, taken, tensor, decision)
        if not isinstance(tensor, Adapted):
            return packed
        return packed + tensor.gain * products(products(rows.astype(jnp.float32), tensor.a), tensor.b)

    def grouped(
        self, rows: jax.Array, taken: jax.Array, tensor: QTensor, sizes: jax.Array, decision: Decision
    ) -> jax.Array:
        packed = super().grouped(rows, taken, tensor, sizes, decision)
        if not isinstance(tensor, Adapted):
            return packed
        down = jax.lax.ragged_dot(rows.astype(jnp.float32), tensor.a.swapaxes(1, 2), sizes)
        return packed + tensor.gain * jax.lax.ragged_dot(down, tensor.b.swapaxes(1, 2), sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
    """Adapters of a quantized model; see `lora`."""

    plan: Plan = dataclasses.field(repr=False)
    paths: tuple[str, ...]
    """The parameters that have an adapter."""
    rank: int
    alpha: float

    def init(self, key: jax.Array) -> Adapters:
        """A random a, normal with variance 1/k, and a b of zeros: at first nothing changes."""
        out = {}
        for path, k in zip(self.paths, jax.random.split(key, len(self.paths)), strict=True):
            layout = self.plan.quantized[path].layout
            assert layout is not None, path
            stack = tuple(layout.atoms[i] for i in layout.stack)
            a = jax.random.normal(k, (*stack, self.rank, layout.k), jnp.float32) / math.sqrt(layout.k)
            out[path] = {"a": a, "b": jnp.zeros((*stack, layout.n, self.rank), jnp.float32)}
        return out

    def apply(self, adapters: Adapters, quant: Quantized, *inputs: Any, **kwargs: Any) -> Any:
        """The quantized model's output with the adapters' beside it: y = qdot(x, w) + alpha/rank (x a^T) b^T.

        The adapters see activations as they are, before they are quantized. Gradients go to the adapters (and the
        inputs) only; `quant` takes none. Pure: jit, grad and shard it.
        """
        return self._static((adapters, quant), *inputs, **kwargs)

    def merge(self, adapters: Adapters, quant: Quantized) -> Any:
        """The float parameters that weights and adapters together stand for: dequantized + alpha/rank b a.

        Returns:
            A tree as it was quantized; of an NNX module its state, for `nnx.update(module, state)`. It may be quantized
            again, but that rounds the adapters too.
        """
        tree = self._adapted(adapters, quant)
        dense = jax.tree.map(lambda x: x.dequantize() if isinstance(x, QTensor) else x, tree, is_leaf=_apply.is_qtensor)
        return self.plan.function.untree(dense)

    @functools.cached_property
    def _static(self) -> _apply.Static:
        return _apply.Static(self._run)

    def _run(self, given: tuple[Adapters, Quantized], inputs: tuple, kwargs: dict) -> Any:
        adapters, quant = given
        tree = self._adapted(adapters, jax.lax.stop_gradient(quant))
        return _apply.run(self.plan, lambda sites: Adapter(sites, False, None), tree, inputs, kwargs)

    def _adapted(self, adapters: Adapters, quant: Any) -> Any:
        """The quantized tree with an Adapted in place of each weight that has an adapter."""
        params = quant.params if isinstance(quant, Quantized) else quant
        if set(adapters) != set(self.paths):
            raise PlanError(
                f"these adapters aren't those that `init` gave: found {sorted(adapters)[:6]}, expected "
                f"{list(self.paths[:6])}"
            )
        flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_apply.is_qtensor)
        leaves = []
        for key, leaf in flat:
            path = _stage.parameter_path(self.plan.function, key, leaf)
            if path in adapters and isinstance(leaf, QTensor):
                fields: dict[str, Any] = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(QTensor)}
                fields |= adapters[path]
                leaf = Adapted(**fields, gain=self.alpha / self.rank)
            leaves.append(leaf)
        return treedef.unflatten(leaves)


def lora(plan: Plan, rank: int, *, alpha: float | None = None, match: str = "*") -> LoRA:
    """Adapters for the packed weights of a quantized model (QLoRA, Dettmers et al. 2023; LoRA, Hu et al. 2021).

        lora = jqopt.train.lora(plan, rank=8, alpha=16)
        adapters = lora.init(jax.random.key(0))
        y = lora.apply(adapters, quant, *inputs)      # quant: from jqopt.quantize, or qm.quant
        params = lora.merge(adapters, quant)

    Args:
        rank: how many rows a, and columns b, have.
        alpha: the product b a is multiplied by alpha / rank; `rank` unless given.
        match: a glob over parameter paths. Of those that it matches, weights of products (`dot_general`, `ragged_dot`)
            get an adapter; lookups and convolutions don't.

    Raises:
        PlanError: no such weight, or the plan has no model.
        UnsupportedError: a rank below 1.
    """
    if plan.function is None:
        raise PlanError("this plan was read from a file and has no model; load it with jqopt.load(dir, model)")
    if rank < 1:
        raise UnsupportedError(f"lora: rank {rank}; write a whole number from 1")
    ops = _ops_of(plan)
    paths = tuple(p for p in ops if fnmatch.fnmatchcase(p, match) and ops[p] <= {"dot_general", "ragged_dot"})
    if not paths:
        raise PlanError(
            f"lora: {match!r} matches no quantized weight of a product. Those are: "
            + (", ".join(p for p in ops if ops[p] <= {"dot_general", "ragged_dot"}) or "none")
        )
    return LoRA(plan, paths, rank, float(rank if alpha is None else alpha))


def _ops_of(plan: Plan) -> Mapping[str, set[str]]:
    """The operations that read each quantized parameter."""
    out: dict[str, set[str]] = {path: set() for path in plan.quantized}
    for d in plan.decisions:
        if d.path in out and d.weight is not None:
            out[d.path].add(d.op)
    return out
