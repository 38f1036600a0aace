"""Recipes: the shipped ones mean what they say, files resolve in the promised order, mistakes are named."""

import dataclasses
import json
import math
import pathlib
import re

import pytest

from jqopt import _recipe, formats
from jqopt._recipe import AlgorithmSpec, Recipe, TensorSpec, list_recipes, load_recipe
from jqopt.errors import RecipeError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRAINING = sorted(f"train/{path.stem}" for path in (ROOT / "recipes/train").glob("*.yaml"))
PRESETS = [*sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")), *TRAINING]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


@dataclasses.dataclass(frozen=True)
class Site:
    """The least that a rule looks at."""

    path: str | None = "layers/0/mlp/up/kernel"
    module: str | None = "Dense"
    op: str = "dot_general"
    used_by: frozenset[str] = frozenset({"dot_general"})
    shape: tuple[int, ...] = (64, 128)
    contracted: int = 64


def recipe_of(**keys) -> Recipe:
    return load_recipe({"rules": [{"match": "*", "weight": "int8"}], **keys})


def rule_of(**keys) -> _recipe.Rule:
    return load_recipe({"rules": [{"match": "*", **keys}]}).rules[0]


def written(folder: pathlib.Path, text: str, name: str = "my.yaml") -> pathlib.Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def fault(source) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    return str(caught.value)


# --- the shipped recipes

# ModelOpt 0.47's presets (config.choices): weight and input as (format, granularity, block),
# and whether the input's scale is calibrated.
MODELOPT = {
    "int8": (("int8", "channel", None), ("int8", "tensor", None), True),  # INT8_DEFAULT
    "int8_per_token": (("int8", "channel", None), ("int8", "token", None), False),
    "int8_weight_only": (("int8", "channel", None), None, False),
    "fp8": (("fp8", "tensor", None), ("fp8", "tensor", None), True),  # FP8_DEFAULT
    "fp8_per_channel_per_token": (("fp8", "channel", None), ("fp8", "token", None), False),
    "fp8_2d_block_weight_only": (("fp8_block", "block", (128, 128)), None, False),
    "int4_block_weight_only": (("int4", "block", 128), None, False),
    "nvfp4": (("nvfp4", "block", 16), ("nvfp4", "block", 16), True),  # NVFP4_DEFAULT
    "nvfp4_weight_only": (("nvfp4", "block", 16), None, False),  # W4A16_NVFP4
    "nvfp4_mlp_only": (("nvfp4", "block", 16), ("nvfp4", "block", 16), True),
    "mxfp8": (("mxfp8", "block", 32), ("mxfp8", "block", 32), False),
    "mxfp6": (("mxfp6", "block", 32), ("mxfp6", "block", 32), False),
    "mxfp4": (("mxfp4", "block", 32), ("mxfp4", "block", 32), False),
    "mxint8": (("mxint8", "block", 32), ("mxint8", "block", 32), False),
    "w4a8_nvfp4_fp8": (("nvfp4", "block", 32), ("fp8", "tensor", None), True),
    "w4a8_mxfp4_fp8": (("mxfp4", "block", 32), ("fp8", "tensor", None), False),
}


def described(spec: TensorSpec | None):
    return None if spec is None else (spec.format, spec.granularity, spec.element_format().block)


@pytest.mark.parametrize("name", sorted(MODELOPT))
def test_preset_means_what_modelopt_means(name):
    rule = load_recipe(name).rule_for(Site())
    weight, activation, calibrated = MODELOPT[name]
    assert rule is not None
    assert described(rule.weight) == weight
    assert described(rule.input) == activation
    assert rule.needs_calibration == calibrated


def test_every_preset_is_in_the_table_and_listed():
    assert set(MODELOPT) <= set(PRESETS)
    assert list(list_recipes()) == PRESETS
    assert all(list_recipes().values())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_round_trips(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.extends == ()
    again = load_recipe(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.fingerprint == recipe.fingerprint
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe
    assert load_recipe(recipe) is recipe


def test_fingerprints_differ():
    assert len({load_recipe(name).fingerprint for name in PRESETS}) == len(PRESETS)
    assert all(len(load_recipe(name).fingerprint) == 64 for name in PRESETS[:2])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_keep_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema", reason="the development extra holds it")
    schema = _recipe.recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    data, _ = _recipe._from_yaml(path.read_text(), path.name)
    jsonschema.Draft202012Validator(schema).validate(data)


@pytest.mark.parametrize(
    "bad",
    [
        {"rules": [{"match": "*", "weigth": "int8"}]},
        {"rules": [{"match": "*", "weight": "nvpf4"}]},
        {"rules": [{"match": {"op": "dot"}, "weight": "int8"}]},
        {"rules": [{"weight": "int8"}]},
        {"schema": 2},
        {"algorithm": {"alpha": 1}},
    ],
)
def test_schema_refuses(bad):
    jsonschema = pytest.importorskip("jsonschema", reason="the development extra holds it")
    assert not jsonschema.Draft202012Validator(_recipe.recipe_schema()).is_valid(bad)


def test_schema_tells_editors_every_key():
    schema = _recipe.recipe_schema()
    assert list(schema["properties"]) == _recipe._keys(Recipe)
    objects = [schema, *(schema["$defs"][name] for name in ("Rule", "Match", "ShapeMatch", "TensorSpec"))]
    assert all(part["additionalProperties"] is False for part in objects)
    assert all("description" in key for part in objects for key in part["properties"].values())
    assert schema["$defs"]["TensorSpec"]["properties"]["format"]["enum"] == list(formats.names())


KEPT = [
    Site("embed/embedding", "Embed", "gather", frozenset({"gather"})),
    Site("embed/embedding", None, "dot_general", frozenset({"gather", "dot_general"})),  # tied head
    Site("tok", None, "gather", frozenset({"gather"})),
    Site("lm_head/kernel"),
    Site("model/lm_head/kernel"),
    Site("head", None),
    Site("head/kernel"),
    Site("embed_out/weight"),
    Site("decoder/output_layer/kernel"),
    Site("transformer/proj_out/kernel"),
    Site("layers/3/mlp/router/kernel"),
    Site("layers/3/block_sparse_moe/gate/kernel"),
    Site("layers/3/moe/gate"),
    Site("layers/3/mlp/shared_expert_gate/kernel"),
    Site("layers/3/MoeBlock_0/gate/kernel"),
    Site("layers/3/ff/kernel", "TopKRouter"),
    Site("layers/3/norm/scale", "RMSNorm"),
    Site("mtp/layers/0/mlp/up/kernel"),
    Site("layers/3/linear_attn/conv1d/kernel", "Conv", "conv"),
    Site("layers/3/linear_attn/in_proj_a/kernel"),
    Site("model/vision_tower/layers/0/mlp/fc1/kernel"),
    Site("model/visual/blocks/0/attn/qkv/kernel"),
]
QUANTIZED = [
    Site("layers/0/attn/q/kernel", "DenseGeneral"),
    Site("layers/0/mlp/up/kernel"),
    Site("layers/0/mlp/gate/kernel"),  # a SwiGLU's gate, not a router
    Site("layers/0/mlp/gate_proj/kernel"),
    Site("layers/0/feed_forward/gate/kernel"),
    Site("layers/0/moe/experts/gate/kernel", None, "ragged_dot", frozenset({"ragged_dot"}), (8, 64, 128)),
    Site("layers/0/moe/gate", None, "ragged_dot", frozenset({"ragged_dot"}), (8, 64, 128)),  # stacked experts
    Site("layers/0/moe/up", None, "dot_general", frozenset({"gather", "dot_general"}), (8, 64, 128)),
    Site("conv_1/kernel", "Conv", "conv", frozenset({"conv"}), (3, 3, 16, 32)),
    Site("w", None),
    Site("layers/0/attn/in_proj/kernel"),
    Site("multi_head_attention/q/kernel"),
    Site("heads_mixer/kernel"),
]


PARTIAL = [
    "mxfp4_mlp_weight_only", "nvfp4_experts_only", "nvfp4_mlp_only", "nvfp4_mlp_weight_only", "nvfp4_omlp_only",
]  # fmt: skip


@pytest.mark.parametrize("name", PARTIAL)
def test_recipes_for_a_part_of_the_model_keep_the_sensitive_ones_too(name):
    recipe = load_recipe(name)
    assert "*" not in {glob for rule in recipe.rules if rule.weight for glob in rule.match.path}
    for site in KEPT:
        rule = recipe.rule_for(site)
        assert rule is None or rule.keep, site


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PARTIAL])
def test_sensitive_parts_are_kept_and_only_those(name):
    recipe = load_recipe(name)
    for site in KEPT:
        rule = recipe.rule_for(site)
        assert rule is not None, site
        assert rule.keep, site
    for site in QUANTIZED:
        rule = recipe.rule_for(site)
        assert rule is not None, site
        assert rule.weight is not None, site


@pytest.mark.parametrize(
    ("path", "quantized"),
    [
        ("layers/0/mlp/up/kernel", True),
        ("layers/0/ffn/w1/kernel", True),
        ("layers/0/feed_forward/w1/kernel", True),
        ("layers/0/moe/experts/up", True),
        ("Block_0/MlpBlock_0/Dense_0/kernel", True),
        ("layers/0/attn/q/kernel", False),
        ("layers/0/mlp/router/kernel", False),
        ("lm_head/kernel", False),
    ],
)
def test_mlp_only(path, quantized):
    rule = load_recipe("nvfp4_mlp_only").rule_for(Site(path))
    assert (rule is not None and rule.weight is not None) == quantized


def test_skip_sensitive_rules_are_optional_and_name_their_place():
    inherited = [rule for rule in load_recipe("nvfp4").rules if rule.inherited]
    assert inherited
    assert all(rule.optional and rule.where.startswith("defaults/skip_sensitive.yaml:") for rule in inherited)
    main = load_recipe("nvfp4").rules[-1]
    assert (main.where, main.inherited) == ("nvfp4.yaml:6 rules[0]", False)


# --- matching


@pytest.mark.parametrize(
    ("match", "site", "expected"),
    [
        ("*", Site(), True),
        ("*", Site(path=None), False),
        ("*/lm_head/*", Site("lm_head/kernel"), True),
        ("*/lm_head/*", Site("a/b/lm_head/kernel"), True),
        ("*/lm_head/*", Site("my_lm_head/kernel"), False),
        ("layers/*/kernel", Site("layers/0/mlp/up/kernel"), True),
        ("layers/?/mlp*", Site("layers/0/mlp/up/kernel"), True),
        ("layers/[1-3]/*", Site("layers/0/mlp/up/kernel"), False),
        ("layers/[!1-3]/*", Site("layers/0/mlp/up/kernel"), True),
        ("mlp", Site(), False),
        ("*MLP*", Site(), False),
        (["*/attn/*", "*/mlp/*"], Site(), True),
        ("model.layers.*.weight", Site("model.layers.0.weight"), True),
        ({"module": "Dense"}, Site(), True),
        ({"module": "Dense*"}, Site(module="DenseGeneral"), True),
        ({"module": ["*Conv*", "Dense"]}, Site(), True),
        ({"module": "Dense"}, Site(module="DenseGeneral"), False),
        ({"module": "*"}, Site(module=None), False),
        ({"op": "conv"}, Site(), False),
        ({"op": ["conv", "dot_general"]}, Site(), True),
        ({"used_by": "gather"}, Site(), False),
        ({"used_by": ["gather", "conv"]}, Site(used_by=frozenset({"gather", "dot_general"})), True),
        ({"shape": {"rank": 2}}, Site(), True),
        ({"shape": {"rank": 3}}, Site(), False),
        ({"shape": {"min_size": 8192, "max_size": 8192}}, Site(), True),
        ({"shape": {"min_size": 8193}}, Site(), False),
        ({"shape": {"max_size": 8191}}, Site(), False),
        ({"shape": {"divisible_by": 32}}, Site(), True),
        ({"shape": {"divisible_by": 48}}, Site(), False),
        ({"shape": {"divisible_by": 16}}, Site(op="gather", contracted=0), False),
        ({"path": "*/mlp/*", "op": "conv"}, Site(), False),
        ({"path": "*/mlp/*", "module": "Dense", "op": "dot_general", "shape": {"rank": 2}}, Site(), True),
    ],
)
def test_matches(match, site, expected):
    recipe = load_recipe({"rules": [{"match": match, "weight": "int8"}]})
    assert _recipe.matches(recipe.rules[0], site) is expected
    assert (recipe.rule_for(site) is not None) is expected


def test_near_paths():
    paths = ["layers/0/mlp/up_proj/kernel", "layers/0/attn/q/kernel", "embed/embedding"]
    rule = rule_of(weight="int8")
    assert _recipe.near_paths(rule, paths) == []  # it matches them
    near = load_recipe({"rules": [{"match": "*/mlp/up_porj/*", "weight": "int8"}]}).rules[0]
    assert _recipe.near_paths(near, paths)[0] == paths[0]
    far = load_recipe({"rules": [{"match": "*/zzz/*", "weight": "int8"}]}).rules[0]
    assert _recipe.near_paths(far, paths) == []


# --- defaults of a tensor's spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("int8", ("channel", None, 8.0)),
        ({"format": "int8", "granularity": "tensor"}, ("tensor", None, 8.0)),
        ({"format": "int8", "block": 64}, ("block", 64, 8.5)),
        ("int4", ("block", 128, 4.25)),  # 4 + 32 / 128 bits a value
        ({"format": "int4", "block": 32}, ("block", 32, 5.0)),
        ({"format": "int4", "granularity": "channel"}, ("channel", None, 4.0)),
        ("uint4", ("block", 128, 4.3125)),  # and 8 bits of zero point
        ("fp8", ("tensor", None, 8.0)),
        ({"format": "fp8", "granularity": "channel"}, ("channel", None, 8.0)),
        ({"format": "fp8", "block": [64, 64]}, ("block", (64, 64), 8.0078125)),  # 8 + 32 / 4096
        ("fp8_block", ("block", (128, 128), 8.001953125)),  # 8 + 32 / 16384
        ("nvfp4", ("block", 16, 4.5)),
        ({"format": "nvfp4", "block": 32}, ("block", 32, 4.25)),
        ("mxfp8", ("block", 32, 8.25)),
        ("mxfp6", ("block", 32, 6.25)),
        ("mxfp4", ("block", 32, 4.25)),
        ("mxint8", ("block", 32, 8.25)),
        ("nf4", ("block", 64, 4.5)),
    ],
)
def test_weight_defaults(spec, expected):
    weight = rule_of(weight=spec).weight
    assert weight is not None
    granularity, block, bits = expected
    assert (weight.granularity, weight.block, weight.scaling) == (granularity, block, "static")
    assert weight.element_format().block == block
    # A matrix so large that the scales of whole rows and the tensor's weigh nothing.
    found = weight.element_format().bits_per_value(2**16, 2**16, weight.granularity)
    assert math.isclose(found, bits, abs_tol=1e-3)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("int8", ("tensor", "static")),
        ("fp8", ("tensor", "static")),
        ("fp8_e5m2", ("tensor", "static")),
        ({"format": "fp8", "scaling": "dynamic"}, ("tensor", "dynamic")),
        ({"format": "int8", "granularity": "token"}, ("token", "dynamic")),
        ({"format": "int4", "granularity": "token"}, ("token", "dynamic")),
        ({"format": "fp8", "granularity": "token", "scaling": "dynamic"}, ("token", "dynamic")),
        ({"format": "fp8", "block": 128}, ("block", "dynamic")),
        ("mxfp8", ("block", "dynamic")),
        ("mxint8", ("block", "dynamic")),
        ("nvfp4", ("block", "static")),
        ({"format": "nvfp4", "scaling": "dynamic"}, ("block", "dynamic")),
    ],
)
def test_input_defaults(spec, expected):
    rule = rule_of(weight="int8", input=spec)
    assert rule.input is not None
    assert (rule.input.granularity, rule.input.scaling) == expected
    assert rule.needs_calibration == rule.input.needs_calibration == (expected[1] == "static")


