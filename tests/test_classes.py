"""Axis classes of small models against what the models compute, written by hand in tests/dataflow_zoo.py."""

from __future__ import annotations

import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jqopt
from jqopt._trace import Graph
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import dataflow_zoo as models
from tests import zoo
from tests.dataflow_zoo import CASES, CLASSES, Free, Pinned, Spot


@functools.cache
def traced(name: str) -> Graph:
    return jqopt.trace(*models.shapes(name).arguments)


@functools.cache
def traced_zoo(cls: type[nn.Module]) -> Graph:
    x = zoo.SEVERAL.get(cls, zoo.X)
    return jqopt.trace(cls(), jax.eval_shape(cls().init, jax.random.key(1), x), x)


def sizes(graph) -> dict[str, int]:
    return {s.name: s.size for s in graph.symbols}


def places(graph, spots: tuple[Spot, ...]) -> set[tuple]:
    """Spots as (symbol, first position, length of the segment, stride)."""
    size = sizes(graph)
    return {(s.symbol, s.start, (s.stop or size[s.symbol]) - s.start, s.stride) for s in spots}


def members(cls) -> set[tuple]:
    return {(m.symbol, m.start, m.length, m.stride) for m in cls.members}


def holder(graph, spot: Spot):
    """The class at a spot."""
    ((symbol, start, _, stride),) = places(graph, (spot,))
    found = [
        c for c in graph.classes if any((m.symbol, m.start, m.stride) == (symbol, start, stride) for m in c.members)
    ]
    assert len(found) == 1, f"{spot}: {len(found)} classes; {symbol} is {graph.parts(symbol)}"
    return found[0]


def expected(kind: type) -> list:
    return [
        pytest.param(name, e, id=f"{name}-{i}-{e.spots[0].symbol}")
        for name, all_of_it in CLASSES.items()
        for i, e in enumerate(all_of_it)
        if isinstance(e, kind)
    ]


# ------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(("name", "free"), expected(Free))
def test_class_has_all_its_places_and_no_other(name: str, free: Free):
    graph = traced(name)
    cls = holder(graph, free.spots[0])
    assert members(cls) == places(graph, free.spots)
    assert cls.size == (CASES[name].widths[free.width] if isinstance(free.width, str) else free.width)
    assert cls.pinned is None, str(cls.pinned)
    assert cls.permutable == free.permutable
    assert set(cls.symbols) == {s.symbol for s in free.spots}


@pytest.mark.parametrize(("name", "held"), expected(Pinned))
def test_class_is_pinned_with_its_reason(name: str, held: Pinned):
    graph = traced(name)
    cls = holder(graph, held.spots[0])
    assert places(graph, held.spots) <= members(cls)
    assert cls.pinned is not None and not cls.permutable
    assert held.why in str(cls.pinned)


@pytest.mark.parametrize("name", CASES)
def test_no_other_class_may_change(name: str):
    graph = traced(name)
    listed = [places(graph, e.spots) for e in CLASSES[name] if isinstance(e, Free)]
    assert [c.name for c in graph.classes if c.pinned is None and members(c) not in listed] == []


@pytest.mark.parametrize(
    "name", [n for n, es in CLASSES.items() if any(isinstance(e, Free) and not e.exact for e in es)]
)
def test_a_norm_or_softmax_over_a_class_is_noted(name: str):
    graph = traced(name)
    for e in CLASSES[name]:
        if isinstance(e, Free) and not e.exact:
            notes = " ".join(holder(graph, e.spots[0]).notes)
            assert "reduce" in notes, (e.name, notes)
            assert "dataflow_zoo.py" in notes or "rope.py" in notes or "(" in notes


@pytest.mark.parametrize("name", ["cnn", "resnet", "gated", "moe_dense", "lstm"])
def test_what_no_statistic_goes_over_has_no_note(name: str):
    graph = traced(name)
    noted = [e.name for e in CLASSES[name] if isinstance(e, Free) and e.exact and holder(graph, e.spots[0]).notes]
    assert noted == []


