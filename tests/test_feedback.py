"""Feedback: activations rounded channel after channel, against GPTQ's equations in NumPy; in plans, files, programs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend import core as extend

import jqopt
from jqopt import _feedback, _numerics, _plan, formats
from jqopt._apply import is_qtensor
from jqopt._ops import InputFormat, quantize_input
from jqopt.errors import PlanError, RecipeError
from jqopt.hf import load_model
from tests import arrays
from tests.test_layerwise import Block, Net, stacked

REFERENCE = pathlib.Path(__file__).parent / "golden/tinylm_reference"
CASES = [  # format, granularity, channels, block: blocks that divide neither the channels nor the format's blocks, too
    ("nvfp4", "block", 128, 64),
    ("nvfp4", "block", 80, 48),
    ("nvfp4_swept", "block", 64, 24),
    ("nvfp4", "block", 48, 128),
    ("mxfp4", "block", 96, 32),
    ("mxfp8", "block", 96, 7),
    ("int8", "token", 100, 16),
    ("int4", "token", 33, 2),
    ("fp8", "tensor", 64, 64),
]


def alike(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Weights [n, k] of which neighbouring columns are alike, as those of trained layers are."""
    w = np.array(arrays.normal(seed, (n, k)))
    return (w + 0.8 * np.roll(w, 1, axis=1)).astype(np.float32)


