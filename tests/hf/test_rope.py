"""Rotary scalings beside numbers of transformers, and turning beside complex numbers.

The numbers: `ROPE_INIT_FUNCTIONS` of transformers 5.23.0, theta 10000, 16 channels, 256 positions, trained on 32.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jqopt.hf.rope import Rope, parse_scaling, rotate

BASE = {"original_max_position_embeddings": 32, "max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "factor": 8.0, **BASE}
BETAS = {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 1.2, "mscale_all_dim": 0.7}
LONG = {
    "rope_type": "longrope", **BASE,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}  # fmt: skip
CASES = {
    "yarn": (YARN, 256, 1.2079441541679836, [
        1.0, 0.17787811160087585, 0.012500000186264515, 0.0039528473280370235, 0.0012499999720603228,
        0.00039528473280370235, 0.0001250000059371814, 3.9528473280370235e-05]),
    "yarn with betas": (YARN | BETAS, 256, 1.0907608459448856, [
        1.0, 0.19517549872398376, 0.013275129720568657, 0.0039528473280370235, 0.0012499999720603228,
        0.00039528473280370235, 0.0001250000059371814, 3.9528473280370235e-05]),
    "longrope, short": (LONG, 32, 1.2649110640673518, [
        1.0, 0.2874797582626343, 0.0833333358168602, 0.024325214326381683, 0.0071428571827709675,
        0.0021081853192299604, 0.0006249999860301614, 0.0001860163320088759]),
    "longrope, long": (LONG, 33, 1.2649110640673518, [
        1.0, 0.15811388194561005, 0.03333333507180214, 0.007905694656074047, 0.0020000000949949026,
        0.0005270463298074901, 0.0001428571413271129, 3.9528473280370235e-05]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name):
    table, length, factor, expected = CASES[name]
    rope = Rope(16, 10000.0, parse_scaling(table, 16))
    np.testing.assert_allclose(rope.frequencies(length), expected, rtol=2e-6)
    assert rope.frequencies(length).dtype == np.float32
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    assert rope.switch == (32 if "longrope" in name else None)


def test_given_factors_win():
    assert parse_scaling(YARN | {"attention_factor": 1.5}, 16).attention_factor == 1.5
    long = parse_scaling(LONG | {"attention_factor": 1.5, "factor": 4.0}, 16)
    assert (long.attention_factor, long.factor) == (1.5, 4.0)


@pytest.mark.parametrize("start", [None, 3, [3, 7]])
def test_a_part_of_the_channels_is_turned(start):
    """The first 4 of 6 as two complex numbers, times a factor; from one position for all rows, or from their own."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 6)).astype(np.float32)
    frequencies = np.asarray([0.7, 0.2], np.float32)
    given = None if start is None else jnp.asarray(start, jnp.int32)
    found = rotate(jnp.asarray(x), frequencies, given, factor=1.5)
    positions = np.arange(5) + np.broadcast_to(np.asarray(0 if start is None else start), (2,))[:, None]
    turn = 1.5 * np.exp(1j * positions[..., None] * frequencies)[:, :, None, :]
    z = (x[..., :2] + 1j * x[..., 2:4]) * turn
    np.testing.assert_allclose(found, np.concatenate([z.real, z.imag, x[..., 4:]], -1), atol=1e-5)