def test_weight_only_needs_no_calibration():
    assert not rule_of(weight="int8").needs_calibration


@pytest.mark.parametrize("name", formats.names())
def test_every_format_is_a_weight_and_round_trips(name):
    spec = rule_of(weight=name).weight
    assert spec is not None
    assert spec.element_format().element == formats.get(name).element
    assert TensorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.resolve("weight") == spec == TensorSpec.from_dict(name).resolve("weight")


def test_spec_errors_outside_files():
    with pytest.raises(RecipeError, match="did you mean 'nvfp4'"):
        TensorSpec.from_dict("nvpf4")
    with pytest.raises(RecipeError, match="unknown key 'scale'; did you mean 'scaling'"):
        TensorSpec.from_dict({"format": "int8", "scale": "static"})
    with pytest.raises(RecipeError, match="write 'granularity: channel'"):
        TensorSpec(format="int8", granularity="token").resolve("weight")


def test_recipes_are_frozen_and_hold_copies():
    data = {"rules": [{"match": "*", "weight": "int8"}], "algorithm": {"name": "awq", "grid": [1, 2]}}
    recipe = load_recipe(data)
    data["rules"].clear()
    data["algorithm"]["grid"].clear()
    assert len(recipe.rules) == 1
    assert recipe.algorithm[0].options == {"grid": [1, 2]}
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"
    with pytest.raises(ValueError, match="frozen"):
        recipe.rules[0].keep = True


