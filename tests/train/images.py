"""Models of one convolution for tests of training, their recipes and gradients."""

from __future__ import annotations

import jax
from jax import lax

import jqopt

KEY = jax.random.key(7)
NHWC = ("NHWC", "HWIO", "NHWC")
NEAREST = {"input": "nvfp4", "weight": {"format": "nvfp4", "tile": [16, 16]}, "grad": "nvfp4"}


def recipe(spec: dict | str) -> dict:
    """Everything in NVFP4 after training; in training as `spec`, or a shipped recipe, says."""
    section = spec if isinstance(spec, dict) else jqopt.load_recipe(f"train/{spec}").train.to_dict()
    return {"name": "all", "rules": [{"match": "*", "weight": "nvfp4"}], "train": section}


def conv(numbers=NHWC, strides=None, padding="SAME", **more):
    """A model of one convolution."""
    spatial = len(numbers[0]) - 2
    return lambda p, x: lax.conv_general_dilated(
        x, p["w"], strides or (1,) * spatial, padding, dimension_numbers=numbers, **more
    )


def gradients(prepared, params, x, dy, key=KEY):
    """(y, dw, dx)."""
    y, back = jax.vjp(lambda p, x: prepared.apply(p, x, quant_key=key), params, x)
    dw, dx = back(dy)
    return y, dw["w"], dx