@pytest.mark.parametrize("name", ["llama", "llama_scan"])
def test_rotated_depth_is_pinned_by_the_angles(name: str):
    graph = traced(name)
    for symbol in sizes(graph):
        if re.search(r"[qk]_proj/kernel\[" + ("2" if "scan" in name else "1"), symbol):
            inner = [c for c in graph.classes for m in c.members if m.symbol == symbol and m.stride < 4]
            assert inner and all("constant" in str(c.pinned) for c in inner)
            assert all("rope.py" in str(c.pinned) for c in inner)


@pytest.mark.parametrize("name", ["rope_halves", "rope_strided", "rope_pairs"])
def test_rotated_depth_of_own_attention_is_pinned(name: str):
    graph = traced(name)
    for symbol in ("part/q/kernel[1]", "part/k/kernel[1]", "part/q/bias[0]"):
        inner = [c for c in graph.classes for m in c.members if m.symbol == symbol and m.stride < 8]
        assert inner and all(c.pinned is not None for c in inner)
        assert any("constant" in str(c.pinned) for c in inner)


def test_halves_that_rotate_together_are_tied():
    cls = holder(traced("rope_halves"), models.spot("part/q/kernel[1]@0:4"))
    assert {m.start for m in cls.members if m.symbol == "part/q/kernel[1]"} == {0, 4}
    assert any("part/q/kernel[1]" in tie for tie in cls.ties)


def test_one_layer_axis_over_all_stacked_parameters():
    (cls,) = [c for c in traced("llama_scan").classes if not c.permutable and c.pinned is None]
    assert set(cls.symbols) == {
        s.name for s in traced("llama_scan").symbols if s.path.startswith("layers/") and s.axis == 0
    }
    assert any("loop" in n or "scan" in n for n in cls.notes)


def test_scanned_and_unrolled_layers_have_the_same_classes():
    """Of every class of the scanned model, its place in one layer is a class of the unrolled one."""

    def of_layer(c):
        return {
            (s.replace("layers/", "layers_0/"), a, n, k) for s, a, n, k in members(c) if not s.startswith("layers/norm")
        }

    unrolled = traced("llama_one_layer")
    flat = {frozenset(members(c)) for c in unrolled.classes if c.pinned is None}
    shifted = set()
    for c in traced("llama_scan").classes:
        if c.pinned is None and c.permutable:
            shifted.add(frozenset((_less_axis(s), a, n, k) for s, a, n, k in of_layer(c)))
    assert shifted == flat


def _less_axis(symbol: str) -> str:
    path, axis = symbol[:-1].rsplit("[", 1)
    return f"{path}[{int(axis) - path.startswith('layers_0/')}]"


def test_remat_changes_nothing():
    for one, other in (("llama", "llama_remat"), ("llama_scan", "llama_scan_remat")):
        mine, its = (
            {(c.name, c.size, frozenset(members(c)), c.permutable) for c in traced(n).classes} for n in (one, other)
        )
        assert mine == its


@pytest.mark.parametrize("name", ["rope_strided", "rope_pairs"])
def test_interleaved_pairs_are_one_structure(name: str):
    """depth 8 is 4 angles x 2: however the program takes the pairs apart."""
    cls = holder(traced(name), models.spot("part/q/kernel[1]*2"))
    assert cls.size == 4 and "constant" in str(cls.pinned)


# ------------------------------------------------------- what torch tools find in these models, and more


def contains(name: str, *symbols: str) -> bool:
    """Are these axes, or these parts of them, in one class?"""
    found = [holder(traced(name), models.spot(s)) for s in symbols]
    return all(c is found[0] for c in found)


