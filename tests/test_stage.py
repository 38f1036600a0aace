"""A model is traced once for each kind of arguments and settings, as jax.jit does, and no oftener."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt import _stage
from tests import arrays


def counted():
    """(model, its weights, a list that grows by one whenever Python runs the model)."""
    calls = []

    def model(w, x, *, twice=False):
        calls.append(x.shape)
        y = x @ w["w"]
        return 2 * y if twice else y

    return model, {"w": arrays.normal(0, (32, 16))}, calls


def quantized(model, w, x, recipe="int8"):
    plan = jqopt.plan(recipe, jqopt.trace(model, w, x))
    return plan, jqopt.quantize(plan, w, jqopt.calibrate(plan, w, [x]))


def test_apply_and_calibrate_at_the_traced_shapes_run_no_python():
    model, w, calls = counted()
    x = jnp.ones((4, 32))
    plan, quant = quantized(model, w, x)
    assert len(calls) == 1
    y = jax.jit(lambda q, x: jqopt.apply(plan)(q, x))(quant, x)
    assert len(calls) == 1
    np.testing.assert_array_equal(y, jqopt.apply(plan, simulate=False)(quant, x))


def test_other_shapes_and_static_values_are_traced():
    model, w, calls = counted()
    x = jnp.ones((4, 32))
    plan, quant = quantized(model, w, x)
    run = jqopt.apply(plan)
    once, more = run(quant, x), run(quant, jnp.ones((5, 32)))
    assert calls == [(4, 32), (5, 32)]
    assert more.shape == (5, 16)
    np.testing.assert_array_equal(run(quant, x, twice=True), 2 * once)
    assert calls == [(4, 32), (5, 32), (4, 32)]


def test_a_setting_of_jax_that_tracing_reads_counts():
    model, w, calls = counted()
    x = jnp.ones((4, 32))
    function = jqopt.trace(model, w, x).function
    with jax.default_matmul_precision("highest"):
        closed, _, _ = _stage.stage(function, w, (x,), {})
    assert len(calls) == 2
    assert "HIGHEST" in str(closed)
    closed, _, _ = _stage.stage(function, w, (x,), {})
    assert len(calls) == 2 and "HIGHEST" not in str(closed)


def test_tracing_again_runs_the_model_again():
    """What a model does may hang on what it closes over: jqopt.trace always looks, and its answer replaces the old."""
    scale = [1.0]

    def model(w, x):
        return (x @ w["w"]) * scale[0]

    _, w, _ = counted()
    x = jnp.ones((4, 32))
    before = quantized(model, w, x)
    one = jqopt.apply(before[0])(before[1], x)
    scale[0] = 3.0
    after = quantized(model, w, x)
    np.testing.assert_allclose(jqopt.apply(after[0])(after[1], x), 3 * one, rtol=1e-6)


def test_values_of_an_outer_trace_are_not_kept():
    _, w, _ = counted()
    x = jnp.ones((4, 32))
    functions = []

    @jax.jit
    def outer(scale):
        def model(w, x):
            return (x @ w["w"]) * scale

        functions.append(jqopt.trace(model, w, x).function)
        return scale

    outer(jnp.float32(2.0))
    assert not _stage._programs.get(functions[0].call)


def test_programs_are_few_and_go_with_their_model():
    model, w, _ = counted()
    function = jqopt.trace(model, w, jnp.ones((1, 32))).function
    for rows in range(1, 2 * _stage._MOST):
        _stage.stage(function, w, (jnp.ones((rows, 32)),), {})
    assert len(_stage._programs[function.call]) == _stage._MOST
    gone = len(_stage._programs)
    del model, function
    gc.collect()
    assert len(_stage._programs) < gone


def test_arguments_that_cannot_be_told_apart_are_traced_each_time():
    model, w, calls = counted()
    function = jqopt.trace(model, w, jnp.ones((1, 32))).function
    with pytest.raises(TypeError):
        jax.typeof(object())
    for _ in range(2):
        with pytest.raises(TypeError):
            _stage.stage(function, {"w": w["w"], "more": object()}, (jnp.ones((1, 32)),), {})
    assert len(calls) == 1
