"""Generating: rows of different lengths, ends, draws, packed caches, quantized models; each against the whole pass."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt.errors import UnsupportedError
from jqopt.hf import generate, init_cache, load_model
from jqopt.hf.generation import _draw, likeliest

pytestmark = pytest.mark.quick


GOLDEN = Path(__file__).parent / "golden"
IDS = np.random.default_rng(1).integers(3, 40, (2, 9)).astype(np.int32)


@functools.cache
def loaded(name, scan=False):
    return load_model(GOLDEN / name, scan_layers=scan)


@functools.cache
def forward(name):
    module, variables = loaded(name)
    return functools.partial(jax.jit(module.apply), variables)


def test_a_cache_gives_the_logits_of_the_whole_pass():
    """Prefilled with some tokens, then one at a time; layers with a window and without, in one scan."""
    module, variables = loaded("gemma3_text", scan=True)
    step = jax.jit(functools.partial(module.apply, method="decode", mutable="cache", length=9))
    cache, found = init_cache(module, 2, 9, None), []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
        part = jnp.asarray(IDS[:, start:stop])
        logits, after = step({**variables, "cache": cache}, part, jnp.int32(start))
        cache = after["cache"]
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1), module.apply(variables, IDS), rtol=0, atol=2e-5)


def test_rows_of_different_lengths():
    """Each row as if it were alone, whatever its padding is."""
    module, variables = loaded("mistral")
    padded = IDS.copy()
    padded[1, 5:] = 7
    both = np.asarray(generate(module, variables, padded, max_new_tokens=4, lengths=[9, 5]).tokens)
    for row, length in ((0, 9), (1, 5)):
        whole = np.concatenate([padded[row, :length], both[row]])[None]
        np.testing.assert_array_equal(np.argmax(forward("mistral")(whole[:, :-1]), -1)[0, length - 1 :], both[row])


def test_rows_end_where_they_say_so():
    module, variables = loaded("mistral")
    free = np.asarray(generate(module, variables, IDS, max_new_tokens=6).tokens)
    end = int(free[0, 2])
    assert end not in free[0, :2]
    found = generate(module, variables, IDS, max_new_tokens=6, eos=[end, 99], pad=1)
    np.testing.assert_array_equal(found.tokens[0], [*free[0, :3], 1, 1, 1])
    assert found.lengths[0] == 3
    count = int(found.lengths[1])
    np.testing.assert_array_equal(found.tokens[1, :count], free[1, :count])
    assert (count == 6 and end not in free[1, :5]) or free[1, count - 1] == end


def test_seeds_and_temperature():
    module, variables = loaded("mistral")
    draw = functools.partial(generate, module, variables, IDS, max_new_tokens=6)
    one = draw(temperature=1.0, seed=1).tokens
    np.testing.assert_array_equal(one, draw(temperature=1.0, seed=1).tokens)
    assert (one != draw(temperature=1.0, seed=2).tokens).any()
    np.testing.assert_array_equal(draw(temperature=1e-4, seed=3).tokens, draw().tokens)
    np.testing.assert_array_equal(draw(temperature=5.0, top_p=1e-6, seed=4).tokens, draw().tokens)


def test_draws_follow_the_distribution():
    """Frequencies of 20 000 draws against probabilities by hand: softmax of logits / temperature, the tail cut off."""
    p = np.asarray([0.5, 0.25, 0.15, 0.1])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (20_000, 4))

    def frequencies(temperature, top_p):
        settings = (jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0))
        return np.bincount(np.asarray(_draw(settings, top_p < 1, logits, jnp.int32(3))), minlength=4) / 20_000

    np.testing.assert_allclose(frequencies(1, 1), p, atol=0.015)
    np.testing.assert_allclose(frequencies(2, 1), p**0.5 / np.sum(p**0.5), atol=0.015)
    np.testing.assert_allclose(frequencies(1, 0.7), [2 / 3, 1 / 3, 0, 0], atol=0.015)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = jnp.log(jnp.asarray([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], jnp.float32))
    for top_p, kept in ((0.4, [[0, 1, 0], [0, 0, 1]]), (0.6, [[0, 1, 1], [0, 0, 1]]), (0.9, [[1, 1, 1], [1, 0, 1]])):
        np.testing.assert_array_equal(likeliest(logits, jnp.float32(top_p)), np.asarray(kept, bool))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quantized_models_with_a_packed_cache(scan):
    """FP8 weights and FP8 keys and values: over the packed cache the same as the whole pass that simulates it."""
    module, variables = loaded("qwen3", scan)
    fp8 = {"match": "*_proj/kernel", "weight": {"format": "fp8", "granularity": "channel"}}
    recipe = {"schema": 1, "name": "r", "rules": [fp8], "kv_cache": "fp8"}
    qm = jqopt.quantize_model(module, recipe, params=variables, batches=[IDS])
    new = np.asarray(generate(module, qm, IDS, max_new_tokens=4).tokens)
    whole = np.concatenate([IDS, new], axis=1)
    np.testing.assert_array_equal(np.argmax(qm(whole[:, :-1]), -1)[:, 8:], new)
    if scan:
        plain = generate(module, qm, IDS, max_new_tokens=4, cache=None)
        packed = generate(module, qm, IDS, max_new_tokens=4, cache={"format": "nvfp4", "scaling": "cast"})
        assert plain.tokens.shape == packed.tokens.shape == (2, 4)


def test_what_cannot_be_generated():
    module, variables = loaded("mistral")
    with pytest.raises(UnsupportedError, match=r"ids have shape \[9\]; expected \[batch, tokens\]"):
        generate(module, variables, IDS[0], max_new_tokens=1)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(UnsupportedError, match="expected at least 1, at least 0, and more than 0"):
            generate(module, variables, IDS, **{"max_new_tokens": 1, **wrong})
    for lengths in ([9], [0, 9], [9, 10]):
        with pytest.raises(UnsupportedError, match="expected one number for each row, from 1 to 9"):
            generate(module, variables, IDS, max_new_tokens=1, lengths=lengths)
    recipe = {
        "schema": 1,
        "name": "r",
        "rules": [{"match": "*_proj/kernel", "weight": "int8"}],
        "attention": {"q": "fp8"},
    }
    qm = jqopt.quantize_model(module, recipe, params=variables, batches=[IDS])
    with pytest.raises(UnsupportedError, match=r"quantizes q of attention.*Pass cache="):
        generate(module, qm, IDS, max_new_tokens=1)


def test_longrope_does_not_change_on_the_way(tmp_path):
    shutil.copytree(GOLDEN / "phi3", tmp_path / "x")
    text = json.loads((tmp_path / "x" / "config.json").read_text())
    lists = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 4.0]}
    text["rope_parameters"] |= {"rope_type": "longrope", **lists}
    (tmp_path / "x" / "config.json").write_text(json.dumps(text | {"original_max_position_embeddings": 12}))
    module, variables = load_model(tmp_path / "x")
    with pytest.raises(
        UnsupportedError, match="beyond 12 tokens .longrope.*rows of 9 tokens and 4 new ones.*max_new_tokens=3"
    ):
        generate(module, variables, IDS, max_new_tokens=4)
    assert (module.config.rope().frequencies(12) != module.config.rope().frequencies(13)).all()