# --- algorithms


@pytest.mark.parametrize(
    ("written_as", "expected"),
    [
        ("max", (AlgorithmSpec("max"),)),
        ({"name": "awq", "alpha_grid": 20}, (AlgorithmSpec("awq", {"alpha_grid": 20}),)),
        (["smoothquant", {"name": "gptq", "damp": 0.01}],
         (AlgorithmSpec("smoothquant"), AlgorithmSpec("gptq", {"damp": 0.01}))),
    ],
)  # fmt: skip
def test_algorithm(written_as, expected):
    recipe = recipe_of(algorithm=written_as)
    assert recipe.algorithm == expected
    assert load_recipe(recipe.to_dict()) == recipe
    assert rule_of(weight="int8", algorithm=written_as).algorithm == expected
    assert all(AlgorithmSpec.from_dict(spec.to_dict()) == spec for spec in expected)
    assert len({*expected, *expected}) == len(expected)  # hashable


def test_default_algorithm_is_max():
    assert recipe_of().algorithm == (AlgorithmSpec("max"),)
    assert rule_of(weight="int8").algorithm is None


# --- extends

PART = """\
rules:
  - {match: "*/head/*", keep: true, optional: true}
  - {match: "*/norm/*", keep: true, optional: true}
  - {match: {path: "*", op: conv}, weight: int8}
  - {match: "*", weight: fp8}
"""


