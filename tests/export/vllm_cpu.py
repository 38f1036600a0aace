"""Runs exported folders in vLLM on a CPU: `python vllm_cpu.py FOLDER ...`, each with `reference.npz` beside its config.

The reference has `ids` and `logits` of the dequantized weights. Prints a line of JSON for each folder: the mean
difference over the logits' deviation, how often the likeliest token is the same, and which kernels ran. All but some
matrix products is vLLM's own code: configurations, targets, fused layers, global scales. Where vLLM has no kernel for
this CPU, first its own emulation serves, which it offers to GPUs only, else the products of this file. Needs vLLM
(requirements-vllm.txt), and imports nothing of jqopt.
"""

import gc
import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
os.environ.update(SETTINGS)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import vllm.model_executor.kernels.linear as tables  # noqa: E402
from vllm import LLM, SamplingParams, __version__  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.model_executor.layers.quantization import modelopt  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors import schemes  # noqa: E402
from vllm.platforms import PlatformEnum  # noqa: E402


class Product:
    """A kernel of this file: a weight decoded once, then a plain product."""

    supports_pre_processed_weights = False

    def __init__(self, *args, **names):
        self.config = args[0] if args else None
        self.names = names

    def input_quant_key(self):
        return None

    def apply_weights(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.decoded.to(x.dtype), bias)


class ProductBlocks(Product):
    """fp8 in tiles of 128 x 128, with a scale each: [rows, columns], or ModelOpt's [rows, 1, columns, 1]."""

    def process_weights_after_loading(self, layer):
        weight, scale = layer.weight.data.float(), layer.weight_scale.data.float()
        scale = scale.reshape(scale.shape[0], -1) if scale.dim() == 4 else scale
        wide = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)
        layer.decoded = weight * wide[:, : weight.shape[1]]


class ProductWords(Product):
    """Integers in int32 words along the row, with scales of groups; zero points in words along the column."""

    def process_weights_after_loading(self, layer):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        n, k, bits = layer.weight_packed.shape[0], layer.input_size_per_partition, self.config.weight_type.size_bits
        codes = unpack_from_int32(layer.weight_packed.data, bits, torch.Size((n, k))).float()
        scale = layer.weight_scale.data.float()
        wide = k // scale.shape[1]
        if self.config.zero_points:
            zero = unpack_from_int32(layer.weight_zero_point.data, bits, torch.Size(scale.shape), packed_dim=0)
            codes = codes - zero.float().repeat_interleave(wide, 1)
        layer.decoded = codes * scale.repeat_interleave(wide, 1)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e2m1(packed):
    """Bytes [n, k / 2] as float32 [n, k], low nibble first."""
    return torch.stack((E2M1[(packed & 15).long()], E2M1[(packed >> 4).long()]), -1).flatten(-2)


class ProductNvfp4(Product):
    """Codes, e4m3 scales of 16, and a global scale, which vLLM has made a factor."""

    def process_weights_after_loading(self, layer):
        scale = layer.weight_scale.data.float() * layer.weight_global_scale.data.float()
        layer.decoded = e2m1(layer.weight.data) * scale.repeat_interleave(16, 1)


class ProductMxfp4(Product):
    """Codes and powers of two, for 32 each."""

    def process_weights_after_loading(self, layer):
        scale = torch.exp2(layer.weight_scale.data.view(torch.uint8).float() - 127)
        layer.decoded = e2m1(layer.weight.data) * scale.repeat_interleave(32, 1)


def lend_kernels():
    """Puts vLLM's emulations into its table of kernels for CPUs, and this file's where nothing else is."""
    for name in ("NVFP4", "MXFP8"):
        table = getattr(tables, f"_POSSIBLE_{name}_KERNELS")
        emulation = next(k for k in table[PlatformEnum.CUDA] if k.__name__.startswith("Emulation"))
        if emulation not in table.setdefault(PlatformEnum.CPU, []):
            table[PlatformEnum.CPU].append(emulation)
    fp8, words = schemes.compressed_tensors_w8a8_fp8, schemes.compressed_tensors_wNa16
    fp4, mxfp4 = schemes.compressed_tensors_w4a4_nvfp4, schemes.compressed_tensors_w4a4_mxfp4
    fp8.init_fp8_linear_kernel = modelopt.init_fp8_linear_kernel = or_else(fp8.init_fp8_linear_kernel, ProductBlocks)
    fp4.init_nvfp4_linear_kernel = or_else(fp4.init_nvfp4_linear_kernel, ProductNvfp4)
    modelopt.init_nvfp4_linear_kernel = or_else(modelopt.init_nvfp4_linear_kernel, ProductNvfp4)
    mxfp4.init_mxfp4_linear_kernel = or_else(mxfp4.init_mxfp4_linear_kernel, ProductMxfp4)
    has_words = hasattr(torch.ops._C, "cpu_gemm_wna16")  # of AVX-512
    lent = lambda *args, **names: ProductWords  # noqa: E731
    words.choose_mp_linear_kernel = or_else(words.choose_mp_linear_kernel, lent) if has_words else lent
    ops.scaled_fp8_quant = scaled_fp8_quant
    # no operation of a CPU quantizes within an activation function
    fp8.expose_input_quant_key = modelopt.expose_input_quant_key = lambda *args, **names: None


def or_else(function, other):
    """What the function gives, or the other where it finds nothing."""

    def call(*args, **names):
        try:
            return function(*args, **names)
        except ValueError:
            return other(*args, **names)

    return call


def scaled_fp8_quant(x, scale=None, use_per_token_if_dynamic=False, **rest):
    """vLLM's operation of this name, which its loader calls where fused layers have different scales."""
    if scale is None:
        amax = x.abs().amax(-1, keepdim=True) if use_per_token_if_dynamic else x.abs().max().reshape(1)
        scale = (amax.float() / 448).clamp_min(1e-12)
    return (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale.float()


def kernels_of(llm) -> list[str]:
    """The classes of the matrix products that the model's layers have."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    found = set()
    for module in runner.model.modules():
        for holder in (getattr(module, "scheme", None), getattr(module, "quant_method", None)):
            for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
                if "Kernel" in type(value).__name__ or isinstance(value, Product):
                    found.add(type(value).__name__)
    return sorted(found)


def run(folder: Path) -> dict:
    reference = np.load(folder / "reference.npz")
    ids, wanted = reference["ids"], reference["logits"]
    vocab = wanted.shape[-1]
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    # fp8 caches need AVX-512: their scales are loaded, and the cache stays in floats
    cache = "bfloat16" if quantization.get("kv_cache_scheme") else "auto"
    llm = LLM(
        model=str(folder), kv_cache_dtype=cache, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True,
        max_model_len=ids.shape[1] + 8, max_num_seqs=4, max_logprobs=vocab, logprobs_mode="raw_logits",
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=vocab, logprobs=vocab, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in ids], asked, use_tqdm=False)
    got = np.full(wanted.shape, np.nan, np.float32)
    for i, output in enumerate(outputs):
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for t, step in enumerate(steps):
            got[i, t, list(step)] = [entry.logprob for entry in step.values()]
    return {
        "mean": float(np.abs(got - wanted).mean() / wanted.std()),
        "top": float((got.argmax(-1) == wanted.argmax(-1)).mean()),
        "kernels": kernels_of(llm),
        "quantization": llm.llm_engine.model_config.quantization,
        "version": __version__,
    }


if __name__ == "__main__":
    lend_kernels()
    for path in sys.argv[1:]:
        try:
            found = run(Path(path))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        gc.collect()
        print("RESULT", json.dumps({"folder": Path(path).name, **found}), flush=True)
