"""The plan: the first matching rule decides, conflicts and useless rules are errors, JSON round-trips."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import jqopt
from jqopt._plan import from_dict, to_dict
from tests import zoo


def recipe(*rules) -> dict:
    return {"schema": 1, "name": "mine", "rules": list(rules)}


def graph(cls):
    return jqopt.trace(*zoo.build(cls))


def test_the_first_rule_that_matches_decides():
    plan = jqopt.plan(
        recipe(
            {"match": "*/key/*", "keep": True},
            {"match": "*/query/*", "weight": "fp8"},
            {"match": "*", "weight": "int8"},
        ),
        graph(zoo.MHA),
    )
    names = {d.path.split("/")[1]: d for d in plan.decisions if d.path}
    assert names["key"].weight is None and "kept by recipe 'mine' rules[0]" in names["key"].reason
    assert names["query"].format.name == "fp8" and "rules[1]" in names["query"].rule
    assert {names[n].format.name for n in ("value", "out")} == {"int8"}


def test_two_sites_that_ask_two_different_things_of_one_parameter():
    rules = recipe({"match": {"path": "*", "op": "gather"}, "weight": "fp8"}, {"match": "*", "weight": "int8"})
    with pytest.raises(jqopt.PlanError) as caught:
        jqopt.plan(rules, graph(zoo.Tied))
    text = str(caught.value)
    assert "Embed_0/embedding: two sites ask two different things" in text
    assert "Embed_0/embedding (gather): fp8" in text and "Embed_0/embedding#2 (dot_general): int8" in text
    assert "rules[0]" in text and "rules[1]" in text


def test_quantizing_a_tied_head_but_not_its_table_is_such_a_conflict():
    with pytest.raises(jqopt.PlanError, match="left alone .no rule matches it."):
        jqopt.plan(recipe({"match": {"path": "*", "op": "dot_general"}, "weight": "int8"}), graph(zoo.Tied))
    plan = jqopt.plan("int8", graph(zoo.Tied))  # the shipped recipes keep both
    assert set(plan.quantized) == {"Dense_0/kernel"}


def test_a_recipe_that_quantizes_nothing():
    rules = recipe({"match": "none/*", "weight": "int8", "optional": True}, {"match": "*", "keep": True})
    with pytest.raises(jqopt.PlanError, match=r"would quantize no weight of Dense(.|\n)*Dense_0/kernel .*kept by"):
        jqopt.plan(rules, graph(zoo.Dense))
    bias_only = jqopt.trace(lambda p, x: x + p["b"], {"b": jnp.ones(3)}, jnp.ones(3))
    with pytest.raises(jqopt.PlanError, match="would quantize no weight|matches no site"):
        jqopt.plan("int8", bias_only)


def test_match_by_module_op_and_shape():
    by_module = jqopt.plan(recipe({"match": {"path": "*", "module": "DenseGeneral"}, "weight": "int8"}), graph(zoo.MHA))
    assert len(by_module.quantized) == 4
    by_op = jqopt.plan(recipe({"match": {"path": "*", "op": "conv"}, "weight": "int8"}), graph(zoo.Conv))
    assert set(by_op.quantized) == {"Conv_0/kernel"}
    by_shape = recipe({"match": {"path": "*", "shape": {"min_size": 64 * 128, "rank": 3}}, "weight": "int8"})
    assert len(jqopt.plan(by_shape, graph(zoo.Scan)).quantized) == 2


def test_the_table():
    text = str(jqopt.plan("nvfp4", graph(zoo.MHA)))
    head, _, *rows = text.splitlines()
    assert head.split() == ["site", "op", "weight", "input", "algorithm", "bits", "group", "decided", "by"]
    key = next(r for r in rows if "/key/" in r)
    assert "nvfp4/16" in key and "max" in key and "4.5" in key and "nvfp4.yaml:6 rules[0]" in key
    assert "with MultiHeadDotProductAttention_0/" in text and "multiplies two activations" in text
    total = next(i for i, r in enumerate(rows) if "4 of 8 parameters quantized" in r)
    folds = rows[total + 4 :]  # an empty line, the head and its rule
    assert any(r.startswith("MultiHead") and r.endswith("value/kernel (rows), value/bias (bias)") for r in folds)


def test_bits_count_scales():
    plan = jqopt.plan(recipe({"match": "*", "weight": "nvfp4"}), graph(zoo.Dense))
    assert plan["Dense_0/kernel"].bits == pytest.approx(4 + 8 / 16 + 32 / (64 * 64))
    plan = jqopt.plan(recipe({"match": "*", "weight": {"format": "int4", "block": 32}}), graph(zoo.Dense))
    assert plan.bits_per_weight == pytest.approx(4 + 32 / 32)


@pytest.mark.parametrize("cls", [zoo.MHA, zoo.Scan, zoo.LSTM, zoo.Tied, zoo.MoEBatched, zoo.Split])
def test_json_round_trip(cls):
    plan = jqopt.plan(recipe({"match": "*", "weight": "nvfp4", "input": "fp8"}), graph(cls))
    again = from_dict(json.loads(json.dumps(to_dict(plan))))
    assert again == plan and str(again) == str(plan)
    with pytest.raises(jqopt.PlanError, match="newer than"):
        from_dict({**to_dict(plan), "version": 99})


def test_unknown_algorithms_and_options_name_the_rule():
    rule = {"match": "*", "weight": "int8", "algorithm": {"name": "max", "steps": 3}}
    dense = graph(zoo.Dense)
    with pytest.raises(jqopt.PlanError, match=r"rules\[0\]: algorithm 'max' has no option 'steps'"):
        jqopt.plan(recipe(rule), dense)


def test_a_graph_is_planned_without_its_weights():
    model, variables, x = zoo.build(zoo.Dense)
    shapes = jax.eval_shape(lambda v: v, variables)
    with_shapes = jqopt.plan("int8", jqopt.trace(model, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype)))
    assert with_shapes == jqopt.plan("int8", jqopt.trace(model, variables, x))