def test_every_class_that_module_tracing_finds_is_in_one_of_ours():
    """Per-module tracers report these. Ours hold them, and the parameters they call constant besides."""
    assert contains("cnn", *(f"{n}[0]" for n in ("bn1/scale", "bn2/scale", "bn1/bias", "bn2/bias")),
                    "conv1/kernel[3]", "conv2/kernel[2]", "conv2/kernel[3]", "conv3/kernel[2]")  # fmt: skip
    assert contains("cnn", "conv1/kernel[3]", "conv4/kernel[2]@0:7")  # conv4 reads [r | c]
    assert contains("cnn", "conv3/kernel[3]", "conv4/kernel[2]@7:12")
    assert contains("depthwise", "stem/kernel[3]", "depthwise/kernel[3]@0:6")  # after a concatenation
    assert contains("depthwise", "branch/kernel[3]", "depthwise/kernel[3]@6:10")
    assert contains("group_norm", "conv1/kernel[3]*5", "norm/scale[0]*5", "conv2/kernel[2]*5")
    assert contains("group_norm", "conv1/kernel[3]", "norm/scale[0]", "conv2/kernel[2]")
    for name in ("transformer_rms", "transformer_layer"):
        for i in (0, 1):
            assert contains(name, f"mlp{i}/gate/kernel[1]", f"mlp{i}/up/kernel[1]", f"mlp{i}/down/kernel[0]")
    for i in range(3):
        layer = f"layers_{i}/mlp/"
        assert contains(
            "llama", f"{layer}gate_proj/kernel[1]", f"{layer}up_proj/kernel[1]", f"{layer}down_proj/kernel[0]"
        )


def test_classes_that_module_tracing_misses():
    assert contains("transformer_rms", "embed/embedding[1]", "norm0a/scale[0]", "attn0/q/kernel[0]",
                    "attn1/o/kernel[1]", "mlp1/down/kernel[1]", "head/kernel[0]")  # fmt: skip
    assert contains("llama", "layers_0/self_attn/q_proj/kernel[1]*12", "layers_0/self_attn/k_proj/kernel[1]*4",
                    "layers_0/self_attn/v_proj/kernel[1]*4", "layers_0/self_attn/o_proj/kernel[0]*12")  # fmt: skip
    assert contains("cnn", "conv4/kernel[3]", "fc/kernel[0]")
    assert contains("cnn_flatten", "conv4/kernel[3]", "fc/kernel[0]")  # through pooling and flattening
    assert contains("gate_up_split", "part/gate_up/kernel[1]@0:9", "part/gate_up/kernel[1]@9:18", "part/down/kernel[0]")
    assert contains("fused_qkv", "part/qkv/kernel[1]@0:12", "part/qkv/kernel[1]@12:24")
    assert contains("llama_scan", "layers/mlp/up_proj/kernel[2]", "layers/mlp/down_proj/kernel[1]")


def test_different_classes_stay_apart():
    assert not contains("cnn", "conv1/kernel[3]", "conv3/kernel[3]")
    assert not contains("transformer_rms", "mlp0/up/kernel[1]", "mlp1/up/kernel[1]")
    assert not contains("transformer_rms", "attn0/q/kernel[1]*4", "attn1/q/kernel[1]*4")
    assert not contains("transformer_general", "attn0/q/kernel[2]", "attn0/v/kernel[2]")
    assert not contains("encoder_decoder", "source/embedding[1]", "target/embedding[1]")
    assert not contains("moe_dense", "part/w_in[0]", "part/w_in[2]")


def test_state_is_in_the_class_of_its_channels():
    graph = traced("cnn")
    kinds = {s.name: s.kind for s in graph.symbols}
    assert kinds["batch_stats/bn1/mean[0]"] == "state" and kinds["bn1/scale[0]"] == "parameter"
    assert contains("cnn", "batch_stats/bn1/mean[0]", "bn1/scale[0]", "conv1/kernel[3]")


def test_same_sizes_do_not_make_one_class():
    """Every width 8: the classes are told apart by what is computed, not by their lengths."""
    model = models.CASES["dense_attention"].make(hidden=8, heads=8, depth=8, value=8)
    graph = jqopt.trace(model, jax.eval_shape(model.init, jax.random.key(0), models.TOKENS), models.TOKENS)
    free = [c for c in graph.classes if c.pinned is None]
    assert sorted(len(c.members) for c in free) == [3, 4, 7, 7] and all(c.size == 8 for c in free)


def test_a_square_kernel_of_a_recurrence_is_in_its_class_twice():
    cls = holder(traced("lstm"), models.spot("cell/hi/kernel[0]"))
    assert {"cell/hi/kernel[0]", "cell/hi/kernel[1]"} <= set(cls.symbols)


# ------------------------------------------------------------------------------------------- properties


