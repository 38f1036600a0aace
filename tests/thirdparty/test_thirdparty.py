"""Flax models written by others, unmodified, with random weights: every kernel is found, and they run quantized.

Run with `pytest -m thirdparty` where `requirements.txt` beside this file is installed. A package that isn't there
is skipped with its name. The models are small: one or two layers, widths that are no powers of two where allowed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jqopt

pytestmark = [
    pytest.mark.thirdparty,
    # These packages date from older releases of JAX and Flax; their warnings aren't ours.
    pytest.mark.filterwarnings("ignore"),
]

TOKENS = np.arange(1, 25, dtype=np.int32).reshape(2, 12)


class Case(NamedTuple):
    """A model with its parameters (None for NNX), one batch, and keywords of every call."""

    model: Any
    params: Any
    batch: Any
    keywords: Mapping[str, Any] = MappingProxyType({})
    idle: tuple[str, ...] = ()  # parameters of two or more axes that no product reads, with good reason


def need(name: str) -> Any:
    """The module, or a skip that says which package is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        pytest.skip(f"{name} needs the package {e.name}: pip install -r tests/thirdparty/requirements.txt")


# ------------------------------------------------------------------------------------------ transformers


def hugging_face(name: str, batch: dict[str, Any], idle: tuple[str, ...] = (), **config: Any) -> Case:
    """A Flax model of transformers with random weights, as its Linen module."""
    transformers = need("transformers")
    settings = getattr(transformers, config.pop("config"))(**config)
    model = getattr(transformers, name)(settings, seed=0)
    variables = {"params": jax.tree.map(jnp.asarray, model.params)}
    return Case(model.module, variables, batch, {"deterministic": True, "return_dict": False}, idle)


def text(**more: Any) -> dict[str, Any]:
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    return {"input_ids": TOKENS, "attention_mask": np.ones((2, 12), np.int32), "position_ids": positions, **more}


def bert() -> Case:
    return hugging_face(
        "FlaxBertModel", text(token_type_ids=np.zeros((2, 12), np.int32), head_mask=None), config="BertConfig",
        vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=16,
    )  # fmt: skip


def gpt2() -> Case:
    return hugging_face(
        "FlaxGPT2LMHeadModel", text(), config="GPT2Config", vocab_size=60, n_positions=16, n_embd=48, n_layer=2,
        n_head=4,
    )  # fmt: skip