def solved(w: np.ndarray, block: int) -> np.ndarray:
    """The factors by the equation itself: float64, with an inverse; zero for channels that fill up the last block."""
    n, k = w.shape
    out = np.zeros((-(-k // block), block, block))
    for b in range(len(out)):
        part = np.zeros((n, block))
        part[:, : len(w[0, b * block : (b + 1) * block])] = w[:, b * block : (b + 1) * block]
        g = part.T @ part
        g += np.eye(block) * (0.01 * np.trace(g) / block or 1)
        u = np.linalg.cholesky(np.linalg.inv(g)).T
        out[b] = np.triu(-u / np.diag(u)[:, None], 1)
    return out


def swept(x: np.ndarray, scale: np.ndarray, factors: np.ndarray, format: formats.Format) -> np.ndarray:
    """Channel after channel in float64; `scale` is what each value's code is multiplied with."""
    out, (_, k), block = np.zeros(x.shape), x.shape, factors.shape[-1]
    for b, c in enumerate(factors):
        now = x[:, b * block : (b + 1) * block].astype(np.float64)
        for i in range(now.shape[1]):
            s = scale[:, b * block + i]
            q = s * np.asarray(_numerics.round_to(jnp.asarray(now[:, i] / s, jnp.float32), format.element), np.float64)
            out[:, b * block + i] = q
            now[:, i + 1 :] += np.outer(now[:, i] - q, c[i, i + 1 : now.shape[1]])
    assert block * len(factors) >= k
    return out


def scales_of(x: jax.Array, spec: InputFormat) -> np.ndarray:
    granularity = "channel" if spec.granularity == "token" else spec.granularity
    codes = _numerics.quantize_matrix(x, spec.format, granularity=granularity, packed=False)
    return np.asarray(_numerics.element_scales(codes, spec.format, *x.shape[-2:])[0], np.float64)


# --------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("block", [2, 16, 33, 64, 100])
def test_factors_are_those_of_gptqs_equation(block):
    w = alike(96, 66)
    got = np.asarray(_feedback.factors([jnp.asarray(w)], block), np.float64)
    np.testing.assert_allclose(got, solved(w, block), rtol=2**-8, atol=1e-4)  # bfloat16


def test_factors_of_weights_that_read_one_activation_are_of_all_their_rows():
    q, k = alike(40, 32, 1), alike(24, 32, 2)
    whole = _feedback.factors([jnp.asarray(np.concatenate([q, k]))], 16)
    np.testing.assert_allclose(
        np.asarray(_feedback.factors([jnp.asarray(q), jnp.asarray(k)], 16), np.float32), np.asarray(whole, np.float32),
        rtol=2**-7, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "granularity", "k", "block"), CASES)
def test_it_rounds_as_the_sweep_in_numpy_and_products_come_nearer(name, granularity, k, block):
    spec = InputFormat(formats.get(name), granularity, False, block)
    if granularity != "block" and spec.format.block is not None:
        spec = spec._replace(format=spec.format.with_block(None))
    x, w = arrays.normal(3, (64, k)), alike(48, k)
    factors = _feedback.factors([jnp.asarray(w)], block)
    got = np.asarray(quantize_input(x, spec, None, factors))
    wanted = swept(np.asarray(x), scales_of(x, spec), np.asarray(factors, np.float64), spec.format)
    # values near a tie may go the other way in float32, and what comes after them with them
    rows = np.all(np.isclose(got, wanted, rtol=1e-6, atol=1e-12), axis=1)
    assert rows.mean() > 0.9, f"{name}: rows {np.flatnonzero(~rows)} differ"
    off = lambda q: np.square(np.asarray(x - q, np.float64) @ w.T.astype(np.float64)).sum()  # noqa: E731
    assert off(got) < 0.95 * off(quantize_input(x, spec._replace(feedback=0), None))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_swept", "mxfp4"])
def test_values_have_codes_under_the_scales_of_nearest_rounding(name):
    spec = InputFormat(formats.get(name), "block", False, 32)
    x, w = arrays.normal(5, (16, 64)), jnp.asarray(alike(24, 64))
    scaled = np.asarray(quantize_input(x, spec, None, _feedback.factors([w], 32)), np.float64) / scales_of(x, spec)
    levels = np.asarray(_numerics.decode(jnp.arange(16, dtype=jnp.uint8), spec.format.element))
    assert np.abs(scaled[..., None] - levels).min(-1).max() < 1e-6


def test_weights_of_orthogonal_columns_leave_nearest_rounding():
    w = np.linalg.qr(np.array(arrays.normal(6, (64, 64))))[0].astype(np.float32)
    spec = InputFormat(formats.get("nvfp4"), "block", False, 32)
    x = arrays.normal(7, (8, 64))
    fed = quantize_input(x, spec, None, _feedback.factors([jnp.asarray(np.eye(64, dtype=np.float32))], 32))
    np.testing.assert_array_equal(fed, quantize_input(x, spec, None))
    # rounding of the orthogonal matrix itself leaves factors near zero
    assert np.abs(np.asarray(_feedback.factors([jnp.asarray(w)], 32), np.float32)).max() < 1e-5


@pytest.mark.parametrize(
    "w",
    [np.zeros((8, 32)), np.ones((8, 32)), np.eye(32)[:3], 1e-30 * alike(8, 32), 1e15 * alike(8, 32), alike(1, 32)],
    ids=["zeros", "one direction", "mostly dead", "tiny", "huge", "one row"],
)
def test_hostile_weights_give_finite_values(w):
    w = jnp.asarray(w, jnp.float32)
    factors = _feedback.factors([w], 16)
    assert bool(jnp.isfinite(factors.astype(jnp.float32)).all())
    x = arrays.normal(8, (8, 32))
    spec = InputFormat(formats.get("nvfp4"), "block", False, 16)
    fed, near = quantize_input(x, spec, None, factors), quantize_input(x, spec, None)
    assert bool(jnp.isfinite(fed).all())
    unit = np.float64(max(1e-30, float(jnp.max(jnp.abs(w)))))
    off = lambda q: np.square(np.asarray(x - q, np.float64) @ (np.asarray(w, np.float64) / unit).T).sum()  # noqa: E731
    assert off(fed) <= off(near)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_swept", "mxfp4"])
@pytest.mark.parametrize("seed", range(4))
def test_channels_that_are_much_larger_than_their_neighbours(name, seed):
    """A large block's errors are beyond the range of the small blocks after it, which then saturate."""
    x = arrays.normal(seed, (64, 64)).at[:, 3].multiply(300.0).at[:, 40].multiply(50.0)
    w = jnp.asarray(alike(96, 64, seed))
    spec = InputFormat(formats.get(name), "block", False, 64)
    off = lambda q: float(jnp.sum(jnp.square((x - q) @ w.T)))  # noqa: E731
    fed = quantize_input(x, spec, None, _feedback.factors([w], 64))
    assert off(fed) < off(quantize_input(x, spec, None))


def test_nan_and_inf_stay_in_their_rows():
    x = arrays.normal(9, (6, 32)).at[1, 3].set(jnp.nan).at[4, 0].set(jnp.inf)
    w = jnp.asarray(alike(8, 32))
    spec = InputFormat(formats.get("int8"), "token", False, 16)
    fed = quantize_input(x, spec, None, _feedback.factors([w], 16))
    assert bool(jnp.isnan(fed[1, 3]))
    clean = [0, 2, 3, 5]
    np.testing.assert_array_equal(
        fed[jnp.array(clean)], quantize_input(x[jnp.array(clean)], spec, None, _feedback.factors([w], 16))
    )
    assert bool(jnp.isfinite(fed[jnp.array(clean)]).all())


def test_stacks_are_rounded_each_with_its_own_factors():
    x, w = arrays.normal(10, (3, 5, 32)), jnp.stack([jnp.asarray(alike(20, 32, s)) for s in range(3)])
    spec = InputFormat(formats.get("nvfp4"), "block", False, 16)
    whole = quantize_input(x, spec, None, _feedback.factors([w], 16))
    for i in range(3):
        np.testing.assert_array_equal(whole[i], quantize_input(x[i], spec, None, _feedback.factors([w[i]], 16)))


def test_the_gradient_goes_straight_through():
    x, w = arrays.normal(11, (4, 32)), jnp.asarray(alike(8, 32))
    spec = InputFormat(formats.get("nvfp4"), "block", False, 16)
    factors = _feedback.factors([w], 16)
    dx = jax.grad(lambda x: jnp.sum(quantize_input(x, spec, None, factors) * 3.0))(x)
    np.testing.assert_array_equal(dx, jnp.full_like(x, 3))


# ----------------------------------------------------------------------------------------------------- models


X = arrays.normal(20, (64, 32))


def recipe(input: dict | str, algorithm="max", layerwise=False, weight="nvfp4") -> dict:
    rule = {"match": "*", "weight": weight, "input": input}
    return {"rules": [rule], "algorithm": algorithm, "layerwise": layerwise}


FED = {"format": "nvfp4", "scaling": "dynamic", "feedback": 16}
NEAREST = {"format": "nvfp4", "scaling": "dynamic"}


def variables() -> dict:
    return Net().init(jax.random.key(1), X)


def quantized(input: dict | str = FED, net: Net = Net(), **options) -> jqopt.QuantizedModel:  # noqa: B008
    params = stacked(variables(), 2) if net.scanned else variables()
    return jqopt.quantize_model(net, recipe(input, **options), params=params, batches=[X[:32], X[32:]])


def block_by_hand(qm: jqopt.QuantizedModel, x: jax.Array) -> jax.Array:
    """The first block, written out."""
    found = {n: qm.params["params"]["layers_0"][n]["kernel"] for n in ("gate", "up", "down")}
    spec = InputFormat(formats.get("nvfp4"), "block", False, 16)
    h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    together = _feedback.factors([found["gate"].matrix(), found["up"].matrix()], 16)
    seen = quantize_input(h, spec, None, together)
    inner = nn.silu(seen @ found["gate"].matrix().T) * (seen @ found["up"].matrix().T)
    seen = quantize_input(inner, spec, None, _feedback.factors([found["down"].matrix()], 16))
    return x + seen @ found["down"].matrix().T


def test_a_model_rounds_each_input_with_the_weights_that_read_it():
    qm = quantized()
    got = jax.jit(lambda x: block_by_hand(qm, x))(X)
    half = jqopt.quantize_model(Block(), recipe(FED), params={"params": variables()["params"]["layers_0"]}, batches=[X])
    # a value near a tie may be rounded the other way by another order of sums
    assert np.median(np.abs(np.asarray(half(X) - got))) < 1e-5


@pytest.mark.parametrize("layerwise", [False, True])
def test_scanned_layers_are_as_unrolled_ones(layerwise):
    options = {"algorithm": ["qep", "gptq"], "layerwise": True} if layerwise else {}
    flat, scanned = quantized(**options), quantized(net=Net(scanned=True), **options)
    for name in ("gate", "up", "down"):
        one = scanned.params["params"]["layers"][name]["kernel"].feedback
        assert one.shape == (2, -(-{"down": 48}.get(name, 32) // 16), 16, 16)
        for i in range(2):
            np.testing.assert_array_equal(one[i], flat.params["params"][f"layers_{i}"][name]["kernel"].feedback)
    assert np.median(np.abs(np.asarray(flat(X) - scanned(X)))) < 1e-5


def test_layer_by_layer_solves_for_inputs_that_are_rounded_so():
    """With feedback in its statistics GPTQ comes nearer than with the codes it makes for nearest rounding."""
    wanted = Net().apply(variables(), X)
    off = lambda qm: float(jnp.mean(jnp.square(qm(X) - wanted)))  # noqa: E731
    near = quantized(NEAREST, algorithm="gptq", layerwise=True)
    fed = quantized(FED, algorithm="gptq", layerwise=True)
    assert off(fed) < off(near)


@pytest.mark.parametrize("rotated", ["hadamard", "smoothquant"])
def test_rotated_and_scaled_inputs_use_the_weights_behind_that(rotated):
    step = {"name": "hadamard", "block": 16} if rotated == "hadamard" else {"name": "smoothquant", "alpha": 0.5}
    qm = quantized(algorithm=[step, "gptq"], layerwise=True)
    tensor = qm.params["params"]["layers_0"]["down"]["kernel"]
    np.testing.assert_array_equal(tensor.feedback, _feedback.factors([tensor.matrix()], 16))
    wanted = Net().apply(variables(), X)
    near = quantized(NEAREST, algorithm=[step, "gptq"], layerwise=True)
    assert float(jnp.mean(jnp.square(qm(X) - wanted))) < float(jnp.mean(jnp.square(near(X) - wanted)))


@pytest.mark.parametrize("weight", ["int8", "fp8"])
def test_kernels_get_the_codes_of_the_values_that_simulation_multiplies(weight):
    kind = {"format": weight, "granularity": "token", "feedback": 16}
    qm = quantized(kind, weight={"format": weight, "granularity": "channel"})
    simulated = jqopt.apply(qm.plan, simulate=True)(qm.quant, X)
    np.testing.assert_allclose(qm(X), simulated, rtol=1e-5, atol=1e-5)


def test_an_input_is_rounded_once_for_the_weights_that_read_it():
    qm = quantized()

    def scans(jaxpr: Any) -> int:
        """Loops that stand in no other loop: one sweep each."""
        inner = lambda e: sum(map(scans, extend.jaxprs_in_params(e.params)))  # noqa: E731
        return sum(1 if e.primitive.name == "scan" else inner(e) for e in jaxpr.eqns)

    made = jax.make_jaxpr(jqopt.apply(qm.plan).run)(qm.quant, (X,), {})
    assert scans(made.jaxpr) == 4  # two layers; gate and up together, and down
    shared = [qm.params["params"]["layers_0"][n]["kernel"].feedback for n in ("gate", "up")]
    np.testing.assert_array_equal(*shared)


def test_a_checkpoint_holds_no_factors_and_comes_back_with_them(tmp_path):
    qm = quantized(algorithm="gptq", layerwise=True)
    jqopt.save(tmp_path / "q", qm)
    back = jqopt.load(tmp_path / "q", Net())
    np.testing.assert_array_equal(qm(X), back(X))
    assert jax.tree.structure(qm.quant) == jax.tree.structure(back.quant)
    assert all(map(np.array_equal, jax.tree.leaves(qm.quant), jax.tree.leaves(back.quant)))
    plain = quantized(NEAREST, algorithm="gptq", layerwise=True)
    jqopt.save(tmp_path / "plain", plain)
    size = lambda d: sum(x.nbytes for x in jax.tree.leaves(jqopt.load(d)))  # noqa: E731
    assert size(tmp_path / "q") == size(tmp_path / "plain")
    said = lambda qm: [t.nbytes for t in jax.tree.leaves(qm.params, is_leaf=is_qtensor) if is_qtensor(t)]  # noqa: E731
    assert said(qm) == said(plain)


def test_native_layers_give_the_same():
    qm = quantized()

    @jax.jit
    def native(params, x):
        with jqopt.linen.intercept(qm):
            return Net().apply(params, x)

    np.testing.assert_array_equal(native(qm.params, X), qm(X))


def test_nnx_layers_give_the_same():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(32, 48, rngs=rngs), nnx.Linear(48, 32, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    model = Two(nnx.Rngs(0))
    qm = jqopt.quantize_model(model, recipe(FED), batches=[X])
    tensors = [t for t in jax.tree.leaves(qm.params, is_leaf=is_qtensor) if is_qtensor(t)]
    assert [t.feedback.shape for t in tensors] == [(2, 16, 16), (3, 16, 16)]
    wanted = qm(X)
    native = jqopt.nnx.quantize(model, qm)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(native, X), wanted)


def test_the_program_that_is_exported_rounds_with_feedback(tmp_path):
    qm = quantized()
    jqopt.export(qm, tmp_path / "out", target="stablehlo")
    program = jqopt.artifacts.load(tmp_path / "out")
    np.testing.assert_allclose(np.asarray(program(np.asarray(X[:8]))), qm(X[:8]), rtol=1e-5, atol=1e-5)


def test_an_export_for_engines_says_that_they_round_otherwise(tmp_path):
    model, variables = load_model(REFERENCE)
    batches = [jnp.asarray(np.arange(64).reshape(2, 32), jnp.int32)]
    made = jqopt.quantize_model(
        model,
        {"extends": ["nvfp4_feedback"], "algorithm": "max", "layerwise": False},
        params=variables,
        batches=batches,
    )
    told = jqopt.export(made, tmp_path / "out", source=REFERENCE)
    assert any("28 weights have inputs that jqopt rounds with feedback" in n for n in told.notes), told.notes
    assert any("28 weights have inputs whose scales jqopt chooses from several" in n for n in told.notes), told.notes


# ------------------------------------------------------------------------------------------------ plan and recipe


def test_the_plan_says_it_and_comes_back_from_data():
    plan = quantized().plan
    assert "nvfp4/16 dynamic feedback 16" in str(plan)
    again = _plan.from_dict(json.loads(json.dumps(_plan.to_dict(plan))))
    assert again.decisions == plan.decisions


def test_a_recipe_keeps_it_through_its_own_data():
    read = jqopt.load_recipe(recipe(FED))
    assert jqopt.load_recipe(read.to_dict()) == read
    assert read.rules[0].input is not None and read.rules[0].input.feedback == 16
    assert read.fingerprint != jqopt.load_recipe(recipe(NEAREST)).fingerprint


def test_sites_without_one_matrix_for_all_tokens_are_told():
    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, name="out")(nn.Conv(32, (3,), name="conv")(x))

    x = arrays.normal(30, (2, 8, 32))
    model = Conv()
    qm = jqopt.quantize_model(model, recipe(FED), params=model.init(jax.random.key(0), x), batches=[x])
    assert "rounded without feedback: a conv has no one weight matrix for all tokens" in str(qm.plan)
    assert qm.params["params"]["conv"]["kernel"].feedback is None
    assert qm.params["params"]["out"]["kernel"].feedback is not None
    assert bool(jnp.isfinite(qm(x)).all())


def test_matrices_that_meet_parts_of_the_activation_are_told():
    def f(p, x):
        return jnp.einsum("bhk,hkn->bhn", x.reshape(-1, 2, 16), p["w"])

    qm = jqopt.quantize_model(f, recipe(FED), params={"w": arrays.normal(31, (2, 16, 8))}, batches=[X])
    assert "rounded without feedback: each of several matrices meets its own part" in str(qm.plan)
    assert bool(jnp.isfinite(qm(X)).all())


@pytest.mark.parametrize("value", [0, 1, 2000, "64", True, 16.0])
def test_another_number_of_channels_is_an_error(value):
    with pytest.raises(RecipeError, match="expected a number of channels from 2 to 1024"):
        jqopt.load_recipe(recipe({**FED, "feedback": value}))


def test_feedback_of_a_weight_is_an_error_that_says_gptq():
    with pytest.raises(RecipeError, match="a weight is rounded so by `algorithm: gptq`"):
        jqopt.load_recipe({"rules": [{"match": "*", "weight": {"format": "nvfp4", "feedback": 16}}]})


def test_a_weight_without_factors_is_an_error():
    qm = quantized()
    bare = jax.tree.map(lambda t: t.replace(feedback=None) if is_qtensor(t) else t, qm.params, is_leaf=is_qtensor)
    with pytest.raises(PlanError, match="holds no factors for that"):
        jqopt.apply(qm.plan)(bare, X)


def test_training_of_quantized_models_refuses_it():
    with pytest.raises(PlanError, match="rounded with feedback, by factors of weights that stay"):
        jqopt.train.qat(quantized().plan)
