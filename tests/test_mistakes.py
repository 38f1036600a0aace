"""Plausible mistakes, 36 of peers and more: none is silent, and each error names the rule, its file, and the site."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jqopt
from jqopt import CalibrationError, PlanError, RecipeError, TraceError, UnsupportedError
from tests import arrays


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(48, name="down")(nn.relu(nn.Dense(96, name="up")(x)))


X = arrays.normal(0, (4, 64))
MODEL = MLP()
VARIABLES = MODEL.init(jax.random.key(1), X)
BIASED = jax.tree.map(lambda x: x + 1 if x.ndim == 1 else x, VARIABLES)
INT8 = "weight: int8, input: int8"


class Small(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(64, 48, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def recipe_file(tmp_path, rules: str):
    """A recipe on disk; `rules` are the lines under `rules:`."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"schema: 1\nname: mine\nrules:\n{rules}\n")
    return path


def make(recipe, variables=None):
    return jqopt.quantize_model(MODEL, recipe, params=VARIABLES if variables is None else variables, batches=[X])


def relative_error(qm) -> float:
    want = MODEL.apply(VARIABLES, X)
    return float(jnp.linalg.norm(qm(X) - want) / jnp.linalg.norm(want))


WRONG_RECIPES = {
    "1 bad glob": ("  - {match: '[', weight: int8}", RecipeError, ["mine.yaml:4", "["]),
    "3 unknown format": ("  - {match: '*', weight: int9}", RecipeError, ["mine.yaml:4", "int9", "int8"]),
    "4 a float dtype": ("  - {match: '*', weight: bfloat16}", RecipeError, ["mine.yaml:4", "bfloat16", "keep"]),
    "5 misspelt key": ("  - {match: '*', weights: int8}", RecipeError, ["mine.yaml:4", "weights", "'weight'"]),
    "6 matches nothing": (
        f"  - {{match: 'mlp/*', {INT8}}}",
        PlanError,
        ["mine.yaml:4", "matches no site", "up/kernel"],
    ),
    "7 a prefix": (f"  - {{match: 'do', {INT8}}}", PlanError, ["mine.yaml:4", "matches no site", "down/kernel"]),
    "11 input only": ("  - {match: '*', input: int8}", RecipeError, ["mine.yaml:4", "weight"]),
    "12 scaling of nothing": (
        "  - {match: '*', weight: int8, scaling: static}",
        RecipeError,
        ["mine.yaml:4", "scaling"],
    ),
    "13 unknown algorithm": (
        "  - {match: '*', weight: int8, algorithm: maxx}",
        PlanError,
        ["mine.yaml:4", "maxx", "'max'"],
    ),
    "14 asymmetric fp8": (
        "  - {match: '*', weight: {format: fp8, symmetric: false}}",
        RecipeError,
        ["mine.yaml:4", "symmetric"],
    ),
    "15 misspelt op": (
        "  - {match: {path: '*', op: [dotgeneral]}, weight: int8}",
        RecipeError,
        ["mine.yaml:4", "dotgeneral", "dot_general"],
    ),
    "16 op of another name": (
        "  - {match: {path: '*', op: dot_general_x}, weight: int8}",
        RecipeError,
        ["mine.yaml:4", "dot_general"],
    ),
    "24 one rule, no list": ("  match: '*'\n  weight: int8", RecipeError, ["mine.yaml", "rules", "list"]),
    "35 block 0.3": (
        "  - {match: '*', weight: {format: int4, block: 0.3}}",
        RecipeError,
        ["mine.yaml:4", "0.3", "block"],
    ),
    "36 negative block": (
        "  - {match: '*', weight: {format: int4, block: -16}}",
        RecipeError,
        ["mine.yaml:4", "-16", "block"],
    ),
}


@pytest.mark.parametrize("mistake", WRONG_RECIPES)
def test_wrong_recipe(mistake, tmp_path):
    rules, error, words = WRONG_RECIPES[mistake]
    with pytest.raises(error) as caught:
        make(recipe_file(tmp_path, rules))
    for word in words:
        assert word in str(caught.value)