GRAPHS = [
    *(pytest.param(lambda n=n: traced(n), id=n) for n in CASES),
    *(pytest.param(lambda c=c: traced_zoo(c), id=f"zoo.{c.__name__}") for c in (*zoo.PEERS_25, *zoo.MORE)),
]


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_axis_is_in_a_class_and_its_parts_make_it_up(graph):
    graph = graph()
    held: dict[str, list] = {}
    for c in graph.classes:
        assert c.size > 1 and c.members
        for m in c.members:
            held.setdefault(m.symbol, []).append((m.start, m.length, c.size))
            assert f"{m.path}[{m.axis}]" == m.symbol
    for s in graph.symbols:
        if s.size > 1:
            assert s.name in held
            assert total(held[s.name], 0, s.size) == s.size, graph.parts(s.name)
    assert len({c.name for c in graph.classes}) == len(graph.classes)


def total(parts: list[tuple[int, int, int]], start: int, length: int) -> int:
    """How many positions the parts of a segment describe: its factors' product, times the sum of its own segments.

    A segment of one position has no class, so that none stands for it.
    """
    here = math.prod(size for a, n, size in parts if (a, n) == (start, length))
    inside = sorted({(a, n) for a, n, _ in parts if (a, n) != (start, length)}, key=lambda s: (s[0], -s[1]))
    outer = [(a, n) for a, n in inside if not any(b <= a and a + n <= b + m and (a, n) != (b, m) for b, m in inside)]
    if not outer:
        return here
    gaps, at = 0, start
    for a, n in outer:
        assert a - at in (0, 1), "segments leave a gap"
        gaps, at = gaps + a - at, a + n
    gaps += 1 if here == 1 and start + length - at == 1 else 0
    return here * (gaps + sum(total([p for p in parts if a <= p[0] and p[0] + p[1] <= a + n], a, n) for a, n in outer))


@pytest.mark.parametrize("graph", GRAPHS)
def test_symbols_are_the_axes_of_the_leaves(graph):
    graph = graph()
    parameters = {(s.path, s.axis): s.size for s in graph.symbols if s.kind == "parameter"}
    assert parameters == {(p, i): n for p, a in graph.parameters.items() for i, n in enumerate(a.shape)}
    roles = {"incoming", "outgoing", "stacked", "indexed", "feature"}
    assert all(set(s.roles) <= roles for s in graph.symbols)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_class_is_found_by_its_name(graph):
    graph = graph()
    for c in graph.classes:
        assert graph.class_of(c.name) is c


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_pin_says_why(graph):
    for c in graph().classes:
        assert c.pinned is None or (c.pinned.reason and str(c.pinned).startswith(c.pinned.reason))
        assert not (c.permutable and c.pinned)


@pytest.mark.parametrize(
    ("symbol", "role"),
    [("embed/embedding[0]", "indexed"), ("mlp0/up/kernel[0]", "incoming"), ("mlp0/up/kernel[1]", "outgoing"),
     ("mlp0/up/bias[0]", "feature"), ("norm/scale[0]", "feature")],
)  # fmt: skip
def test_roles(symbol: str, role: str):
    assert next(s for s in traced("transformer_rms").symbols if s.name == symbol).roles == (role,)


def test_role_of_a_scanned_or_batched_axis_is_stacked():
    assert next(s for s in traced("llama_scan").symbols if s.name == "layers/mlp/up_proj/kernel[0]").roles == (
        "stacked",
    )
    tied = next(s for s in traced("lm_tied").symbols if s.name == "embed/embedding[0]").roles
    assert set(tied) == {"indexed", "outgoing"}


def test_axes_of_a_zoo_that_only_peers_trip_over():
    split = traced_zoo(zoo.Split)
    assert all(c.pinned is not None for c in split.classes)  # w's two halves both make the output
    by_hand = traced_zoo(zoo.StackedByHand)
    assert by_hand.class_of("w[0]").pinned is not None  # the program picks layers by number
    tied = traced_zoo(zoo.Tied)
    free = [c for c in tied.classes if c.pinned is None]
    assert [set(c.symbols) for c in free] == [
        {"Embed_0/embedding[1]", "Dense_0/kernel[0]", "Dense_0/kernel[1]", "Dense_0/bias[0]"}
    ] or [set(c.symbols) for c in free] == [
        {"Dense_0/kernel[0]", "Dense_0/kernel[1]", "Dense_0/bias[0]", "Embed_0/embedding[1]"}
    ]