def order(recipe: Recipe) -> list[str]:
    return [rule.where.rpartition("/")[2] for rule in recipe.rules]


def test_own_rules_then_extended_then_own_fallbacks_then_extended_fallbacks(tmp_path):
    written(tmp_path, PART, "part.yaml")
    mine = """\
extends: [part.yaml]
rules:
  - {match: "*/mlp/*", weight: nvfp4}
  - {match: {path: "*", op: dot_general}, weight: int4}
"""
    recipe = load_recipe(written(tmp_path, mine))
    assert order(recipe) == [
        "my.yaml:3 rules[0]",
        "part.yaml:2 rules[0]",
        "part.yaml:3 rules[1]",
        "my.yaml:4 rules[1]",
        "part.yaml:4 rules[2]",
        "part.yaml:5 rules[3]",
    ]
    assert [rule.inherited for rule in recipe.rules] == [False, True, True, False, True, True]
    assert recipe.rule_for(Site("head/kernel")).keep
    assert recipe.rule_for(Site("x/kernel")).weight.format == "int4"
    assert recipe.rule_for(Site("x/kernel", op="conv")).weight.format == "int8"
    assert load_recipe(recipe.to_dict()) == recipe


def test_own_catch_all_hides_the_extended_one(tmp_path):
    written(tmp_path, PART, "part.yaml")
    recipe = load_recipe(written(tmp_path, 'extends: [part.yaml]\nrules: [{match: "*", weight: int4}]\n'))
    assert order(recipe) == ["part.yaml:2 rules[0]", "part.yaml:3 rules[1]", "my.yaml:2 rules[0]"]


def test_a_rule_with_the_same_match_replaces_the_extended_one(tmp_path):
    written(tmp_path, PART, "part.yaml")
    mine = 'extends: [part.yaml]\nrules: [{match: "*/head/*", weight: int4}]\n'
    recipe = load_recipe(written(tmp_path, mine))
    assert "part.yaml:2 rules[0]" not in order(recipe)
    assert recipe.rule_for(Site("head/kernel")).weight.format == "int4"


def test_catch_all_narrowed_by_module_or_shape_is_no_fallback(tmp_path):
    written(tmp_path, PART, "part.yaml")
    mine = "extends: [part.yaml]\nrules: [{match: {module: Dense}, weight: int4}]\n"
    assert order(load_recipe(written(tmp_path, mine)))[0] == "my.yaml:2 rules[0]"


def test_extended_files_keep_their_order_depth_first_and_count_once(tmp_path):
    def part(name: str, extends: str = "") -> None:
        written(tmp_path, f"{extends}rules:\n  - {{match: '*/{name}/*', weight: int8}}\n", f"{name}.yaml")

    part("d")
    part("b", "extends: [d.yaml]\n")
    part("c", "extends: [d.yaml]\n")
    recipe = load_recipe(written(tmp_path, "extends: [b.yaml, c.yaml]\n", "a.yaml"))
    assert [rule.match.path[0] for rule in recipe.rules] == ["*/b/*", "*/d/*", "*/c/*"]


def test_algorithm_is_inherited_unless_given(tmp_path):
    written(tmp_path, "algorithm: gptq\n" + PART, "part.yaml")
    assert load_recipe(written(tmp_path, "extends: [part.yaml]\n")).algorithm == (AlgorithmSpec("gptq"),)
    own = load_recipe(written(tmp_path, "extends: [part.yaml]\nalgorithm: max\n"))
    assert own.algorithm == (AlgorithmSpec("max"),)


def test_paths_in_extends_are_relative_to_their_file(tmp_path, monkeypatch):
    written(tmp_path, PART, "parts/deep.yaml")
    written(tmp_path, "extends: [deep.yaml]\n", "parts/part.yaml")
    path = written(tmp_path, "extends: parts/part.yaml\n")
    assert len(load_recipe(path).rules) == 4
    monkeypatch.chdir(tmp_path)
    assert len(load_recipe("my.yaml").rules) == 4
    assert len(load_recipe({"extends": ["parts/deep.yaml"]}).rules) == 4
    assert len(load_recipe(Recipe.model_validate({"extends": ["parts/deep.yaml"]})).rules) == 4


def test_extending_a_preset_changes_what_it_says(tmp_path):
    mine = 'extends: [nvfp4]\nrules: [{match: "*/attn/*", weight: fp8, input: fp8}]\n'
    recipe = load_recipe(written(tmp_path, mine))
    assert recipe.name == "my"
    assert recipe.rule_for(Site("layers/0/attn/q/kernel")).weight.format == "fp8"
    assert recipe.rule_for(Site()).weight.format == "nvfp4"
    assert recipe.rule_for(Site("lm_head/kernel")).keep


def test_extending_in_a_circle(tmp_path):
    written(tmp_path, "name: b\nextends: [my.yaml]\n", "b.yaml")
    text = fault(written(tmp_path, "extends:\n  - b.yaml\n"))
    assert "b.yaml:2: extends[0]: the files extend each other in a circle: " in text
    assert text.count("my.yaml") == 2
    assert "circle" in fault(written(tmp_path, "extends: [self.yaml]\n", "self.yaml"))