def test_17_catch_all_first(tmp_path):
    path = recipe_file(tmp_path, "  - {match: '*', weight: int8}\n  - {match: 'down/*', weight: int4}")
    with pytest.raises((RecipeError, PlanError)) as caught:
        make(path)
    assert "mine.yaml:5" in str(caught.value) and "mine.yaml:4" in str(caught.value)


def test_25_rules_as_python_dicts_work_and_one_dict_is_refused():
    rule = {"match": "*", "weight": "int8"}
    assert relative_error(make({"schema": 1, "name": "t", "rules": [rule]})) < 0.02
    with pytest.raises(RecipeError, match="list"):
        make({"schema": 1, "name": "t", "rules": rule})


@pytest.mark.parametrize(
    ("mistake", "weight", "most"),
    [
        ("2 'fp8' is a name here", "fp8", 0.1),
        ("8 block 40 of 64: the last block is short", {"format": "int4", "block": 40}, 0.25),
        ("9 nvfp4 needs no block size", "nvfp4", 0.25),
        ("10 nvfp4 in blocks of 32", {"format": "nvfp4", "block": 32}, 0.25),
    ],
)
def test_no_mistake_here(mistake, weight, most):
    qm = make({"schema": 1, "name": "t", "rules": [{"match": "*", "weight": weight}]})
    assert len(qm.plan.quantized) == 2 and 0 < relative_error(qm) < most


