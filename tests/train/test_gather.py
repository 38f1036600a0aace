"""Weights cut over eight devices and gathered as packed codes: what travels, where it lies, whose numbers it gives."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jqopt
from jqopt import train
from tests.arrays import normal

KEY = jax.random.key(7)


def recipe(name: str) -> dict:
    section = jqopt.load_recipe(f"train/{name}").train.to_dict()
    return {"name": "all", "rules": [{"match": "*", "weight": "nvfp4"}], "train": section}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def two(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def step(prepared):
    """(gradients, the codes that the forward pass keeps) of a loss."""

    def run(p, x):
        y, back = jax.vjp(lambda p, x: prepared.apply(p, x, quant_key=KEY), p, x)
        kept = [leaf for leaf in jax.tree.leaves(back) if leaf.dtype == jnp.uint8]
        return back(jnp.cos(y)), kept

    return run


def across(run, mesh, p, x, spec, rows="fsdp"):
    """run, compiled for parameters that lie so and a batch cut over `rows`; what it gives; both kinds of arguments."""
    lie, cut = NamedSharding(mesh, spec), NamedSharding(mesh, P(rows))
    placed = jax.device_put(p, lie), jax.device_put(x, cut)
    places = (jax.tree.map(lambda _: lie, p), cut)
    compiled = jax.jit(run, in_shardings=places, out_shardings=(places, None)).lower(*placed).compile()
    return compiled, compiled(*placed)


def gathers(compiled) -> list[tuple[str, int]]:
    """(dtype, number of values) of what each all-gather of a compiled program makes."""
    found = re.findall(r"= \(?(?:.*\) )?(\w+)\[([\d,]*)\]\S* all-gather(?:-start)?\(", compiled.as_text())
    return sorted((dtype, math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims in found)


def lying(tree, mesh, spec):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree)


# ---- what travels

PARAMS = {"a": (512, 768), "b": (768, 512)}
SIZE, TOKENS = 512 * 768, (256, 512)  # 32 tokens a device, a block of each format; fewer values than a weight has
SCALES = {"nvfp4": (SIZE // 2, SIZE // 256), "mxfp8": (SIZE, SIZE // 32), "fp8_current": (SIZE,)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spec"), [("nvfp4", P("fsdp")), ("nvfp4", P(None, "fsdp")), ("mxfp8", P("fsdp")),
                                            ("fp8_current", P("fsdp"))], ids=str)  # fmt: skip
def test_only_codes_travel(name, spec, mesh):
    """Of each weight its codes, once forward and once backward; of NVFP4 an eighth of the float's bytes and 1/1024."""
    p, x = {n: normal(i, s) / 16 for i, (n, s) in enumerate(PARAMS.items())}, normal(2, TOKENS)
    prepared = train.prepare(two, recipe(name), lying(p, mesh, spec), x, gather="fsdp")
    assert [s.reason for s in prepared.plan.trained] == ["codes gathered over fsdp"] * 2
    compiled, (got, kept) = across(step(prepared), mesh, p, x, spec)
    travels = gathers(compiled)
    assert [n for dtype, n in travels if dtype == "u8"] == sorted(4 * SCALES[name])  # two weights, two passes
    assert not [t for t in travels if t[0] != "u8" and t[1] >= SIZE]
    want, codes = jax.jit(step(train.prepare(two, recipe(name), p, x)))(p, x)
    jax.tree.map(np.testing.assert_array_equal, kept, codes)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):  # wgrad sums tokens in another order
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_without_the_option_floats_travel(mesh):
    """The other tests' control: XLA gathers the weights, decoded or not, in float32."""
    p, x = {n: normal(i, s) / 16 for i, (n, s) in enumerate(PARAMS.items())}, normal(2, TOKENS)
    prepared = train.prepare(two, recipe("fp8_current"), lying(p, mesh, P("fsdp")), x)
    compiled, _ = across(step(prepared), mesh, p, x, P("fsdp"))
    assert ("f32", SIZE) in gathers(compiled)


