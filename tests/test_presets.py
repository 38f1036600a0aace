"""Every shipped recipe: a plan that leaves no rule unused, and a run from end to end on the tiny language model."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt.hf import load_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPERTS = {"nvfp4_experts_only"}  # recipes for models that the tiny one isn't


@pytest.fixture(scope="module")
def tiny():
    """(model, variables, two batches of tokens)"""
    model, variables = load_model(ROOT / "tests/golden/tinylm_reference")
    tokens = np.load(ROOT / "examples/tinylm/calib_tokens.npy").astype(np.int32).reshape(-1)[: 4 * 64]
    return model, variables, list(tokens.reshape(2, 2, 64))


@pytest.fixture(scope="module")
def graph(tiny):
    model, variables, batches = tiny
    return jqopt.trace(model, variables, batches[0])


def experts(p, x):
    """A layer of experts and a router."""
    weight = jax.nn.softmax(x @ p["router"]["kernel"])
    h = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["experts"]["up"]))
    return jnp.einsum("tef,efd,te->td", h, p["experts"]["down"], weight)


def expert_parameters() -> dict:
    up, down = jnp.ones((4, 32, 64)) / 8, jnp.ones((4, 64, 32)) / 8
    return {"router": {"kernel": jnp.ones((32, 4))}, "experts": {"up": up, "down": down}}


def test_the_names_that_are_promised_are_there():
    promised = {
        "int8_smoothquant", "int4_awq", "int4_gptq", "nvfp4_awq", "nvfp4_four_over_six", "nvfp4_gptq",
        "nvfp4_svdquant", "mxfp4_mr_gptq", "w4a8_awq",
    }  # fmt: skip
    assert promised <= set(jqopt.list_recipes())


@pytest.mark.parametrize("name", sorted(jqopt.list_recipes()))
def test_a_plan_of_it_quantizes_and_uses_its_rules(graph, name):
    """A rule that matches nothing, or never decides, is an error in `plan`."""
    recipe = jqopt.load_recipe(name)
    made = jqopt.plan(
        recipe, graph if name not in EXPERTS else jqopt.trace(experts, expert_parameters(), jnp.ones((8, 32)))
    )
    assert made.quantized and not any("/embed" in p for p in made.quantized)
    assert recipe.description and str(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(jqopt.list_recipes()) - EXPERTS))
def test_it_runs_from_end_to_end(tiny, name):
    model, variables, batches = tiny
    qm = jqopt.quantize_model(model, name, params=variables, batches=batches)
    out, plain = (np.asarray(f(batches[1]), np.float64) for f in (qm, lambda x: model.apply(variables, x)))
    assert np.all(np.isfinite(out))
    assert np.linalg.norm(out - plain) < 0.25 * np.linalg.norm(plain)