def test_extending_what_is_not_there(tmp_path):
    text = fault(written(tmp_path, "name: x\nextends:\n  - defaults/skip_sensitiv\n"))
    assert "my.yaml:3: extends[0]: no recipe 'defaults/skip_sensitiv'" in text
    assert "did you mean 'defaults/skip_sensitive'?" in text
    assert all(name in text for name in PRESETS)
    written(tmp_path, PART, "part.yaml")
    text = fault(written(tmp_path, "extends: prat.yaml\n"))
    assert "my.yaml:1: extends: no file" in text
    assert "did you mean 'part.yaml'?" in text


def test_an_error_in_an_extended_file_names_that_file(tmp_path):
    written(tmp_path, 'name: p\nrules:\n  - {match: "*", wieght: int8}\n', "part.yaml")
    assert "part.yaml:3: rules[0].wieght: unknown key" in fault(written(tmp_path, "extends: [part.yaml]\n"))


def test_hidden_rules(tmp_path):
    first = 'rules:\n  - {match: "*", weight: int8}\n  - {match: "*/head/*", keep: true}\n'
    text = fault(written(tmp_path, first))
    assert "my.yaml:3 rules[1]: this rule can never match, because " in text
    assert "my.yaml:2 rules[0] comes first" in text
    same = 'rules: [{match: "*/a/*", weight: int8}, {match: "*/a/*", keep: true, optional: true}]\n'
    assert "can never match" in fault(written(tmp_path, same))
    fine = 'rules: [{match: {op: conv}, weight: int8}, {match: "*/head/*", weight: int4}]\n'
    assert len(load_recipe(written(tmp_path, fine)).rules) == 2


def test_own_rule_hidden_by_an_extended_one(tmp_path):
    written(tmp_path, 'rules: [{match: {op: conv}, keep: true}, {match: "*/x/*", keep: true}]\n', "part.yaml")
    mine = "extends: [part.yaml]\nrules: [{match: {op: conv}, weight: int8}]\n"
    text = fault(written(tmp_path, mine))
    assert "my.yaml:2 rules[0]: this rule can never match" in text
    assert "part.yaml:1 rules[0] comes first" in text


# --- mistakes: what the file says below `name: x`, the line named, and what the message must hold

INT8 = '\nrules: [{match: "*", weight: int8}]'


def rule(text: str) -> str:
    return f'rules:\n  - match: "*"\n    {text}'


def both(weight: str, activation: str) -> str:
    return rule(f"weight: {weight}\n    input: {activation}")