def test_tracing_a_two_layer_llama_takes_little_time():
    config = LlamaConfig(64, 32, 48, 2, 4, 2, 8)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    model = LlamaForCausalLM(config)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    seconds = []
    for _ in range(3):
        graph = jqopt.trace(model, params, tokens)
        start = time.perf_counter()
        assert graph.classes
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # 0.02 s alone on a core; a loaded machine takes longer


# ------------------------------------------------------------------------------------------- names and messages


def test_parts_of_products_and_concatenations():
    assert traced("gqa_einsum").parts("part/q/kernel[1]") == "2 x 3 x 4"
    assert traced("cnn").parts("conv4/kernel[2]") == "[7 | 5]"
    assert traced("fused_qkv").parts("part/qkv/kernel[1]") == "[3 x 4 | 3 x 4 | 3 x 5]"
    assert traced("gated").parts("part/up/kernel[1]") == "9"
    assert traced("cnn_flatten").parts("fc/kernel[0]") == "2 x 2 x 6"


def test_an_axis_of_several_classes_has_no_class_of_its_own():
    with pytest.raises(jqopt.JqoptError, match=r"part/q/kernel\[1\].*2 x 3 x 4") as e:
        traced("gqa_einsum").class_of("part/q/kernel[1]")
    assert "write one of" in str(e.value)


def test_an_axis_that_does_not_exist_is_an_error_with_suggestions():
    with pytest.raises(jqopt.JqoptError, match=r"part/upp/kernel\[1\].*part/up/kernel\[1\]"):
        traced("gated").class_of("part/upp/kernel[1]")
    with pytest.raises(jqopt.JqoptError, match="part/up/kernel"):
        traced("gated").class_of("part/up/kernel[7]")


def test_names_of_factors_and_segments():
    graph = traced("gqa_einsum")
    (kv,) = [c for c in graph.classes if c.pinned is None and c.size == 2]
    first = kv.members[0].symbol
    assert kv.name == f"{first}.0" and graph.class_of(kv.name) is kv
    left = holder(traced("depthwise"), models.spot("bn/scale[0]@0:6"))
    assert re.fullmatch(re.escape(left.members[0].symbol) + ":0", left.name)


# ------------------------------------------------------------------------------------------- what can't be looked into


@pytest.mark.parametrize(("name", "primitive"), [(n, p) for n, (_, p) in models.OPAQUE.items()])
def test_unknown_primitives_are_reported_and_hold_only_what_they_touch(name: str, primitive: str):
    graph = traced(name)
    assert primitive in {u.primitive for u in graph.unknown}
    found = next(u for u in graph.unknown if u.primitive == primitive)
    assert primitive in found.reason and "dataflow_zoo.py" in found.where
    assert graph.class_of("before/kernel[1]").pinned is not None
    assert graph.class_of("mlp/up/kernel[1]").pinned is None
    assert graph.class_of("after/kernel[1]").pinned is None


@pytest.mark.parametrize("name", models.FOLLOWED)
def test_control_flow_and_custom_gradients_are_followed(name: str):
    graph = traced(name)
    assert graph.unknown == () and not graph.is_failed("")
    assert contains(name, "before/kernel[1]", "before/bias[0]", "after/kernel[0]")


def test_a_weight_that_an_opaque_call_reads_is_failed_with_its_reason():
    def model(params, x):
        shape = jax.ShapeDtypeStruct((2, 8), jnp.float32)
        y = jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), shape, params["a"]["w"], x)
        return y @ params["b"]["w"]

    params = {"a": {"w": jnp.ones((8, 8))}, "b": {"w": jnp.ones((8, 8))}}
    graph = jqopt.trace(model, params, jnp.ones((2, 8)))
    (unknown,) = graph.unknown
    assert unknown.params == ("a/w",) and unknown.primitive == "pure_callback"
    assert graph.is_failed("a/w") and graph.is_failed("a")
    assert "pure_callback" in str(graph.failure_msg("a/w")) and "test_classes.py" in str(graph.failure_msg("a/w"))
    assert not graph.is_failed("b/w") and graph.failure_msg("b") is None
    assert all(graph.class_of(f"a/w[{i}]").pinned is not None for i in (0, 1))