def llama() -> Case:
    return hugging_face(
        "FlaxLlamaForCausalLM", text(), config="LlamaConfig", vocab_size=60, hidden_size=64, intermediate_size=80,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip


def mistral() -> Case:
    return hugging_face(
        "FlaxMistralForCausalLM", text(), config="MistralConfig", vocab_size=60, hidden_size=64, intermediate_size=80,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=8,
    )  # fmt: skip


def whisper() -> Case:
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    batch = {"input_features": np.asarray(jax.random.normal(jax.random.key(3), (2, 20, 24)))}
    batch |= {"decoder_input_ids": TOKENS[:, :6], "decoder_attention_mask": np.ones((2, 6), np.int32)}
    batch |= {"decoder_position_ids": positions}
    return hugging_face(
        "FlaxWhisperForConditionalGeneration", batch, config="WhisperConfig", vocab_size=60, num_mel_bins=20,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, d_model=48,
        encoder_ffn_dim=80, decoder_ffn_dim=80, max_source_positions=12, max_target_positions=16,
        idle=("model/encoder/embed_positions/embedding",), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip


def vit() -> Case:
    pixels = np.asarray(jax.random.normal(jax.random.key(3), (2, 16, 16, 3)))
    return hugging_face(
        "FlaxViTForImageClassification", {"pixel_values": pixels}, config="ViTConfig", hidden_size=48,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, image_size=16, patch_size=4,
        idle=("vit/embeddings/cls_token", "vit/embeddings/position_embeddings"),
    )  # fmt: skip


# ----------------------------------------------------------------------------------- flaxmodels, jax-resnet


def images() -> np.ndarray:
    return np.asarray(jax.random.uniform(jax.random.key(4), (2, 32, 32, 3)))


def flaxmodels_resnet() -> Case:
    model = need("flaxmodels").ResNet18(output="logits", pretrained=None, normalize=False, num_classes=10)
    return Case(model, model.init(jax.random.key(0), images(), train=False), images(), {"train": False})


def flaxmodels_vgg() -> Case:
    vgg = need("flaxmodels").VGG16
    model = vgg(output="logits", pretrained=None, normalize=False, num_classes=10, include_head=False)
    return Case(model, model.init(jax.random.key(0), images(), train=False), images(), {"train": False})


def jax_resnet() -> Case:
    model = need("jax_resnet").ResNet18(n_classes=10)
    variables = model.init(jax.random.key(0), images())
    return Case(model, variables, images())


# ---------------------------------------------------------------------------------------- tunix (Flax NNX)

DECODER = {
    "num_layers": 2, "embed_dim": 48, "hidden_dim": 80, "num_heads": 4, "head_dim": 16, "num_kv_heads": 2,
}  # fmt: skip


def tunix(family: str, model: str, *, tokens: str = "input_tokens", **config: Any) -> Case:
    """A decoder of google-tunix, as it stands."""
    from flax import nnx

    home = need(f"tunix.models.{family}.model")
    settings = home.ModelConfig(**DECODER, **config)
    module = getattr(home, model)(settings, rngs=nnx.Rngs(0))
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    mask = np.broadcast_to(np.tril(np.ones((12, 12), bool)), (2, 12, 12))
    return Case(module, None, {tokens: TOKENS, "positions": positions, "cache": None, "attention_mask": mask})


def tunix_llama3() -> Case:
    return tunix("llama3", "Llama3", vocab_size=60, rope_theta=10_000, norm_eps=1e-5)


def tunix_llama3_tied() -> Case:
    return tunix("llama3", "Llama3", vocab_size=60, rope_theta=10_000, norm_eps=1e-5, weight_tying=True)


def tunix_qwen2() -> Case:
    return tunix("qwen2", "Qwen2", vocab_size=60, rope_theta=10_000, norm_eps=1e-5)


def tunix_qwen3() -> Case:
    return tunix("qwen3", "Qwen3", vocab_size=60, rope_theta=10_000, norm_eps=1e-5)


def tunix_qwen3_moe() -> Case:
    return tunix(
        "qwen3", "Qwen3", vocab_size=60, rope_theta=10_000, norm_eps=1e-5, num_experts=4, num_experts_per_tok=2
    )


def tunix_gemma3() -> Case:
    return tunix("gemma3", "Gemma3", num_embed=60, sliding_window_size=8, tokens="last_tokens", param_dtype=jnp.float32)


CASES: tuple[Callable[[], Case], ...] = (
    bert, gpt2, llama, mistral, whisper, vit, flaxmodels_resnet, flaxmodels_vgg, jax_resnet,
    tunix_llama3, tunix_llama3_tied, tunix_qwen2, tunix_qwen3, tunix_qwen3_moe, tunix_gemma3,
)  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda build: build.__name__)
def case(request: pytest.FixtureRequest):
    """Built once for all tests; promotion as these packages expect it, not strict as jqopt's own code is tested."""
    with jax.numpy_dtype_promotion("standard"):
        yield request.param()


def traced(case: Case) -> jqopt.Graph:
    args = () if case.params is None else (case.params,)
    batch = (case.batch, {}) if not isinstance(case.batch, dict) else (None, case.batch)
    positional = () if batch[0] is None else (batch[0],)
    return jqopt.trace(case.model, *args, *positional, **batch[1], **case.keywords)


def recipe(weight: str, input: str | None) -> dict[str, Any]:
    """Every product quantized; tables that are looked up stay as they are."""
    rule: dict[str, Any] = {"match": {"path": "*", "op": ["dot_general", "conv", "ragged_dot"]}, "weight": weight}
    rules = [{"match": {"path": "*", "used_by": "gather"}, "keep": True, "optional": True}]
    return {"schema": 1, "name": weight, "rules": [*rules, rule | ({"input": input} if input else {})]}


def compared(got: Any, want: Any) -> float:
    """Relative error of all floating-point outputs together."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    pairs = [(np.float64(a), np.float64(b)) for a, b in pairs if np.issubdtype(b.dtype, np.floating)]
    gap = sum(np.sum((a - b) ** 2) for a, b in pairs)
    return float(np.sqrt(gap / sum(np.sum(b**2) for _, b in pairs)))


def reference(case: Case) -> Any:
    args = case.batch if isinstance(case.batch, tuple) else () if isinstance(case.batch, dict) else (case.batch,)
    named = case.batch if isinstance(case.batch, dict) else {}
    call = case.model if case.params is None else lambda *a, **k: case.model.apply(case.params, *a, **k)
    return call(*args, **named, **case.keywords)


def kernels(graph: jqopt.Graph) -> set[str]:
    """Paths of the floating-point parameters with two or more axes, scales of norms and biases left out by name."""
    found = {p for p, s in graph.parameters.items() if len(s.shape) >= 2 and np.issubdtype(s.dtype, np.floating)}
    return {p for p in found if p.rpartition("/")[2] not in ("bias", "scale")}


def test_every_kernel_is_a_site(case: Case):
    graph = traced(case)
    good = {s.path for s in graph.sites if s.reason is None}
    assert kernels(graph) - good == set(case.idle)
    assert not graph.opaque


def test_permuting_any_class_keeps_the_function(case: Case):
    graph = traced(case)
    assert graph.unknown == ()
    free = [c for c in graph.classes if c.permutable]
    assert free
    want = reference(case)
    for c in free:
        order = np.random.default_rng(c.size).permutation(c.size)
        moved = jqopt.transforms.permute(graph, c, order)(case.model if case.params is None else case.params)
        assert compared(reference(moved_case(case, moved)), want) < 1e-5, c.name


def moved_case(case: Case, params: Any) -> Case:
    """The case with other parameters: a copy of an NNX module is updated with their state."""
    if case.params is not None:
        return case._replace(params=params)
    model = nnx.merge(*nnx.split(case.model), copy=True)
    nnx.update(model, params)
    return case._replace(model=model)


def test_groups_are_those_of_the_architecture(case: Case):
    """Query, key and value, and gate and up, stand together wherever the names say that there are such."""
    groups = [{s.key for s in g} for g in traced(case).groups]
    for words in (("query", "key"), ("q_proj", "k_proj"), ("gate_proj", "up_proj")):
        first = {p for p in kernels(traced(case)) if f"/{words[0]}/" in p and "encoder_attn" not in p}
        for path in first:
            other = path.replace(f"/{words[0]}/", f"/{words[1]}/")
            assert any({path, other} <= g for g in groups), path


# What one rounding costs, measured against the float model, grows with depth; 16 codes for weights and
# activations cost 0.13 to 0.16 of one product (e2m1 has 2 to 3 significant bits), so two layers of random weights,
# with nothing trained to be robust, may lose up to half.
@pytest.mark.parametrize(("weight", "most"), [("int8", 0.06), ("nvfp4", 0.5)])
def test_quantized(case: Case, weight: str, most: float):
    qm = jqopt.quantize_model(
        case.model, recipe(weight, weight), params=case.params, batches=[case.batch], **case.keywords
    )
    tables = {d.path for d in qm.plan.decisions if "kept by" in d.reason}
    assert set(qm.plan.quantized) == kernels(traced(case)) - set(case.idle) - tables
    named = case.batch if isinstance(case.batch, dict) else {}
    args = () if named else (case.batch,)
    run = jax.jit(lambda quant, *a, **k: jqopt.apply(qm.plan)(quant, *a, **(k | case.keywords)))
    arrays = {k: v for k, v in named.items() if v is not None}
    still = {k: v for k, v in named.items() if v is None}
    got = run(qm.quant, *args, **arrays, **still)
    assert compared(got, reference(case)) < most
    simulated = jqopt.apply(qm.plan, simulate=True)(qm.quant, *args, **named, **case.keywords)
    # Only the order of accumulation differs, but a sum that lands on the other side of a rounding boundary moves a
    # later activation by a whole code: a few values in a thousand.
    assert compared(simulated, got) < most / 3