def test_codes_lie_cut_and_are_those_of_one_device(mesh):
    """Kept for the backward pass are a device's own codes, not the gathered ones."""
    p, x = {"w": normal(0, (128, 32)) * jnp.exp2(jnp.arange(128.0) / 32)[:, None]}, normal(1, (16, 128))
    model = lambda p, x: x @ p["w"]  # noqa: E731

    def run(prepared):
        def forward(p, x):
            y, back = jax.vjp(lambda p, x: prepared.apply(p, x, quant_key=KEY), p, x)
            return y, [leaf for leaf in jax.tree.leaves(back) if leaf.dtype == jnp.uint8]

        return forward

    lie = NamedSharding(mesh, P("fsdp"))
    sharded = jax.device_put(p, lie)
    y, kept = jax.jit(run(train.prepare(model, recipe("nvfp4_no_rht"), sharded, x, gather="fsdp")))(sharded, x)
    want, codes = jax.jit(run(train.prepare(model, recipe("nvfp4_no_rht"), p, x)))(p, x)
    np.testing.assert_array_equal(y, want)
    jax.tree.map(np.testing.assert_array_equal, kept, codes)
    mine = {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in kept}
    assert mine[32, 64] == (32, 8) and mine[2, 8] == (2, 1)


@pytest.mark.slow
def test_layers_in_a_scan(mesh):
    """Under scan and remat with the policy: each layer's codes are gathered in the loop, twice; nothing else is."""
    p, x = {"w": normal(0, (3, 256, 256)) / 16}, normal(1, (128, 256))

    def model(p, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None), policy=train.remat_policy, prevent_cse=False)
        return lax.scan(body, x, p["w"])[0]

    spec = P(None, "fsdp")
    prepared = train.prepare(model, recipe("nvfp4"), lying(p, mesh, spec), x, gather="fsdp")
    compiled, (got, _) = across(step(prepared), mesh, p, x, spec)
    weights = [t for t in gathers(compiled) if t[0] == "u8"]
    assert weights == sorted([("u8", 256 * 128), ("u8", 256)] * 2)
    assert not [t for t in gathers(compiled) if t[0] != "u8" and t[1] >= 256 * 256]
    text = compiled.as_text()
    assert "u8[3,256,16]" in text and "u8[3,256,128]" not in text  # what the loop keeps: a device's own codes
    want, _ = jax.jit(step(train.prepare(model, recipe("nvfp4"), p, x)))(p, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_an_axis_of_tensor_parallelism_stays():
    """Cut over two axes, gathered over one: half of the codes of each weight reach a device."""
    both = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    p, x = {n: normal(i, s) / 16 for i, (n, s) in enumerate(PARAMS.items())}, normal(2, TOKENS)
    shapes = {"a": lying(p["a"], both, P("fsdp", "tp")), "b": lying(p["b"], both, P("tp", "fsdp"))}
    prepared = train.prepare(two, recipe("nvfp4"), shapes, x, gather=("fsdp",))
    lie = jax.tree.map(lambda s: s.sharding, shapes)
    rows = NamedSharding(both, P("fsdp"))
    compiled = jax.jit(step(prepared), in_shardings=(lie, rows), out_shardings=((lie, rows), None)).lower(
        jax.device_put(p, lie), jax.device_put(x, rows)
    ).compile()  # fmt: skip
    sizes = [n for dtype, n in gathers(compiled) if dtype == "u8"]
    assert sizes == sorted([SIZE // 4, SIZE // 512] * 4)
    got, kept = compiled(jax.device_put(p, lie), jax.device_put(x, rows))
    want, codes = jax.jit(step(train.prepare(two, recipe("nvfp4"), p, x)))(p, x)
    for shape in ((768, 256), (512, 384)):  # of the weights: those of b's input come from a sum in two parts
        one, other = ([leaf for leaf in leaves if leaf.shape == shape] for leaves in (kept, codes))
        np.testing.assert_array_equal(one, other)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 4e-3


# ---- the plan


def note(model, shapes, x, name="nvfp4"):
    """(spec of the matrix, gathered spec, note) of the only site."""
    (site,) = _plan(model, shapes, x, name)
    gather = site.gemms.gather
    return (gather and tuple(gather.cut.spec), gather and tuple(gather.whole.spec), site.reason)


def _plan(model, shapes, x, name="nvfp4"):
    """The sites; beside them a weight that is gathered as codes, without which there would be an error."""
    beside = jax.ShapeDtypeStruct((256, 16), jnp.float32, sharding=NamedSharding(BOTH, P("fsdp")))

    def more(p, x):
        return model(p["mine"], x), jnp.broadcast_to(jnp.sum(x), (16, 256)) @ p["beside"]

    prepared = train.prepare(more, recipe(name), {"mine": shapes, "beside": beside}, x, gather="fsdp")
    return [s for s in prepared.plan.trained if s.path != "beside"]


BOTH = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def shape(spec, *sizes):
    return {"w": jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(BOTH, spec))}


def image(groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


X, ROOM = jnp.zeros((16, 64)), jnp.zeros((2, 4, 4, 64))
OK, APART = "codes gathered over fsdp", "isn't in parts that follow each other"
NOTES = {
    "k": (lambda p, x: x @ p["w"], shape(P("fsdp"), 64, 32), X, (None, "fsdp"), (None, None), OK),
    "n": (lambda p, x: x @ p["w"], shape(P("tp", "fsdp"), 64, 128), X, ("fsdp", "tp"), (None, "tp"), OK),
    "both": (lambda p, x: x @ p["w"], shape(P(("tp", "fsdp")), 128, 32), jnp.zeros((4, 128)),
             (None, ("tp", "fsdp")), (None, "tp"), OK),
    "not cut": (lambda p, x: x @ p["w"], shape(P("tp"), 64, 32), X, None, None, ""),
    "heads": (lambda p, x: jnp.einsum("mhd,hdn->mn", x.reshape(16, 4, 16), p["w"]), shape(P("fsdp"), 4, 16, 32), X,
              (None, "fsdp"), (None, None), OK),
    "inner": (lambda p, x: jnp.einsum("mhd,hdn->mn", x.reshape(16, 4, 16), p["w"]), shape(P(None, "fsdp"), 4, 16, 32),
              X, None, None, APART),
    "experts": (lambda p, x: jnp.einsum("emk,ekn->emn", x.reshape(4, 4, 64), p["w"]), shape(P("fsdp"), 4, 64, 32), X,
                ("fsdp", None, None), (None, None, None), OK),
    "layers": (lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0], shape(P("fsdp"), 4, 64, 64), X,
               None, None, "which holds layers"),
    "in layers": (lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0], shape(P(None, "fsdp"), 3, 64, 64), X,
                  (None, "fsdp"), (None, None), OK),
    "tiles": (lambda p, x: x @ p["w"], shape(P(None, "fsdp"), 64, 32), X, None, None,
              "8x64 isn't in whole tiles of 16x16"),
    "kernel": (image(), shape(P(None, None, None, "fsdp"), 3, 3, 64, 64), ROOM, ("fsdp", None), (None, None), OK),
    "channels": (image(), shape(P(None, None, "fsdp"), 3, 3, 64, 64), ROOM, None, None, APART),
    "one tap": (image(), shape(P(None, None, "fsdp"), 1, 1, 64, 64), ROOM, (None, "fsdp"), (None, None), OK),
    "groups": (image(2), shape(P(None, None, None, "fsdp"), 3, 3, 32, 64), ROOM, None, None, "has feature groups"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTES)
def test_how_a_weight_is_gathered_stands_in_the_plan(name):
    model, shapes, x, cut, whole, words = NOTES[name]
    got = note(model, shapes, x)
    assert got[:2] == (cut, whole)
    assert got[2] == words if words in ("", OK) else words in got[2] and "over fsdp as floats: " in got[2]


def test_more_reasons(mesh):
    """In a shard_map; several weights in one product; without a format; with a float copy for dgrad."""
    lie = NamedSharding(mesh, P("fsdp"))
    w = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=lie)
    x = jnp.zeros((16, 128))

    def reasons(model, params, name_or_section="nvfp4"):
        mine = recipe("nvfp4")
        if isinstance(name_or_section, dict):
            mine["train"] = name_or_section
        plan = train.prepare(model, mine, params, x, gather="fsdp").plan
        return [s.reason for s in plan.trained]

    inside = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("fsdp")), out_specs=P("fsdp"))
    got = reasons(lambda p, x: inside(p["b"], x @ p["a"]), {"a": w, "b": w})
    assert got == [OK, "gathered over fsdp as floats: it enters a shard_map whole"]
    got = reasons(lambda p, x: (x @ p["a"]) @ jnp.concatenate([p["b"], p["c"]], 1), {"a": w, "b": w, "c": w})
    assert got == [OK, *["gathered over fsdp as floats: one product of several weights"] * 2]
    got = reasons(lambda p, x: x @ p["a"], {"a": w}, {"weight": {"format": "fp8", "columnwise": "keep"}})
    assert got == [OK + ", of floats in dgrad"]
    with pytest.raises(jqopt.PlanError, match="no weight that is trained .* as codes(.|\n)*isn't quantized in fprop"):
        reasons(lambda p, x: x @ p["a"], {"a": w}, {"input": "mxfp8"})


