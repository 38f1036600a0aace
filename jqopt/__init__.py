"""jqopt: declarative quantization for JAX. Recipes in YAML, plans as data, packed weights under jax.jit."""

from jqopt import algorithms, artifacts, axis_rules, formats, kv_cache, train, transforms
from jqopt._apply import apply
from jqopt._calibrate import calibrate
from jqopt._export import export
from jqopt._load_hf import load_hf
from jqopt._model import load, plan, quantize_model, save, trace
from jqopt._qtensor import QTensor
from jqopt._quantize import quantize
from jqopt._recipe import list_recipes, load_recipe
from jqopt.errors import (
    CalibrationError,
    CheckpointError,
    JqoptError,
    PlanError,
    RecipeError,
    TraceError,
    UnsupportedError,
)
from jqopt.frontends import linen, nnx

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "JqoptError",
    "PlanError",
    "QTensor",
    "RecipeError",
    "TraceError",
    "UnsupportedError",
    "algorithms",
    "apply",
    "artifacts",
    "axis_rules",
    "calibrate",
    "export",
    "formats",
    "kv_cache",
    "linen",
    "list_recipes",
    "load",
    "load_hf",
    "load_recipe",
    "nnx",
    "plan",
    "quantize",
    "quantize_model",
    "save",
    "trace",
    "train",
    "transforms",
]
