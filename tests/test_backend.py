"""Which kernels run: what a rule, a recipe, a context and a call ask for, in that order of weight."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jqopt
import jqopt_kernels as kernels
from jqopt import _cli_inspect, _ops, _plan, _recipe
from jqopt._ops import Weight
from tests import arrays
from tests.test_apply import rules, two_weights

X = jnp.ones((2, 64))
LOOKS_UP = "stablehlo.gather"  # only the oracle decodes by tables


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


@functools.cache
def made(**more) -> tuple:
    """The plan and the quantized tree of a recipe with `backend` in its rule or at its top."""
    recipe = rules("int4", **({"backend": more["rule"]} if "rule" in more else {}))
    recipe |= {"backend": more["top"]} if "top" in more else {}
    plan = jqopt.plan(recipe, jqopt.trace(model, two_weights(), X))
    return plan, jqopt.quantize(plan, two_weights())


def lowered(plan, quant, **asked) -> str:
    return jax.jit(jqopt.apply(plan, **asked)).lower(quant, X).as_text()


@pytest.mark.parametrize("where", ["rule", "top"])
def test_the_recipes_backend_is_planned_and_runs(where):
    plan, quant = made(**{where: "reference"})
    assert {d.backend for d in plan.decisions} == {"reference"}
    assert LOOKS_UP in lowered(plan, quant)
    again = _plan.from_dict(_plan.to_dict(plan))
    assert again.decisions == plan.decisions and again.recipe == plan.recipe
    assert LOOKS_UP not in lowered(*made())


def test_a_rule_is_before_the_recipe_the_context_before_both_and_the_call_before_all():
    plan, quant = made(rule="reference", top="xla")
    assert LOOKS_UP in lowered(plan, quant)
    with kernels.using("xla_decode"):
        assert LOOKS_UP not in lowered(plan, quant)
        assert LOOKS_UP in lowered(plan, quant, backend="reference")
    assert LOOKS_UP not in lowered(plan, quant, backend="xla")


def test_a_context_reaches_what_was_jitted_before_and_leaves_no_trace():
    """int8 x int8 has no float operand here, so that asking for xla_int8 must fail wherever it is looked at."""
    plan, quant = made()
    run = jax.jit(jqopt.apply(plan))
    before = run(quant, X)
    with kernels.using("xla_int8"), pytest.raises(kernels.NoKernelError, match="xla_int8: lhs is float, not int8"):
        run(quant, X)
    assert kernels.asked() is None
    assert bool((run(quant, X) == before).all())
    with kernels.using("reference"):
        assert LOOKS_UP in run.lower(quant, X).as_text()
        assert bool((jnp.abs(run(quant, X) - before) < 1e-4).all())


def test_a_backend_that_does_not_exist():
    with pytest.raises(ValueError, match="'trition'; did you mean 'triton'"):
        kernels.using("trition")
    with pytest.raises(jqopt.RecipeError, match=r"rules\[0\].backend: .*'palas'.*did you mean 'pallas'"):
        jqopt.load_recipe(rules("int4", backend="palas"))
    with pytest.raises(jqopt.RecipeError, match="backend: found the number 1, expected one of xla, triton"):
        jqopt.load_recipe(rules("int4") | {"backend": 1})
    kept = {"schema": 1, "name": "test", "rules": [{"match": "a", "keep": True, "backend": "xla"}]}
    with pytest.raises(jqopt.RecipeError, match="yet 'backend' is given"):
        jqopt.load_recipe(kept)


def test_recipes_write_it_and_inherit_it(tmp_path):
    (tmp_path / "base.yaml").write_text('schema: 1\nbackend: ffi\nrules: [{match: "*", weight: int8, backend: xla}]\n')
    (tmp_path / "own.yaml").write_text('schema: 1\nextends: base.yaml\nrules: [{match: "a", weight: int4}]\n')
    recipe = jqopt.load_recipe(tmp_path / "own.yaml")
    assert recipe.backend == "ffi" and [rule.backend for rule in recipe.rules] == [None, "xla"]
    assert jqopt.load_recipe(recipe.to_dict()) == recipe
    schema = _recipe.recipe_schema()
    for properties in (schema["properties"], schema["$defs"]["Rule"]["properties"]):
        assert {"xla", "triton", "pallas", "ffi", "reference", "xla_tiled"} <= set(
            properties["backend"]["anyOf"][0]["enum"]
        )


def test_what_has_no_kernels_says_so():
    table = {"table": arrays.normal(0, (32, 64))}
    graph = jqopt.trace(lambda p, i: p["table"][i], table, jnp.zeros((2,), jnp.int32))
    (decision,) = jqopt.plan(rules("int8", backend="xla"), graph).decisions
    assert (decision.backend, decision.note) == ("", "backend xla left alone: this gather decodes its weight")


def test_reasons_name_what_was_asked_for():
    plan, _ = made()
    d = plan.decisions[0]
    weight = Weight(d.format, d.granularity, 128, 64)
    rows = dict(_ops.explain(weight, None, 1, "cuda:90", "xla"))
    assert rows["reference"] == "not what was asked for, xla" and rows["xla_decode"] is None
    assert set(rows) == {k.name for k in kernels.KERNELS if k.op == "qdot"}
    site = _cli_inspect._kernel(weight, made(rule="xla_int8")[0].decisions[0], 1, "cpu")
    assert site["kernel"] == "none: the recipe asks for xla_int8, which cannot"
    assert site["not"]["xla_int8"] == "lhs is float, not int8"