MISTAKES = [
    # keys
    (rule("weigth: int8"), 4, "rules[0].weigth: unknown key 'weigth'; did you mean 'weight'?"),
    ("nme: y" + INT8, 2, "unknown key 'nme'; did you mean 'name'?"),
    (rule("weight: {format: int8, granularty: channel}"), 4, "did you mean 'granularity'?"),
    (rule("weight: {format: int8, scale: static}"), 4, "did you mean 'scaling'?"),
    (rule("weight: {format:int8}"), 4, "put a space after the colon: 'format: int8'"),
    (rule("weight: {frmt: int8}"), 4, "unknown key 'frmt'; did you mean 'format'?"),
    (rule("weight: {block: 32}"), 4, "without 'format'; write {format: int8, ...}"),
    (rule("weight: int8\n    activation: int8"), 5, "Known: match, keep, weight, input, algorithm, backend, optional"),
    ('rules:\n  - {match: {shape: {rnk: 2}}, weight: int8}', 3, "did you mean 'rank'?"),
    (rule("weight: int8\n    weight: int4"), 5, "the key 'weight' stands twice, first in line 4"),
    ("rules:\n  - {weight: int8}", 3, "rules[0]: the key 'match' is missing"),
    ("1: 2" + INT8, 2, "a key must be a word, found '1'"),
    ("[a, b]: 2" + INT8, 2, "a key must be a word"),
    # formats
    (rule("weight: nvpf4"), 4, "rules[0].weight: unknown format 'nvpf4'; did you mean 'nvfp4'? Known: int8"),
    (rule("weight: NVFP4"), 4, "did you mean 'nvfp4'?"),
    (rule("weight: float8_e4m3fn"), 4, "did you mean 'fp8'?"),
    (rule("weight: float8_e5m2"), 4, "did you mean 'fp8_e5m2'?"),
    (rule("weight: int9"), 4, "did you mean 'int8'?"),
    (rule("weight: fp4"), 4, "did you mean 'nvfp4'?"),
    (rule("weight: bfloat16"), 4, "in high precision write 'keep: true'"),
    (rule("weight: {format: zzz}"), 4, "rules[0].weight.format: unknown format 'zzz'. Known: int8"),
    (rule("weight: 8"), 4, "found the number 8, expected the name of a format"),
    (rule("weight: [int8]"), 4, "found a list ['int8'], expected the name of a format"),
    (rule("weight: true"), 4, "found the truth value true, expected the name of a format"),
    # granularity, scaling, block
    (rule("weight: {format: int8, granularity: chanel}"), 4, "did you mean 'channel'?"),
    (rule("weight: {format: int8, granularity: token}"), 4, "write 'granularity: channel'"),
    (both("int8", "{format: int8, granularity: channel}"), 5, "write 'granularity: token'"),
    (rule("weight: {format: int8, granularity: block}"), 4, "has no block of its own; write its size"),
    (rule("weight: {format: nvfp4, granularity: channel}"), 4, "its e4m3 scales belong to blocks of 16"),
    (both("int8", "{format: mxfp8, granularity: token}"), 5, "its e8m0 scales belong to blocks of 32"),
    (rule("weight: {format: int8, scaling: dynamic}"), 4, "leave 'scaling' out of 'weight'"),
    (both("int8", "{format: int8, scaling: dynamc}"), 5, "did you mean 'dynamic'?"),
    (both("int8", "{format: int8, granularity: token, scaling: static}"), 5, "the scale of each token"),
    (both("mxfp4", "{format: mxfp4, scaling: static}"), 5, "the scale of each mxfp4 block follows"),
    (rule("weight: {format: int8, block: 0}"), 4, "found the number 0, expected a positive whole number"),
    (rule("weight: {format: int8, block: -16}"), 4, "found the number -16"),
    (rule("weight: {format: int8, block: 0.3}"), 4, "found the number 0.3"),
    (rule("weight: {format: int8, block: true}"), 4, "found the truth value true"),
    (rule('weight: {format: int8, block: "16"}'), 4, "found the text '16'"),
    (rule("weight: {format: int8, block: [1, 2, 3]}"), 4, "or a pair of them [rows, contracted]"),
    (rule("weight: {format: int8, block: 32, granularity: tensor}"), 4, "block: 32 contradicts"),
    (both("int8", "uint4"), 5, "'uint4' is asymmetric"),
    (both("int8", "nf4"), 5, "'nf4' is a table of values"),
    (both("int8", "int4"), 5, "write {format: int4, granularity: token}"),
    (both("int8", "{format: int8, block: 128}"), 5, "write {format: int8, granularity: token}"),
    (both("fp8_block", "fp8_block"), 5, "on its neighbours; write a single number, such as 'block: 128'"),
    # what a rule says
    (rule("keep: true\n    weight: int8"), 3, "rules[0]: keep: true leaves the site in high precision"),
    (rule("keep: true\n    input: int8"), 3, "yet 'input' is given"),
    (rule("keep: true\n    algorithm: max"), 3, "yet 'algorithm' is given"),
    (rule("optional: true"), 3, "the rule does nothing; write 'keep: true', or 'weight'"),
    (rule("weight:"), 3, "the rule does nothing"),
    (rule("input: int8"), 3, "'input' without 'weight': an input is quantized for the product"),
    (rule("keep: yes"), 4, "found the text 'yes', expected true or false; write true"),
    (rule("keep: off"), 4, "expected true or false; write false"),
    (rule("keep: 1"), 4, "found the number 1, expected true or false"),
    (rule("keep: true"), None, "no rule gives a format to a weight, so nothing would be quantized"),
    ("rules: []", None, "nothing would be quantized"),
    # patterns
    ('rules:\n  - match: ".*/mlp/.*"\n    weight: int8', 3, "looks like a regular expression"),
    ('rules:\n  - match: ".*/mlp/.*"\n    weight: int8', 3, "write '*/mlp/*'"),
    ('rules:\n  - match: "^layers"\n    weight: int8', 3, "looks like a regular expression"),
    ("rules:\n  - match: 'layers/\\d+/mlp'\n    weight: int8", 3, "write 'layers/*/mlp'"),
    ('rules:\n  - match: "(q|k|v)_proj"\n    weight: int8', 3, "looks like a regular expression"),
    ('rules:\n  - match: "*/[0-3/*"\n    weight: int8', 3, "'[' is never closed"),
    ('rules:\n  - match: "["\n    weight: int8', 3, "'[' is never closed"),
    ('rules:\n  - match: "*/{up,down}/*"\n    weight: int8', 3, "a list of patterns: ['*/up/*', '*/down/*']"),
    ('rules:\n  - match: " */mlp/*"\n    weight: int8', 3, "with a space at an end"),
    ('rules:\n  - match: ""\n    weight: int8', 3, "found the text '', expected text"),
    ("rules:\n  - match: []\n    weight: int8", 3, "found an empty list"),
    ("rules:\n  - match: {}\n    weight: int8", 3, 'write match: "*" for any'),
    ("rules:\n  - match: 3\n    weight: int8", 3, "found the number 3, expected a pattern"),
    ("rules:\n  - match:\n    weight: int8", 3, "found nothing, expected a pattern"),
    ('rules:\n  - match: {module: "[", op: conv}\n    weight: int8', 3, "rules[0].match.module: found '['"),
    ("rules:\n  - match: {op: dotgeneral}\n    weight: int8", 3, "did you mean 'dot_general'?"),
    ("rules:\n  - match: {op: [conv, einsum]}\n    weight: int8", 3, "'einsum'; did you mean 'dot_general'?"),
    ("rules:\n  - match: {op: dot_general_x}\n    weight: int8", 3, "did you mean 'dot_general'?"),
    ("rules:\n  - match: {used_by: embedding}\n    weight: int8", 3, "did you mean 'gather'?"),
    ("rules:\n  - match: {op: qqq}\n    weight: int8", 3, "unknown operation 'qqq'. Known: dot_general"),
    ("rules:\n  - match: {shape: 3}\n    weight: int8", 3, "with the keys rank, min_size, max_size"),
    ("rules:\n  - match: {shape: {rank: 0}}\n    weight: int8", 3, "expected a positive whole number"),
    # the shape of the file
    ('rules:\n  match: "*"\n  weight: int8', 2, "found one rule, expected a list of rules; begin each"),
    ('rules:\n  "*": int8', 2, "found a mapping, expected a list of rules"),
    ("rules: int8", 2, "found the text 'int8', expected a list of rules"),
    ("rules:\n  - int8", 3, "rules[0]: found the text 'int8', expected a mapping with the keys match, keep"),
    # attention
    ("kv_cache: fp9" + INT8, 2, "kv_cache: unknown format 'fp9'; did you mean 'fp8'?"),
    ("kv_cache: 8" + INT8, 2, "kv_cache: found the number 8, expected the name of a format"),
    ("kv_cache: {scaling: cast}" + INT8, 2, "without 'format'; write {format: fp8, ...}"),
    ("kv_cache: {format: fp8, afine: true}" + INT8, 2, "unknown key 'afine'; did you mean 'affine'?"),
    ("kv_cache: {format: fp8, scaling: casts}" + INT8, 2, "one of static, dynamic, cast; did you mean 'cast'?"),
    ("kv_cache: {format: fp8, granularity: channel}" + INT8, 2, "one of tensor, token, block"),
    ("kv_cache: {format: int8, scaling: cast}" + INT8, 2, "write 'scaling: dynamic', or fp8 or nvfp4"),
    ("kv_cache: {format: mxfp4, scaling: cast}" + INT8, 2, "write 'scaling: dynamic', or fp8 or nvfp4"),
    ("kv_cache: {format: int8, granularity: token, scaling: static}" + INT8, 2, "write 'scaling: dynamic'"),
    ("kv_cache: int4" + INT8, 2, "write {format: int4, granularity: token}"),
    ("kv_cache: {format: fp8, affine: yes}" + INT8, 2, "expected true or false; write true"),
    ("attention: fp8" + INT8, 2, "expected a mapping with the keys q, k, v, p"),
    ("attention: {}" + INT8, 2, "expected formats of q, k, v or p"),
    ("attention: {w: fp8}" + INT8, 2, "unknown key 'w'. Known: q, k, v, p"),
    ("attention: {q: {format: fp8, affine: true}}" + INT8, 2, "affine is for keys and values"),
    ("attention: {p: {format: fp8, rotate: true}}" + INT8, 2, "write 'rotate: true' in kv_cache or attention.k"),
    ("kv_cache: fp8\nattention: {v: nvfp4}" + INT8, 1, "contradicts kv_cache, which says {format: fp8"),
    ("schema: 2" + INT8, 2, "this recipe is of schema 2, and this jqopt reads schema 1; use a newer jqopt"),
    ('schema: "1"' + INT8, 2, "write schema: 1"),
    ("schema: true" + INT8, 2, "write schema: 1"),
    ("schema: 0" + INT8, 2, "write schema: 1"),
    ("description: 8" + INT8, 2, 'write it in quotes: "8"'),
    ("extends: [1]" + INT8, 2, 'write it in quotes: "1"'),
    # algorithms
    ("algorithm:" + INT8, 2, "found nothing, expected the name of an algorithm"),
    ("algorithm: []" + INT8, 2, "found nothing, expected the name of an algorithm"),
    ("algorithm: 3" + INT8, 2, "found the number 3, expected text"),
    ("algorithm: {alpha: 3}" + INT8, 2, "without 'name'"),
    ("algorithm: {name: awq, options: {alpha: 3}}" + INT8, 2, "options stand beside 'name'"),
    ("algorithm: {name: awq, alpha: .inf}" + INT8, 2, "option alpha: found the number inf"),
    ("algorithm: {name: awq, alpha: [1, [.nan]]}" + INT8, 2, "option alpha[1][0]: found the number nan"),
    (rule("weight: int8\n    algorithm: {alpha: 3}"), 5, "rules[0].algorithm: found a mapping"),
    # YAML
    ("rules:\n  - match: */lm_head/*\n    keep: true", 3, 'must be quoted: "*/mlp/*"'),
    ("rules:\n  - match: *mlp\n    keep: true", 3, 'must be quoted: "*/mlp/*"'),
    ("rules:\n\t- match: x", 3, "indent with spaces, not tabs"),
    ("rules: [", 3, "expected the node content"),
    ("rules: []\n---\nname: y", 3, "one recipe to a file"),
    ("rules: !!python/object/apply:os.system [echo]", 2, "has no meaning in a recipe"),
    ("rules: !special x", 2, "the tag '!special' has no meaning in a recipe"),
    ("rules: &a [*a]", 2, "too much or too deep for a recipe"),
    ('description: !!int "x"', 2, "'x' is no int"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "line", "expected"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistake(body, line, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, f"name: x\n{body}\n")
    text = fault("my.yaml")
    assert expected in text
    assert text.startswith("my.yaml: " if line is None else f"my.yaml:{line}: ")


def test_every_fault_is_told_at_once(tmp_path):
    text = fault(written(tmp_path, both("nvpf4", "int9")))
    assert text.startswith("2 faults:\n")
    assert "my.yaml:3: rules[0].weight: " in text
    assert "my.yaml:4: rules[0].input: " in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found nothing, expected a mapping with the keys schema, name"),
        ("- {match: '*', weight: int8}", "found a list, expected a mapping"),
        ("int8", "found the text 'int8', expected a mapping"),
        ("name: 8" + INT8, 'my.yaml:1: name: found the number 8, expected text; write it in quotes: "8"'),
        ("\0", "this is not YAML"),
        ("[" * 5000, "this is not YAML"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)),
         "too much or too deep"),
    ],
    ids=["empty", "list", "word", "number", "nul", "deep", "laughs"],
)  # fmt: skip
def test_not_a_recipe(text, expected, tmp_path):
    assert expected in fault(written(tmp_path, text))


