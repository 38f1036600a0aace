"""Pruned and permuted parameters: which positions go where, the smaller model that takes them, and what it computes.

The positions are those written by hand in tests/dataflow_zoo.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jqopt
from jqopt import transforms
from jqopt._trace import Graph
from jqopt.errors import JqoptError, PlanError
from tests import dataflow_zoo as models
from tests import zoo
from tests.dataflow_zoo import CASES, CLASSES, Free

pytestmark = pytest.mark.quick

TOLERANCE = 1e-5


@functools.cache
def made(name: str) -> tuple[models.Built, Graph, Callable[[Any], jax.Array]]:
    """(model, its graph, params -> output)."""
    built = models.build(name)
    return built, jqopt.trace(*models.shapes(name).arguments), models.runner(built)


def size_of(name: str, free: Free) -> int:
    return CASES[name].widths[free.width] if isinstance(free.width, str) else free.width


def some(n: int, seed: int = 0) -> np.ndarray:
    """About two thirds of n positions, in order."""
    count = max(1, n - max(1, n // 3))
    return np.sort(np.random.default_rng(seed).permutation(n)[:count])


def leaf_names(tree) -> list[str]:
    """Paths of a tree's leaves, as symbols have them."""

    def name(key) -> str:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if isinstance(tree, nnx.State):
            path = path.removesuffix("/value")
            return f"state/{path}" if path.endswith(("/mean", "/var")) else path
        return path.removeprefix("params/")

    return [name(key) for key, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def masks(name: str, tree, free: Free, keep: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    """{leaf: {axis: which of its positions stay}}, from the spots."""
    shapes = dict(zip(leaf_names(tree), (x.shape for x in jax.tree.leaves(tree)), strict=True))
    out: dict[str, dict[int, np.ndarray]] = {}
    for s in free.spots:
        path, axis = s.symbol[:-1].rsplit("[", 1)
        n = shapes[path][int(axis)]
        stays = out.setdefault(path, {}).setdefault(int(axis), np.ones(n, bool))
        p = np.arange(s.start, s.stop or n)
        stays[p] &= np.isin((p - s.start) // s.stride % size_of(name, free), keep)
    return out


def changed(tree, stays, change):
    """The tree with change(leaf, axis, mask) for each mask."""
    leaves, treedef = jax.tree.flatten(tree)
    out = []
    for path, leaf in zip(leaf_names(tree), leaves, strict=True):
        for axis, mask in stays.get(path, {}).items():
            leaf = change(leaf, axis, mask)
        out.append(leaf)
    return treedef.unflatten(out)


def taken(leaf, axis: int, mask: np.ndarray) -> np.ndarray:
    return np.compress(mask, np.asarray(leaf), axis=axis)


def zeroed(leaf, axis: int, mask: np.ndarray) -> np.ndarray:
    shape = [-1 if i == axis else 1 for i in range(leaf.ndim)]
    return np.where(mask.reshape(shape), np.asarray(leaf), np.zeros((), leaf.dtype))


def source(built: models.Built):
    """What a transform takes."""
    return built.model if built.params is None else built.params


def assert_same_tree(got, want) -> None:
    assert leaf_names(got) == leaf_names(want)
    for name, a, b in zip(leaf_names(got), jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def assert_close(got, want) -> None:
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE * float(np.abs(want).max()))


def frees(**wanted) -> list:
    return [
        pytest.param(name, f, id=f"{name}-{f.name}")
        for name, found in CLASSES.items()
        for f in found
        if isinstance(f, Free) and "remat" not in name and all(getattr(f, k) == v for k, v in wanted.items())
    ]


# ------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(("name", "free"), frees(alone=False))
def test_prune_takes_the_positions_of_every_member(name: str, free: Free):
    built, graph, _ = made(name)
    keep = some(size_of(name, free))
    before = models.state(built)
    got = transforms.prune(graph, class_name(graph, free), keep)(source(built))
    assert_same_tree(got, changed(before, masks(name, before, free, keep), taken))


def class_name(graph, free: Free) -> str:
    """The name of the class at the first spot."""
    s = free.spots[0]
    (found,) = (
        c.name for c in graph.classes
        if any((m.symbol, m.start, m.stride) == (s.symbol, s.start, s.stride) for m in c.members)
    )  # fmt: skip
    return found


@pytest.mark.parametrize(("name", "free"), frees(alone=True))
def test_the_smaller_model_takes_pruned_parameters_and_computes_the_same(name: str, free: Free):
    built, graph, run = made(name)
    keep = some(size_of(name, free), seed=1)
    got = transforms.prune(graph, class_name(graph, free), keep)(source(built))
    before = models.state(built)
    assert_same_tree(got, changed(before, masks(name, before, free, keep), taken))
    small = models.shapes(name, **{str(free.width): len(keep)})
    wanted = models.state(small)
    assert leaf_names(got) == leaf_names(wanted)
    assert [x.shape for x in jax.tree.leaves(got)] == [x.shape for x in jax.tree.leaves(wanted)]
    if small.params is None:
        nnx.update(small.model, got)
        got = models.state(small)
    output = models.runner(small)(got)
    whole = run(changed(before, masks(name, before, free, keep), zeroed))
    assert output.shape == whole.shape and np.isfinite(np.asarray(output)).all()
    if free.exact:
        assert_close(output, whole)
        assert np.abs(np.asarray(run(before)) - np.asarray(whole)).max() > 1e-3  # what was pruned did matter


def test_every_layer_of_an_unrolled_model_can_be_pruned_in_turn():
    built, graph, run = made("llama")
    keep, params, zeros = some(23, seed=2), built.params, built.params
    for i in range(3):
        free = next(
            f for f in CLASSES["llama"] if isinstance(f, Free) and f.spots[0].symbol.startswith(f"layers_{i}/mlp")
        )
        params = transforms.prune(graph, f"layers_{i}/mlp/up_proj/kernel[1]", keep)(params)
        zeros = changed(zeros, masks("llama", zeros, free, keep), zeroed)
    small = models.build("llama", ff=len(keep))
    assert_close(models.runner(small)(params), run(zeros))


def test_a_model_can_be_pruned_traced_again_and_pruned_again():
    built, graph, run = made("cnn")
    once = transforms.prune(graph, "conv3/kernel[3]", [0, 2, 4])(built.params)
    small = models.build("cnn", side=3)
    again = jqopt.trace(small.model, once, *small.inputs)
    twice = transforms.prune(again, "bn1/scale[0]", [1, 2, 3, 6])(once)
    tiny = models.build("cnn", side=3, wide=4)
    wide, side = CLASSES["cnn"][:2]
    zeros = built.params
    for free, keep in ((side, [0, 2, 4]), (wide, [1, 2, 3, 6])):
        assert isinstance(free, Free)
        zeros = changed(zeros, masks("cnn", zeros, free, np.array(keep)), zeroed)
    assert_close(models.runner(tiny)(twice), run(zeros))


def test_keep_may_be_booleans_or_numbers_in_any_order():
    built, graph, _ = made("gated")
    cls = graph.class_of("part/up/kernel[1]")
    mask = np.isin(np.arange(9), [1, 4, 8])
    want = transforms.prune(graph, cls, [1, 4, 8])(built.params)
    for keep in (mask, [8, 1, 4], np.array([4, 8, 1]), (1, 4, 8)):
        assert_same_tree(transforms.prune(graph, cls, keep)(built.params), want)


def test_keeping_everything_changes_nothing():
    built, graph, _ = made("gated")
    assert_same_tree(transforms.prune(graph, "part/up/kernel[1]", range(9))(built.params), built.params)


def test_the_parameters_given_stay_as_they_are():
    built, graph, _ = made("gated")
    before = jax.tree.map(np.array, built.params)
    transforms.prune(graph, "part/up/kernel[1]", [0])(built.params)
    transforms.permute(graph, "part/up/kernel[1]", np.arange(9)[::-1])(built.params)
    assert_same_tree(built.params, before)


def test_transforms_can_be_compiled_and_shaped():
    built, graph, _ = made("fused_qkv")
    (name,) = [c.name for c in graph.classes if c.size == 5]
    prune = transforms.prune(graph, name, [0, 3])
    want = prune(built.params)
    assert_same_tree(jax.jit(prune)(built.params), want)
    shaped = jax.eval_shape(prune, built.params)
    assert [x.shape for x in jax.tree.leaves(shaped)] == [x.shape for x in jax.tree.leaves(want)]


def test_a_class_can_be_given_as_itself_its_name_or_a_symbol():
    built, graph, _ = made("gqa_einsum")
    cls = next(c for c in graph.classes if c.pinned is None and c.size == 3)
    want = transforms.prune(graph, cls, [0, 2])(built.params)
    assert_same_tree(transforms.prune(graph, cls.name, [0, 2])(built.params), want)
    built, graph, _ = made("gated")
    cls = graph.class_of("part/down/kernel[0]")
    want = transforms.prune(graph, cls, [0, 2])(built.params)
    for symbol in cls.symbols:
        assert_same_tree(transforms.prune(graph, symbol, [0, 2])(built.params), want)


def test_layers_of_a_scan_are_dropped():
    built, graph, run = made("llama_scan")
    got = transforms.prune(graph, "layers/mlp/up_proj/kernel[0]", [0, 2])(built.params)
    small = models.build("llama_scan", layers=2)
    zeros = jax.tree.map(lambda x: x, built.params)
    zeros["params"]["layers"] = jax.tree.map(lambda x: x.at[1].set(0.0), zeros["params"]["layers"])
    assert_close(models.runner(small)(got), run(zeros))  # a layer of zeros adds nothing to the residual stream


def test_a_function_model_and_one_parameter_that_is_in_its_class_twice():
    def model(params, x):
        for _ in range(2):
            x = jnp.tanh(x @ params["in"] @ params["square"]) @ params["out"]
        return x

    draw = np.random.default_rng(0)
    params = {
        n: jnp.asarray(draw.normal(size=s), jnp.float32)
        for n, s in {"in": (4, 6), "square": (6, 6), "out": (6, 4)}.items()
    }
    x = jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)
    graph = jqopt.trace(model, params, x)
    assert graph.class_of("in[1]") is graph.class_of("square[0]") is not graph.class_of("square[1]")
    got = transforms.prune(graph, "square[1]", [0, 5])(params)
    np.testing.assert_array_equal(got["square"], params["square"][:, [0, 5]])
    zeros = params | {"square": params["square"].at[:, 1:5].set(0)}
    assert_close(model(got, x), model(zeros, x))

    def twice(params, x):
        h = x @ params["in"]
        return (h + jnp.tanh(h @ params["square"])) @ params["out"]

    graph = jqopt.trace(twice, params, x)
    got = transforms.prune(graph, "in[1]", [1, 2, 5])(params)
    np.testing.assert_array_equal(got["square"], params["square"][np.ix_([1, 2, 5], [1, 2, 5])])


def test_dtypes_are_kept():
    def model(params, x):
        return (x @ params["a"]).astype(jnp.float32) @ params["b"]

    params = {"a": jnp.ones((4, 6), jnp.bfloat16), "b": jnp.ones((6, 3), jnp.float32)}
    graph = jqopt.trace(model, params, jnp.ones((2, 4), jnp.bfloat16))
    got = transforms.prune(graph, "a[1]", [0, 1])(params)
    assert got["a"].dtype == jnp.bfloat16 and got["b"].dtype == jnp.float32


def test_nnx_takes_the_module_or_its_state():
    built, graph, _ = made("nnx_cnn")
    prune = transforms.prune(graph, "bn/scale[0]", [0, 3])
    assert_same_tree(prune(nnx.state(built.model)), prune(built.model))
    small = models.build("nnx_cnn", first=2)
    nnx.update(small.model, prune(built.model))
    assert small.model.bn.mean[...].shape == (2,) and small.model.conv2.kernel[...].shape == (3, 3, 2, 7)


# ------------------------------------------------------------------------------------------- permute


@pytest.mark.parametrize("name", CASES)
def test_a_permuted_model_computes_the_same(name: str):
    built, graph, run = made(name)
    want = run(models.state(built))
    draw = np.random.default_rng(3)
    for cls in graph.classes:
        if not cls.permutable:
            continue
        order = draw.permutation(cls.size)
        order = np.roll(order, 1) if (order == np.arange(cls.size)).all() else order
        got = transforms.permute(graph, cls, order)(source(built))
        leaves = zip(leaf_names(got), jax.tree.leaves(got), jax.tree.leaves(models.state(built)), strict=True)
        moved = [n for n, a, b in leaves if not np.array_equal(a, b)]
        assert sorted(moved) == sorted({m.path for m in cls.members}), cls.name
        assert_close(run(got), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_model_with_folded_scales_computes_the_same(name: str):
    """Every fold target of every model, and all norms; a model may have none, but each of its groups says why."""
    built, graph, run = made(name)
    want = run(models.state(built))
    assert list(graph.folds) == [g.name for g in graph.groups]
    for i, fold in enumerate(graph.folds.values()):
        if fold.reason:
            assert not fold.absorbers
            continue
        scale = fold.project(np.random.default_rng(i).uniform(0.5, 2.0, fold.shape).astype(np.float32))
        assert_close(run(transforms.fold_scale(graph, fold.group, scale)(source(built))), want)
    assert_close(run(transforms.fold_norms(graph)(source(built))), want)


@pytest.mark.parametrize("cls", [*zoo.PEERS_25, *zoo.MORE])
def test_a_permuted_model_of_the_other_zoo_computes_the_same(cls):
    x = zoo.SEVERAL.get(cls, zoo.X)
    model = cls()
    params = models.fill(jax.eval_shape(model.init, jax.random.key(1), x))
    graph = jqopt.trace(model, params, x)
    run = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    want = run(params, x)
    for found in graph.classes:
        if found.permutable:
            order = np.random.default_rng(4).permutation(found.size)
            assert_close(run(transforms.permute(graph, found, order)(params), x), want)


MIXED = (
    "depthwise", "depth_multiplier", "grouped", "general_attention", "fused_qkv", "reshaped_qkv", "gqa_repeat",
    "gate_up_split", "gate_up_pairs", "llama_scan", "lstm", "nnx_cnn",
)  # fmt: skip
"""Models whose axes have factors or segments, or are stacked, or are in a class twice."""


@pytest.mark.parametrize(("name", "free"), [p for p in frees(permutable=True) if p.values[0] in MIXED])
def test_permute_puts_what_order_names_at_each_position(name: str, free: Free):
    """Position i becomes what order[i] was, at every spot."""
    built, graph, _ = made(name)
    n = size_of(name, free)
    order = np.random.default_rng(5).permutation(n)
    before = dict(zip(leaf_names(models.state(built)), jax.tree.leaves(models.state(built)), strict=True))
    got = transforms.permute(graph, class_name(graph, free), order)(source(built))
    after = dict(zip(leaf_names(got), jax.tree.leaves(got), strict=True))
    want: dict[str, dict[int, np.ndarray]] = {}
    for s in free.spots:
        path, axis = s.symbol[:-1].rsplit("[", 1)
        length = before[path].shape[int(axis)]
        where = want.setdefault(path, {}).setdefault(int(axis), np.arange(length))
        p = np.arange(s.start, s.stop or length)
        index = (p - s.start) // s.stride % n
        where[p] = p + (order[index] - index) * s.stride
    for path, axes in want.items():
        leaf = np.asarray(before[path])
        for axis, where in axes.items():
            leaf = np.take(leaf, where, axis)
        np.testing.assert_array_equal(np.asarray(after[path]), leaf, err_msg=path)


def test_an_order_and_its_inverse_give_the_parameters_back():
    built, graph, _ = made("gqa_repeat")
    for cls in graph.classes:
        if cls.permutable:
            order = np.random.default_rng(6).permutation(cls.size)
            there = transforms.permute(graph, cls, order)(built.params)
            assert_same_tree(transforms.permute(graph, cls, np.argsort(order))(there), built.params)


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "symbol", "why"),
    [("gated", "head/kernel[1]", "output"), ("cnn", "conv1/kernel[2]", "input"),
     ("gated", "embed/embedding[0]", "looked up"), ("cnn", "conv1/kernel[0]", "convolution moves"),
     ("callback", "before/kernel[1]", "pure_callback")],
)  # fmt: skip
def test_a_pinned_class_is_refused_with_its_reason(name: str, symbol: str, why: str):
    _, graph, _ = made(name)
    for act in (transforms.prune, transforms.permute):
        with pytest.raises(PlanError, match=why) as e:
            act(graph, symbol, [1, 0])
        assert symbol.rpartition("/")[0].split("/")[0] in str(e.value)


def test_the_depth_that_rotates_is_refused_naming_the_line():
    _, graph, _ = made("llama_one_layer")
    pinned = [c for c in graph.classes if c.pinned and "layers_0/self_attn/q_proj/kernel[1]" in c.symbols]
    assert pinned
    with pytest.raises(PlanError, match=r"constant.*rope\.py:\d+ \(rotate\)"):
        transforms.prune(graph, pinned[0], [0])


def test_layers_in_a_loop_can_be_pruned_but_not_permuted():
    _, graph, _ = made("llama_scan")
    with pytest.raises(PlanError, match="layers.*each step on the result of the one before"):
        transforms.permute(graph, "layers/mlp/up_proj/kernel[0]", [2, 0, 1])


@pytest.mark.parametrize(
    ("keep", "message"),
    [([], "nothing is kept"), ([0, 9], "no position 9"), ([-1], "no position -1"), ([0, 0], "twice"),
     ([0.0, 1.0], "whole numbers"), ([[0, 1]], "whole numbers"), (np.zeros(9, bool), "nothing is kept"),
     (np.ones(8, bool), "booleans"), (3, "whole numbers")],
)  # fmt: skip
def test_a_bad_keep_is_refused(keep, message: str):
    _, graph, _ = made("gated")
    with pytest.raises(PlanError, match=message) as e:
        transforms.prune(graph, "part/up/kernel[1]", keep)
    assert "part/" in str(e.value)


@pytest.mark.parametrize(
    ("order", "message"),
    [([0, 1], "each of its 9"), ([0] * 9, "twice"), (range(1, 10), "no position 9"), ([], "each of its 9"),
     (np.linspace(0, 8, 9), "whole numbers"), (np.ones(9, bool), "order|whole numbers|permutation")],
)  # fmt: skip
def test_a_bad_order_is_refused(order, message: str):
    _, graph, _ = made("gated")
    with pytest.raises(PlanError, match=message):
        transforms.permute(graph, "part/up/kernel[1]", order)


def test_unknown_classes_are_refused():
    _, graph, _ = made("gated")
    with pytest.raises(JqoptError, match=r"part/upp.*part/up"):
        transforms.prune(graph, "part/upp/kernel[1]", [0])
    with pytest.raises(JqoptError, match="several classes"):
        transforms.prune(made("gqa_einsum")[1], "part/q/kernel[1]", [0])


def test_parameters_of_another_shape_are_refused():
    """A class of another graph would take wrong positions silently."""
    _, graph, _ = made("gated")
    prune = transforms.prune(graph, "part/up/kernel[1]", [0, 8])
    with pytest.raises(JqoptError, match=r"part/.*\[14, 9\]|\[14, 4\]|shape|9"):
        prune(models.build("gated", ff=4).params)


def test_a_class_of_another_graph_is_refused():
    cls = made("llama_one_layer")[1].class_of("layers_0/mlp/up_proj/kernel[1]")
    with pytest.raises(JqoptError):
        transforms.prune(made("gated")[1], cls, [0])


def test_parameters_that_lack_a_leaf_are_refused():
    built, graph, _ = made("gated")
    params = {"params": {k: v for k, v in built.params["params"].items() if k != "part"}}
    with pytest.raises(JqoptError, match="3 arrays.*traced with 9"):
        transforms.prune(graph, "part/up/kernel[1]", [0])(params)