def test_what_is_asked_wrongly(mesh):
    x, p = jnp.zeros((16, 128)), {"w": jnp.zeros((128, 128))}
    model = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(jqopt.PlanError, match="no parameter says how it lies on a mesh"):
        train.prepare(model, recipe("nvfp4"), p, x, gather="fsdp")
    with pytest.raises(jqopt.PlanError, match=r"axes \('fsdp',\), which has no 'data'"):
        train.prepare(model, recipe("nvfp4"), lying(p, mesh, P("fsdp")), x, gather=["fsdp", "data"])
    with pytest.raises(jqopt.PlanError, match="no weight that is trained in low precision would be gathered as codes"):
        train.prepare(model, recipe("nvfp4"), lying(p, mesh, P()), x, gather="fsdp")
    explicit = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(jqopt.PlanError, match="Explicit axes"):
        train.prepare(lambda p, x: x @ jax.sharding.reshard(p["w"], NamedSharding(explicit, P())), recipe("nvfp4"),
                      lying(p, explicit, P("fsdp")), x, gather="fsdp")  # fmt: skip


def test_flax_modules(mesh):
    """The shardings of a Linen module's variables, boxed too, and of an NNX module's arrays are found."""
    lie, x = NamedSharding(mesh, P("fsdp")), jnp.zeros((16, 128))
    kernel = jax.ShapeDtypeStruct((128, 16), jnp.float32, sharding=lie)
    boxed = nn.Partitioned(kernel, names=("fsdp", None))  # pyright: ignore[reportArgumentType]
    dense = nn.Dense(16, use_bias=False)
    for leaf in (kernel, boxed):
        plan = train.prepare(dense, recipe("nvfp4"), {"params": {"kernel": leaf}}, x, gather="fsdp").plan
        assert plan["kernel"].reason == OK
    module = nnx.Linear(128, 16, rngs=nnx.Rngs(0))
    module.kernel[...] = jax.device_put(module.kernel[...], lie)
    assert train.prepare(module, recipe("nvfp4"), x, gather="fsdp").plan["kernel"].reason == OK