def test_plain_words_follow_yaml_1_2(tmp_path):
    text = "name: on\ndescription: 2024-01-01\n"
    text += "algorithm: {name: gptq, damp: 1e-3, n: 0x10, s: 1:30, z: 012, b: no}"
    recipe = load_recipe(written(tmp_path, text + INT8))
    assert (recipe.name, recipe.description) == ("on", "2024-01-01")
    assert recipe.algorithm[0].options == {"damp": 0.001, "n": 16, "s": "1:30", "z": "012", "b": "no"}
    again = load_recipe(written(tmp_path, recipe.to_yaml(), "again.yaml"))
    assert again == recipe


def test_text_that_looks_like_a_number_survives_writing(tmp_path):
    recipe = recipe_of(name="1e-3", description="true", algorithm={"name": "x", "word": "0x10", "other": "~"})
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe


def test_files_that_cannot_be_read(tmp_path):
    text = fault(tmp_path / "none.yaml")
    assert "no file" in text
    assert "Shipped recipes: " in text
    assert "'nvfp4' is a shipped recipe" in fault("nvfp4.yaml")
    assert "cannot be read as a text file" in fault(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "in UTF-8" in fault(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + INT8.encode())
    assert load_recipe(tmp_path / "bom.yaml").name == "bom"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nvfp", "no recipe 'nvfp'; did you mean 'nvfp4'? Shipped: fp8, "),
        ("NVFP4", "did you mean 'nvfp4'?"),
        ("name: x\nrules: []", "found the text of a recipe"),
        (None, "found nothing, expected a recipe's name, a path, a mapping or a Recipe"),
        ([], "found a list []"),
        ("defaults/skip_sensitive", "a file of 'keep' rules only is for 'extends'"),
        ({"name": "d", "rules": [{"match": "*", "weight": 3}]}, "recipe 'd': rules[0].weight: found"),
        ({"rules": [{"match": "*", "weight": "int8"}], 3: 4}, "unknown key 3"),
        ({"rules": [{"match": "*", "weight": "int8", "algorithm": {"name": "x", "f": print}}]}, "option f:"),
    ],
)  # fmt: skip
def test_sources_that_are_none(source, expected):
    assert expected in fault(source)


