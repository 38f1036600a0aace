"""Compiled functions don't grow in number with equal layers, whatever the algorithm."""

from __future__ import annotations

import jax
import pytest
from flax import linen as nn

import jqopt
from jqopt import _quantize, algorithms
from tests import arrays

pytestmark = [pytest.mark.slow, pytest.mark.quick]

LAYERWISE = ("qep",)  # what needs it; how often its pieces are compiled: tests/test_layerwise.py


class Net(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            h = nn.RMSNorm(name=f"norm_{i}")(x)
            x = x + nn.Dense(16, use_bias=False, name=f"down_{i}")(
                nn.relu(nn.Dense(16, use_bias=False, name=f"up_{i}")(h))
            )
        return x


X = arrays.normal(0, (32, 16))


def compiled(name: str, layers: int) -> int:
    """How many solvers are compiled for a model of so many layers."""
    net = Net(layers)
    rule = {"match": "*", "weight": "nvfp4", "input": "nvfp4"}
    step = {"name": name, **({"steps": 1, "loss": "mse"} if name == "distill" else {})}
    variables = net.init(jax.random.key(0), X)
    _quantize._solve.clear_cache()
    jqopt.quantize_model(net, {"rules": [rule], "algorithm": step}, params=variables, batches=[X])
    return _quantize._solve._cache_size()


@pytest.mark.parametrize("name", sorted(set(algorithms.names()) - set(LAYERWISE)))
def test_twice_the_layers_are_solved_by_the_same_compiled_functions(name):
    two, four = compiled(name, 2), compiled(name, 4)
    assert two == four <= 2  # one for each shape of a group, and where its scale may fold
