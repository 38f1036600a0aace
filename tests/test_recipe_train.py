"""The `train` section of recipes: what its words mean, what is shipped, and what its errors say."""

from __future__ import annotations

import pytest

import jqopt
from jqopt._recipe_train import TrainOperand

SHIPPED = [name for name in jqopt.list_recipes() if name.startswith("train/")]


def test_what_is_shipped():
    names = ("fp8_block", "fp8_current", "fp8_delayed", "mxfp8", "nvfp4", "nvfp4_no_rht")
    assert tuple(SHIPPED) == tuple(f"train/{name}" for name in names)


# TransformerEngine's recipes (common/recipe/__init__.py at d0067d0d): (format, tile, scaling) of x, w and dy.
TE = {
    "nvfp4": [("nvfp4", (1, 16), "block"), ("nvfp4", (16, 16), "block"), ("nvfp4", (1, 16), "block")],
    "nvfp4_no_rht": [("nvfp4", (1, 16), "block"), ("nvfp4", (16, 16), "block"), ("nvfp4", (1, 16), "block")],
    "fp8_delayed": [("fp8", None, "delayed"), ("fp8", None, "delayed"), ("fp8_e5m2", None, "delayed")],
    "fp8_current": [("fp8", None, "current"), ("fp8", None, "current"), ("fp8_e5m2", None, "current")],
    "fp8_block": [("fp8", (1, 128), "block"), ("fp8", (128, 128), "block"), ("fp8", (1, 128), "block")],
    "mxfp8": [("mxfp8", (1, 32), "block"), ("mxfp8", (1, 32), "block"), ("mxfp8", (1, 32), "block")],
}


@pytest.mark.parametrize("name", TE)
def test_shipped_recipes_are_transformer_engines(name):
    spec = jqopt.load_recipe(f"train/{name}").train
    operands = [spec.input, spec.weight, spec.grad]
    assert [(o.format, o.tiles, o.way) for o in operands] == TE[name]
    assert [o.rounding for o in operands] == ["nearest", "nearest", "stochastic" if "nvfp4" in name else "nearest"]
    assert [o.hadamard for o in operands] == [name == "nvfp4", False, name == "nvfp4"]
    assert spec.amax_scope == "global" and spec.backward == "quantized"
    if name == "fp8_delayed":
        assert all((o.history, o.amax, o.margin) == (1024, "max", 0) for o in operands)


@pytest.mark.parametrize("name", SHIPPED)
def test_it_needs_no_data_afterwards(name):
    """The rules of a training recipe are those of quantization after training, with scales of the live activations."""
    assert not any(rule.needs_calibration for rule in jqopt.load_recipe(name).rules)


def test_toggles_of_transformer_engine():
    """NVTE_NVFP4_DISABLE_RHT, _DISABLE_STOCHASTIC_ROUNDING, _DISABLE_2D_QUANTIZATION, _4OVER6 and others are fields."""
    spec = jqopt.load_recipe(
        {
            "extends": "train/nvfp4",
            "train": {
                "input": {"format": "nvfp4", "row_scaled": True},
                "weight": {"format": "nvfp4", "four_over_six": "mae", "scale_max": 256},
                "grad": {"format": "nvfp4", "columnwise": "keep"},
            },
        }
    ).train
    assert spec.input.row_scaled and spec.weight.tiles == (1, 16) and spec.weight.four_over_six == "mae"
    assert spec.grad.columns is None and spec.grad.rounding == "nearest"
    again = jqopt.load_recipe({"rules": [{"match": "*", "weight": "fp8"}], "train": spec.to_dict()}).train
    assert again == spec and hash(again) == hash(spec)


def test_a_copy_of_its_own():
    o = TrainOperand.model_validate({"format": "nvfp4", "columnwise": "mxfp8"})
    assert (o.format, o.columns.format, o.columns.tiles) == ("nvfp4", "mxfp8", (1, 32))
    assert TrainOperand.model_validate(o.to_dict()) == o


FAULTS = {
    "train: {input: fp4}": "did you mean 'nvfp4'? Known: fp8",
    "train: {input: fp8_block}": "write {format: fp8, tile: [128, 128]}",
    "train: {input: {format: nvfp4, tile: [1, 8]}}": "write tile: [1, 16] or [16, 16]",
    "train: {input: {fromat: fp8}}": "unknown key 'fromat'; did you mean 'format'?",
    "train: {input: {format: fp8, history: 16}}": "history: only with scaling: delayed",
    "train: {input: {format: fp8, scaling: block}}": "scaling: block needs a tile",
    "train: {grad: {format: mxfp8, scale_rounding: up}}": "scale_rounding: up is for formats with a scale in e4m3",
    "train: {weight: {format: nvfp4, rounding: stochastic}}": "are for input and grad",
    "train: {input: {format: nvfp4, rounding: stochastic}}": "is for grad",
    "train: {input: {format: nvfp4, hadamard: true}}": "write 'hadamard: true' in both, or in neither",
    "train: {grad: {format: nvfp4, four_over_six: mse, rounding: stochastic}}": "goes with rounding: nearest",
    "train: {input: fp8, grad: fp8, backward: dequantized}": "leave 'grad' out",
    "train: {amax_scope: global}": "found nothing, expected formats of input, weight or grad",
    "train: {input: fp8, keep_last_blocks: -1}": "expected a whole number, 0 or more",
}


@pytest.mark.parametrize(("text", "said"), FAULTS.items(), ids=[t[7:40] for t in FAULTS])
def test_faults_name_the_line(text, said, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(f'rules:\n  - {{match: "*", weight: fp8}}\n{text}\n')
    with pytest.raises(jqopt.RecipeError) as caught:
        jqopt.load_recipe(file)
    assert "my.yaml:3: train" in str(caught.value) and said in str(caught.value)