def test_a_recipe_made_in_python_is_checked():
    idle = Recipe.model_validate({"name": "idle", "rules": [{"match": "*", "keep": True}]})
    assert "recipe 'idle': no rule gives a format to a weight" in fault(idle)
    rules = [{"match": "*", "weight": "int8"}, {"match": "*/x/*", "keep": True}]
    assert "can never match" in fault(Recipe.model_validate({"rules": rules}))
    with pytest.raises(ValueError, match="did you mean 'nvfp4'"):
        Recipe.model_validate({"rules": [{"match": "*", "weight": "nvpf4"}]})


def test_rules_in_a_dict_name_their_place():
    recipe = recipe_of(name="mine")
    assert recipe.rules[0].where == "recipe 'mine' rules[0]"
    assert recipe_of().rules[0].where == "recipe rules[0]"
    assert recipe_of().rules[0] == recipe.rules[0]


def test_recipes_are_found_beside_the_package_or_in_it(tmp_path, monkeypatch):
    assert str(_recipe._recipes_dir()) == str(ROOT / "recipes")
    package = tmp_path / "jqopt"
    (package / "recipes" / "defaults").mkdir(parents=True)
    monkeypatch.setattr(_recipe.importlib.resources, "files", lambda name: tmp_path / name)
    monkeypatch.setattr(_recipe, "__file__", str(package / "_recipe.py"))
    with pytest.raises(RecipeError, match="this installation is incomplete"):
        _recipe._recipes_dir()
    (package / "recipes" / "defaults" / "skip_sensitive.yaml").write_text("rules: []\n")
    assert _recipe._recipes_dir() == package / "recipes"


# --- docs/recipes.md tells the truth

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```\n(?:```text\n(.*?)```)?", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(("text", "said"), EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_examples_of_the_page(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, text, "recipe.yaml")
    if said:
        assert fault("recipe.yaml") == said.rstrip("\n")
    else:
        assert load_recipe("recipe.yaml").rules


def test_the_page_names_everything():
    names = [*PRESETS, *formats.names(), *_recipe.OPS, *_recipe.GRANULARITIES]
    models = (_recipe.OperandSpec, _recipe.AttentionSpec)
    for model in (Recipe, _recipe.Rule, _recipe.Match, _recipe.ShapeMatch, TensorSpec, *models):
        names += _recipe._keys(model)
    assert [name for name in names if f"`{name}" not in PAGE] == []


# --- attention


def test_operands_of_kv_cache_and_attention():
    recipe = load_recipe({"kv_cache": {"format": "nvfp4", "rotate": True}, "attention": {"q": "fp8", "p": "fp8"}})
    told = {role: (s.format, s.granularity, s.scaling, s.rotate) for role, s in recipe.operands.items()}
    assert told == {
        "q": ("fp8", "tensor", "static", False), "k": ("nvfp4", "block", "static", True),
        "v": ("nvfp4", "block", "static", False), "p": ("fp8", "tensor", "static", False),
    }  # fmt: skip
    assert list(told) == ["q", "k", "v", "p"]
    assert load_recipe({"kv_cache": "mxfp8"}).operands["k"].scaling == "dynamic"
    assert (
        load_recipe({"kv_cache": "fp8", "attention": {"k": "fp8"}}).operands
        == load_recipe({"kv_cache": "fp8"}).operands
    )


def test_own_operands_come_before_extended_ones(tmp_path):
    written(tmp_path, "attention: {k: {format: int8, granularity: token}}\nextends: [defaults/mha_fp8]\n")
    recipe = load_recipe(tmp_path / "my.yaml")
    assert {r: s.format for r, s in recipe.operands.items()} == {"q": "fp8", "k": "int8", "v": "fp8", "p": "fp8"}
    assert recipe.operands["k"].where.endswith("my.yaml:1 attention.k")
    assert recipe.operands["v"].where == "defaults/mha_fp8.yaml:5 attention.v"
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # FP8_KV, its *_cast YAML, FP8_AFFINE_KV, NVFP4_KV, its *_cast YAML, NVFP4_AFFINE_KV, NVFP4_KV_ROTATE
        ("kv_fp8", ("fp8", "static", False, False)),
        ("kv_fp8_cast", ("fp8", "cast", False, False)),
        ("kv_fp8_affine", ("fp8", "static", True, False)),
        ("kv_nvfp4", ("nvfp4", "static", False, False)),
        ("kv_nvfp4_cast", ("nvfp4", "cast", False, False)),
        ("kv_nvfp4_affine", ("nvfp4", "static", True, False)),
        ("kv_nvfp4_rotate", ("nvfp4", "static", False, True)),
    ],
)
def test_parts_for_caches(name, expected):
    recipe = load_recipe(f"defaults/{name}")
    k, v = (recipe.operands[role] for role in "kv")
    assert (k.format, k.scaling, k.affine, k.rotate) == expected
    assert (v.format, v.scaling, v.affine, v.rotate) == (*expected[:3], False)
    assert recipe.rules == () and list(recipe.operands) == ["k", "v"]


@pytest.mark.parametrize(("name", "weights", "operands"), [
    ("fp8_kv_fp8", "fp8", "kv"), ("nvfp4_kv_fp8", "nvfp4", "kv"), ("nvfp4_fp8_mha", "nvfp4", "qkvp"),
])  # fmt: skip
def test_presets_with_attention(name, weights, operands):
    recipe, plain = load_recipe(name), load_recipe(weights)
    assert [rule.to_dict() for rule in recipe.rules] == [rule.to_dict() for rule in plain.rules]
    assert "".join(recipe.operands) == operands
    assert {spec.format for spec in recipe.operands.values()} == {"fp8"}
    assert recipe.fingerprint != plain.fingerprint