INT8_STATIC = {"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "int8", "input": "int8"}]}


def staged():
    plan = jqopt.plan(INT8_STATIC, jqopt.trace(MODEL, VARIABLES, X))
    return plan, jqopt.calibrate(plan, VARIABLES, [X])


def test_18_parameters_renamed():
    plan, stats = staged()
    p = VARIABLES["params"]
    with pytest.raises(PlanError, match=r"Missing: \['up/.*unexpected: \['UP/"):
        jqopt.quantize(plan, {"params": {"UP": p["up"], "down": p["down"]}}, stats)


def test_19_params_instead_of_variables():
    with pytest.raises(TraceError, match="whole variables dict"):
        make(INT8_STATIC, VARIABLES["params"])


def test_20_numpy_parameters_work():
    qm = make(INT8_STATIC, jax.tree.map(np.asarray, VARIABLES))
    assert len(qm.plan.quantized) == 2 and 0 < relative_error(qm) < 0.02


def test_21_a_layer_is_missing():
    plan, stats = staged()
    with pytest.raises(PlanError, match="Missing: .*down/kernel"):
        jqopt.quantize(plan, {"params": {"up": VARIABLES["params"]["up"]}}, stats)


def test_22_transposed_kernel():
    plan, stats = staged()
    p = VARIABLES["params"]
    wrong = {"params": {"up": {**p["up"], "kernel": p["up"]["kernel"].T}, "down": p["down"]}}
    with pytest.raises(PlanError, match=r"up/kernel: found shape \(96, 64\).*\(64, 96\)"):
        jqopt.quantize(plan, wrong, stats)


def test_23_float_parameters_into_the_quantized_model():
    plan, _ = staged()
    with pytest.raises(PlanError, match="up/kernel|down/kernel"):
        jqopt.apply(plan)(VARIABLES, X)


def test_26_linen_without_parameters():
    with pytest.raises(TraceError, match="variables"):
        jqopt.quantize_model(MODEL, INT8_STATIC, batches=[X])


def test_27_nnx_without_inputs():
    with pytest.raises(CalibrationError, match="batches"):
        jqopt.quantize_model(Small(nnx.Rngs(0)), INT8_STATIC)


def test_28_nnx_wrong_input_shape():
    with pytest.raises(TraceError, match=r"Small can't run with these inputs: float32\[2, 32\]"):
        jqopt.quantize_model(Small(nnx.Rngs(0)), INT8_STATIC, batches=[jnp.ones((2, 32))])


def test_29_calibrated_properly():
    assert 0 < relative_error(make(INT8_STATIC)) < 0.02


def test_30_forgot_to_calibrate():
    plan, _ = staged()
    with pytest.raises(CalibrationError, match=r"2 sites need statistics.*up/kernel.*jqopt.calibrate"):
        jqopt.quantize(plan, VARIABLES)


def test_31_statistics_of_one_site_only():
    plan, stats = staged()
    with pytest.raises(CalibrationError, match="no data reached these sites: down/kernel"):
        jqopt.quantize(plan, VARIABLES, {"up/kernel": stats["up/kernel"]})


def test_32_unused_rules_show_before_anything_runs():
    graph = jqopt.trace(MODEL, VARIABLES, X)
    with pytest.raises(PlanError, match="matches no site"):
        jqopt.plan({"schema": 1, "name": "t", "rules": [{"match": "nope", "weight": "int8"}]}, graph)


def test_33_quantizing_twice():
    plan, stats = staged()
    quant = jqopt.quantize(plan, VARIABLES, stats)
    with pytest.raises(UnsupportedError, match="(up|down)/kernel is quantized already"):
        jqopt.quantize(plan, quant.params, stats)


def test_34_a_method_that_does_not_exist():
    with pytest.raises(TraceError, match="MLP can't run with these inputs:.*encode"):
        jqopt.quantize_model(MODEL, INT8_STATIC, params=VARIABLES, batches=[X], method="encode")


def test_int8_checkpoint_for_an_int4_plan():
    """The peers' silent favourite: an int8 tree under an int4 plan."""
    plan, stats = staged()
    quant = jqopt.quantize(plan, VARIABLES, stats)
    other = jqopt.plan(
        {"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "int4"}]}, jqopt.trace(MODEL, VARIABLES, X)
    )
    with pytest.raises(PlanError, match="found int8, but the plan quantizes it to int4"):
        jqopt.apply(other)(quant, X)


# ---------------------------------------------------------------------------------------- mistakes of our own users


@pytest.mark.parametrize(("cls", "params"), [(MLP, VARIABLES), (Small, None)])
def test_a_class_in_place_of_a_model(cls, params):
    with pytest.raises(TraceError, match=rf"the class {cls.__name__}, expected an instance"):
        jqopt.quantize_model(cls, INT8_STATIC, params=params, batches=[X])


def test_parameters_beside_an_nnx_module():
    with pytest.raises(TraceError, match="Small is an NNX module and holds its own parameters"):
        jqopt.quantize_model(Small(nnx.Rngs(0)), INT8_STATIC, params=VARIABLES, batches=[X])


def test_a_batch_of_another_width():
    plan, _ = staged()
    with pytest.raises(CalibrationError, match=r"batch 2: MLP can't run with these inputs: float32\[4, 32\]"):
        jqopt.calibrate(plan, VARIABLES, [X, X[:, :32]])


def test_shapes_in_place_of_parameters():
    plan, stats = staged()
    abstract = jax.eval_shape(lambda: VARIABLES)
    for verb in (lambda: jqopt.calibrate(plan, abstract, [X]), lambda: jqopt.quantize(plan, abstract, stats)):
        with pytest.raises(PlanError, match="down/bias: found a shape without values"):
            verb()


def test_donated_parameters():
    plan, stats = staged()
    gone = jax.tree.map(jnp.array, VARIABLES)
    gone["params"]["up"]["kernel"].delete()
    for verb in (lambda: jqopt.calibrate(plan, gone, [X]), lambda: jqopt.quantize(plan, gone, stats)):
        with pytest.raises(PlanError, match="up/kernel: the array has been deleted"):
            verb()


def test_a_quantized_model_in_place_of_its_plan():
    with pytest.raises(PlanError, match=r"found QuantizedModel.*jqopt.apply\(qm.plan\)"):
        jqopt.apply(make(INT8_STATIC))


def test_calibrating_with_zeros_is_told():
    """Their range is unknown: int8 with a scale of 1 would round what comes later to whole numbers."""
    plan, _ = staged()
    with pytest.warns(UserWarning, match=r"zero in all batches: up/kernel\. .*scaling: dynamic"):
        jqopt.calibrate(plan, BIASED, [jnp.zeros_like(X)])
