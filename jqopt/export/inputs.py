"""The inputs a model was traced with, as shapes in JSON: with them a reader can tell whether it has the same model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jqopt.export.tree import Checked, Node, describe, rebuild

KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


class Input(Checked):
    """One leaf of the inputs that the model was traced with: an array's (or random key's) shape, or a plain value."""

    shape: list[int] | None = None
    dtype: str | None = None
    impl: str | None = None
    value: str | int | float | bool | None = None


class Inputs(Checked):
    """(args, kwargs) of the call that the model was traced with, as shapes."""

    tree: Node
    leaves: dict[str, Input]


def inputs_of(call: tuple[tuple, dict] | None) -> Inputs | None:
    """What a checkpoint remembers of a call, or None where it holds things that are no data (functions, modules)."""
    if call is None:
        return None
    tree, leaves = describe((tuple(call[0]), dict(call[1])))
    entries = {"/".join(parts): _input(leaf) for parts, leaf in leaves.items()}
    if tree.customs or any(entry is None for entry in entries.values()):
        return None
    return Inputs(tree=tree, leaves={name: entry for name, entry in entries.items() if entry is not None})


def _input(leaf: Any) -> Input | None:
    if isinstance(leaf, str | int | float | bool):
        return Input(value=leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return None
    if is_key(leaf):
        impl = next((i for i in KEY_IMPLS if _key_dtype(i) == leaf.dtype), None)
        return None if impl is None else Input(shape=list(leaf.shape), impl=impl)
    return Input(shape=list(leaf.shape), dtype=str(leaf.dtype))


def call_of(inputs: Inputs) -> tuple[tuple, dict]:
    """(args, kwargs) with shapes where arrays were."""
    leaves = {name: _abstract(entry) for name, entry in inputs.leaves.items()}
    return rebuild(inputs.tree, leaves)


def _abstract(entry: Input) -> Any:
    if entry.shape is None:
        return entry.value
    if entry.impl is not None:
        return jax.ShapeDtypeStruct(tuple(entry.shape), _key_dtype(entry.impl))
    return jax.ShapeDtypeStruct(tuple(entry.shape), jnp.dtype(entry.dtype))


def _key_dtype(impl: str) -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def is_key(leaf: Any) -> bool:
    """Whether it is an array of typed random keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
