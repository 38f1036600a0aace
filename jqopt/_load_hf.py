"""Packed Hugging Face checkpoints into quantized models: `load_hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jqopt import _apply, _attention_ops, _model
from jqopt._apply import Quantized
from jqopt._model import QuantizedModel
from jqopt.errors import CheckpointError, PlanError
from jqopt.hf import packed

IDS = (1, 16)
"""The shape of the token ids that the model is traced with."""


def load_hf(
    directory: str | Path, *, scan_layers: bool = False, dtype: Any = jnp.float32, verify: bool = True
) -> QuantizedModel:
    """A checkpoint that a serving engine loads, as a quantized model: packed weights, static scales, cache scales.

    Reads compressed-tensors folders (llm-compressor's, and `jqopt.export`'s) and ModelOpt's unified ones. Tensors are
    read one at a time; every one is checked against what the configuration says.

    Args:
        directory: a folder with config.json and safetensors, single or sharded.
        scan_layers: run the layers as one scan; their parameters carry a leading layer axis.
        dtype: of unquantized parameters and computation.
        verify: compare each tensor with the sha256 that `jqopt.export` wrote beside it, where there is one.

    Raises:
        CheckpointError: the folder is damaged, incomplete, or contradicts itself.
        UnsupportedError: a family, format or scheme that jqopt doesn't have.
    """
    folder = packed.open_packed(directory, verify)
    model = folder.model
    module = model.family.build(model.parsed, scan_layers, dtype)
    ids = jax.ShapeDtypeStruct(IDS, jnp.int32)
    variables: Any = jax.eval_shape(module.init, jax.random.key(0), ids)
    flat: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    places = model.family.places(model.parsed, scan_layers)
    weights = packed.weights_of(folder, places, shapes)
    if not weights:
        raise CheckpointError(f"{directory}: its configuration leaves every linear layer in floats")
    like = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), variables["params"])}
    plan = _model.plan(packed.recipe_of(folder, weights), _model.trace(module, like, ids))
    leaves = {
        place.path: packed.read_weight(folder, weights[place.path], plan.quantized[place.path], dtype)
        if place.path in weights
        else packed.read_floats(folder, place, shapes[place.path], dtype)
        for place in places
    }
    tree = {"params": traverse_util.unflatten_dict(leaves, sep="/")}
    scales = packed.read_cache(folder, places)
    try:
        _apply.check_params(plan, tree)
        _attention_ops.check_scales(plan.attention, scales)
    except PlanError as error:
        raise CheckpointError(f"{directory}: plan and parameters don't belong together: {error}") from error
    qm = QuantizedModel(module, plan, Quantized(tree, scales), ((ids,), {}))
    qm.source = model.folder
    return qm
