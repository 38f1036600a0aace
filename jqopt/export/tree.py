"""A parameter tree as names and JSON: how its leaves are called in a checkpoint, and how it is put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import pydantic
from flax import linen as nn
from flax.core import FrozenDict

from jqopt._apply import is_qtensor
from jqopt.errors import CheckpointError, UnsupportedError

Parts = tuple[str, ...]
BOXES = {"Partitioned": nn.Partitioned, "LogicallyPartitioned": nn.LogicallyPartitioned}
DICTS: dict[str, Callable[[dict], Any]] = {"dict": dict, "frozen_dict": FrozenDict}
LISTS: dict[str, Callable[[list], Any]] = {"list": list, "tuple": tuple}


class Checked(pydantic.BaseModel):
    """Data of the manifest: frozen, of exactly these keys and types."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class Node(Checked):
    """One container or leaf. `keys` belong to dicts; `name` is a leaf's name or a class's; `axes` are a box's names."""

    kind: Literal["leaf", "dict", "frozen_dict", "list", "tuple", "none", "box", "custom"]
    name: str = ""
    keys: list[str | int] = []
    items: list[Node] = []
    axes: list[str | list[str] | None] = []

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Node:
        if self.kind in DICTS and len(self.keys) != len(self.items):
            raise ValueError(f"{len(self.keys)} keys for {len(self.items)} items")
        if self.kind == "box" and (self.name not in BOXES or len(self.items) != 1):
            raise ValueError(f"an unknown box {self.name!r} of {len(self.items)} items; known are {', '.join(BOXES)}")
        return self

    @property
    def leaves(self) -> list[str]:
        """The names of its leaves, except for those in custom classes."""
        return [self.name] if self.kind == "leaf" else [n for item in self.items for n in item.leaves]

    @property
    def customs(self) -> list[str]:
        """Classes in it that only an example of the tree can bring back."""
        return [self.name] if self.kind == "custom" else [c for item in self.items for c in item.customs]


def describe(tree: Any, prefix: Parts = ()) -> tuple[Node, dict[Parts, Any]]:
    """The structure of a tree, and its leaves (a QTensor is one) by the parts of their names, `prefix` first.

    Raises:
        UnsupportedError: two leaves would have one name, or a partitioned box holds what a file can't.
    """
    leaves: dict[Parts, Any] = {}
    node = _describe(tree, prefix, leaves)
    check_unique(leaves)
    return node, leaves


def check_unique(names: Iterable[Parts]) -> None:
    """No two names may be the same when joined: with slashes, as manifests do, or with dots, as Orbax does.

    Orbax 0.12.8 saves {"a.b": x, "a": {"b": y}} without a word and loads x for both.

    Raises:
        UnsupportedError: naming both.
    """
    seen: dict[str, Parts] = {}
    for parts in names:
        for joined in {"/".join(parts), ".".join(parts)}:
            other = seen.setdefault(joined, parts)
            if other != parts:
                raise UnsupportedError(
                    f"the arrays {'/'.join(other)} and {'/'.join(parts)} (parts {other} and {parts}) would both be "
                    f"called {joined!r} in a checkpoint; rename one."
                )


def _describe(tree: Any, prefix: Parts, leaves: dict[Parts, Any]) -> Node:
    kind = type(tree)
    if tree is None:
        return Node(kind="none")
    if kind in DICTS.values() and all(type(key) in (str, int) for key in tree):
        items = [_describe(item, (*prefix, str(key)), leaves) for key, item in tree.items()]
        return Node(kind="dict" if kind is dict else "frozen_dict", keys=list(tree), items=items)
    if kind in LISTS.values():
        items = [_describe(item, (*prefix, str(i)), leaves) for i, item in enumerate(tree)]
        return Node(kind="list" if kind is list else "tuple", items=items)
    if kind in BOXES.values() and jax.tree_util.all_leaves([tree.value], is_leaf=is_qtensor):
        return _describe_box(tree, prefix, leaves)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    if len(flat) == 1 and flat[0][0] == ():
        leaves[prefix] = tree
        return Node(kind="leaf", name="/".join(prefix))
    before = len(leaves)
    for key, leaf in flat:
        leaves[(*prefix, *parts_of(key))] = leaf
    if len(leaves) < before + len(flat):
        raise UnsupportedError(f"two leaves of the {kind.__name__} at {'/'.join(prefix)!r} have the same name.")
    return Node(kind="custom", name=f"{kind.__module__}.{kind.__qualname__}")


def _describe_box(box: Any, prefix: Parts, leaves: dict[Parts, Any]) -> Node:
    if box.mesh is not None or getattr(box, "rules", None) is not None:
        raise UnsupportedError(
            f"{'/'.join(prefix)}: a {type(box).__name__} box that holds a mesh or rules can't be written to a file; "
            "unbox it first with flax.linen.unbox, or leave mesh and rules out."
        )
    axes = [list(a) if isinstance(a, tuple) else a for a in box.names]
    return Node(kind="box", name=type(box).__name__, axes=axes, items=[_describe(box.value, prefix, leaves)])


def parts_of(key: tuple) -> Parts:
    """The name of a leaf from its key path; the `value` by which a box or variable holds its array is left out."""
    if key and key[-1] == jax.tree_util.GetAttrKey("value"):
        key = key[:-1]
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in key)


def rebuild(node: Node, leaves: Mapping[str, Any]) -> Any:
    """The tree that `describe` saw, with these leaves by name.

    Raises:
        CheckpointError: it holds containers of other classes than dict, list and tuple: see `fill`.
    """
    items = [rebuild(item, leaves) for item in node.items]
    if node.kind in DICTS:
        return DICTS[node.kind](dict(zip(node.keys, items, strict=True)))
    if node.kind in LISTS:
        return LISTS[node.kind](items)
    if node.kind == "box":
        names = tuple(tuple(a) if isinstance(a, list) else a for a in node.axes)
        return BOXES[node.name](items[0], names=names)
    if node.kind == "custom":
        raise CheckpointError(
            f"the parameter tree holds a {node.name}, which a checkpoint can't bring back by itself: pass an example "
            "of the tree (its leaves may be shapes), jqopt.load(dir, model, params=example)"
        )
    return leaves[node.name] if node.kind == "leaf" else None


def fill(example: Any, prefix: Parts, leaves: Mapping[str, Any]) -> Any:
    """A tree like the example with these leaves by name.

    Raises:
        CheckpointError: names or shapes differ; the message says which.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(example, is_leaf=is_qtensor)
    names = ["/".join((*prefix, *parts_of(key))) for key, _ in flat]
    compare({name: tuple(x.shape) for name, (_, x) in zip(names, flat)}, {n: tuple(x.shape) for n, x in leaves.items()})
    return treedef.unflatten([leaves[name] for name in names])


def compare(model: Mapping[str, tuple], checkpoint: Mapping[str, tuple]) -> None:
    """The model's parameters and the checkpoint's, by name, must have the same names and shapes.

    Raises:
        CheckpointError: naming what is missing, unexpected, or of another shape.
    """
    missing, extra = sorted(model.keys() - checkpoint.keys()), sorted(checkpoint.keys() - model.keys())
    if missing or extra:
        raise CheckpointError(
            f"this checkpoint is of another model. The model has, and the checkpoint lacks: {some(missing)}; the "
            f"checkpoint has, and the model lacks: {some(extra)}."
        )
    for name, shape in model.items():
        if shape != checkpoint[name]:
            raise CheckpointError(
                f"{name}: this checkpoint is of another model: it has shape {checkpoint[name]} here, the model {shape}."
            )


def some(names: list[str], most: int = 6) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