def test_a_module_with_an_opaque_call_is_failed():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return models.host_negate(nn.Dense(8, name="d")(x))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="good")(Inner(name="bad")(x))

    x = jnp.ones((2, 8))
    graph = jqopt.trace(Outer(), jax.eval_shape(Outer().init, jax.random.key(0), x), x)
    assert graph.is_failed("bad") and "pure_callback" in str(graph.failure_msg("bad"))
    assert not graph.is_failed("good") and graph.failure_msg("good") is None


def test_nothing_fails_in_an_ordinary_model():
    graph = traced("llama")
    assert graph.unknown == ()
    assert not graph.is_failed("layers_0") and graph.failure_msg("layers_0/mlp/up_proj/kernel") is None


def test_a_rule_makes_an_unknown_primitive_known():
    graph = traced("callback")
    taught = graph.with_rules({"pure_callback": lambda equation, operands: [operands[0]]})
    assert taught.unknown == () and graph.unknown != ()
    cls = taught.class_of("before/kernel[1]")
    assert cls.pinned is None and set(cls.symbols) == {"before/kernel[1]", "before/bias[0]", "after/kernel[0]"}
    assert graph.class_of("before/kernel[1]").pinned is not None  # the first graph is as it was


def test_a_rule_can_hold_what_was_free():
    def hold(equation, operands):
        whole = max(operands, key=len)
        for axis in whole:
            jqopt.axis_rules.pin(axis, "held by the test", equation)
        return [whole]

    graph = traced("custom_vjp").with_rules({"min": hold})
    cls = graph.class_of("before/kernel[1]")
    assert "held by the test" in str(cls.pinned)


@pytest.mark.parametrize("name", ["solve", "sort", "cholesky", "fft"])
def test_what_mixes_or_orders_positions_holds_them(name: str):
    graph = traced(name)
    for symbol in ("before/kernel[1]", "before/bias[0]", "after/kernel[0]"):
        assert graph.class_of(symbol).pinned is not None


# ------------------------------------------------------------------------------------------- small programs


def classes_of(function, x, **shapes: tuple[int, ...]):
    """{frozenset of symbols: class} of the classes that may change."""
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    graph = jqopt.trace(function, params, x)
    return {frozenset(c.symbols): c for c in graph.classes if c.pinned is None}


X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def symbols(text: str) -> frozenset[str]:
    return frozenset(text.split())


@pytest.mark.parametrize(
    ("middle", "free"),
    [
        (lambda h: h, True),
        (lambda h: h[:, ::-1], False),  # reversed: position i would have to be n - 1 - i
        (lambda h: jnp.cumsum(h, axis=1), False),
        (lambda h: jnp.roll(h, 1, axis=1), False),
        (lambda h: h * jnp.arange(10, dtype=jnp.float32), False),
        (lambda h: h * np.arange(10, dtype=np.float32), False),
        (lambda h: h * 3.0, True),
        (lambda h: jnp.where(h > 0, h, jnp.zeros_like(h)), True),
        (lambda h: h.T.T, True),
        (lambda h: jnp.pad(h, ((1, 1), (0, 0))), True),
        (lambda h: h.at[:, 0].set(0.0), False),
        (lambda h: h.at[0].set(0.0), True),
        (lambda h: h / jnp.linalg.norm(h, axis=1, keepdims=True), True),
        (lambda h: h / h.sum(axis=0), True),
        (lambda h: jax.nn.softmax(h, axis=1), True),
        (lambda h: h * jnp.argmax(h, axis=1, keepdims=True).astype(h.dtype), False),
        (lambda h: h - h[:, :1], False),  # position 0 is told apart
        (lambda h: h + h[:, :5].sum(), False),  # so are the first five
        (lambda h: h @ jnp.eye(10), False),
        (lambda h: jax.lax.associative_scan(jnp.add, h, axis=1), False),
        (lambda h: jnp.take(h, jnp.array([1, 0, *range(2, 10)]), axis=1), False),
        (lambda h: jax.vmap(jnp.tanh)(h), True),
        (lambda h: jax.lax.map(jnp.tanh, h), True),
        (lambda h: jax.checkpoint(jnp.sin)(h), True),
        (lambda h: jnp.sort(h, axis=0), True),
        (lambda h: jnp.einsum("bi,bj->ij", h, h)[jnp.arange(4)], False),
        (lambda h: h.astype(jnp.bfloat16).astype(jnp.float32), True),
        (lambda h: jnp.stack([h, h], axis=1).sum(1), True),
        (lambda h: jnp.concatenate([h, h], axis=0)[:4], True),
    ],
)  # fmt: skip
def test_what_lies_between_two_products(middle, free: bool):
    """b(middle(x a)): is the axis that a makes and b reads free?"""

    def program(params, x):
        return middle(x @ params["a"]) @ params["b"]

    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in {"a": (6, 10), "b": (10, 3)}.items()}
    graph = jqopt.trace(program, params, X)
    inner = [c for c in graph.classes if "a[1]" in c.symbols]
    if free:
        assert [set(c.symbols) for c in inner] == [{"a[1]", "b[0]"}] and inner[0].pinned is None
    else:
        assert not any(c.permutable and c.size == 10 for c in inner)


def test_two_readers_of_one_activation_share_its_class():
    def program(p, x):
        h = x @ p["a"]
        return h @ p["b"] + h @ p["c"]

    assert set(classes_of(program, X, a=(6, 10), b=(10, 3), c=(10, 3))) == {symbols("a[1] b[0] c[0]")}


def test_concatenated_twice_is_three_segments():
    def program(p, x):
        h, g = x @ p["a"], x @ p["b"]
        return jnp.concatenate([jnp.concatenate([h, g], 1), h], 1) @ p["c"]

    found = classes_of(program, X, a=(6, 10), b=(6, 4), c=(24, 3))
    assert set(found) == {symbols("a[1] c[0]"), symbols("b[1] c[0]")}
    starts = {(m.start, m.length) for m in found[symbols("a[1] c[0]")].members if m.symbol == "c[0]"}
    assert starts == {(0, 10), (14, 10)}


def test_a_reader_of_half_an_activation_cuts_its_axis():
    def program(p, x):
        h = x @ p["a"]
        return h @ p["b"] + h[:, :4] @ p["c"]

    found = classes_of(program, X, a=(6, 10), b=(10, 3), c=(4, 3))
    assert set(found) == {symbols("a[1] b[0] c[0]"), symbols("a[1] b[0]")}
    assert found[symbols("a[1] b[0] c[0]")].size == 4 and found[symbols("a[1] b[0]")].size == 6


def test_structure_learnt_later_reaches_what_came_before():
    """The first use knows nothing of heads; the second reshapes to them."""

    def program(p, x):
        h = x @ p["a"]
        y = jnp.tanh(h) @ p["b"]
        return y + jnp.einsum("bhd,hde->be", h.reshape(4, 2, 5), p["c"])

    found = classes_of(program, X, a=(6, 10), b=(10, 3), c=(2, 5, 3))
    assert set(found) == {symbols("a[1] b[0] c[0]"), symbols("a[1] b[0] c[1]")}


def test_crossing_structures_are_held():
    """One reader takes 2 x 5, another 5 x 2: only what respects both may change, and nothing does."""

    def program(p, x):
        h = x @ p["a"]
        one = jnp.einsum("bhd,hde->be", h.reshape(4, 2, 5), p["b"])
        return one + jnp.einsum("bhd,hde->be", h.reshape(4, 5, 2), p["c"])

    assert set(classes_of(program, X, a=(6, 10), b=(2, 5, 3), c=(5, 2, 3))) == set()


def test_an_axis_shifted_against_itself_is_held():
    def program(p, x):
        h = x @ p["a"]
        return (h[:, :-1] * h[:, 1:]) @ p["b"]

    assert set(classes_of(program, X, a=(6, 10), b=(9, 3))) == set()


def test_a_transposed_product_ties_rows_to_columns():
    """w and its transpose in a row: the axis between them is one, the outer ones are input and output."""

    def program(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    assert set(classes_of(program, X, w=(6, 10))) == {symbols("w[1]")}


def test_vmapped_members_share_the_classes_within():
    def program(p, x):
        return jax.vmap(lambda a, b: jnp.tanh(x @ a) @ b)(p["a"], p["b"]).sum(0)

    found = classes_of(program, X, a=(5, 6, 10), b=(5, 10, 3))
    assert set(found) == {symbols("a[0] b[0]"), symbols("a[2] b[1]")}
    assert found[symbols("a[0] b[0]")].permutable  # a sum over members does not know their order


def test_a_map_over_layers_may_be_permuted_but_a_loop_may_not():
    def mapped(p, x):
        return jax.lax.map(lambda w: jnp.tanh(x @ w), p["w"]).sum(0)

    def carried(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    (one,) = classes_of(mapped, X, w=(5, 6, 6)).values()
    (other,) = classes_of(carried, X, w=(5, 6, 6)).values()
    assert one.symbols == other.symbols == ("w[0]",)
    assert one.permutable and not other.permutable


@pytest.mark.parametrize("tiled", [False, True])
def test_exchanges_between_devices_hold_the_axis_they_cut(tiled: bool):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def program(p, x):
        def body(a, b):
            h = x @ a  # [4, 10], of which each device has 5
            g = h if tiled else h.reshape(2, 2, 5)
            g = jax.lax.all_to_all(g, "d", 0, 0, tiled=tiled).reshape(4, 5)
            return jax.lax.psum(g @ b, "d")

        run = jax.shard_map(body, mesh=mesh, in_specs=(spec(None, "d"), spec("d")), out_specs=spec())
        return run(p["a"], p["b"])

    found = classes_of(program, X, a=(6, 10), b=(10, 3))
    assert set(found) <= {symbols("a[1] b[0]")} and all(c.size == 5 for c in found.values())


def test_all_to_all_along_the_feature_axis_holds_it():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def program(p, x):
        def body(a, b):
            h = jax.lax.all_to_all(x @ a, "d", 1, 1, tiled=True)  # halves of the 4 local features change devices
            return jax.lax.psum(h @ b, "d")

        run = jax.shard_map(body, mesh=mesh, in_specs=(spec(None, "d"), spec("d")), out_specs=spec())
        return run(p["a"], p["b"])

    assert set(classes_of(program, X, a=(6, 8), b=(8, 3))) == set()


# ---------------------------------------------------------------------------------- what has gone wrong before


def test_a_scan_in_a_scan_that_stacks_a_value_of_the_outer_one():
    def model(p, x):
        def outer(c, w):
            c = jnp.tanh(c @ w)
            _, stacked = jax.lax.scan(lambda d, q: (d, c * q), 0.0, p["inner"])
            return c + jnp.sum(stacked * p["v"][:, None, None], 0), None

        return jax.lax.scan(outer, x, p["outer"])[0]

    graph = jqopt.trace(model, {"outer": jnp.ones((3, 8, 8)), "inner": jnp.ones(5), "v": jnp.ones(5)}, jnp.ones((2, 8)))
    assert graph.class_of("inner[0]").symbols == ("inner[0]", "v[0]")
    assert graph.class_of("outer[0]").symbols == ("outer[0]",) and graph.class_of("outer[0]").pinned is None


def test_positions_that_random_bits_are_drawn_for_keep_their_order():
    def model(p, x):
        h = x @ p["a"]
        return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0.0) @ p["b"]

    found = jqopt.trace(model, {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 3))}, jnp.ones((2, 4))).class_of("b[0]")
    assert found.pinned is None and not found.permutable and "draws along it" in found.notes[0]


def test_the_axis_of_index_vectors_is_pinned():
    def model(p, x):
        return jnp.sum(x[p["at"][:, 0], p["at"][:, 1]]) + jnp.sum(
            jax.lax.gather(
                x,
                p["index"],
                jax.lax.GatherDimensionNumbers((), (0, 1), (0, 1)),
                (1, 1),
            )
        )

    params = {"at": jnp.zeros((5, 2), jnp.int32), "index": jnp.zeros((5, 2), jnp.int32)}
    graph = jqopt.trace(model, params, jnp.ones((4, 4)))
    assert graph.class_of("index[1]").pinned is not None
    assert "name different axes" in graph.class_of("index[1]").pinned.reason
