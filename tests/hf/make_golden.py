"""Tiny random models of transformers with their logits: `python -m tests.hf.make_golden FOLDER`.

Needs torch and transformers 5 (`make clients` installs them); imports nothing of jqopt. Weights are bfloat16 numbers,
so that the file is small; transformers computes in float32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from tests.hf.zoo import CASES, GOLDEN


def model_of(case: str) -> Any:
    """A model of a case with random weights of order one, in float32."""
    name, settings = CASES[case]
    classes = [f"{name}LMHeadModel", f"{name.removesuffix('Text')}ForCausalLM"]
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
    model = next(getattr(transformers, c) for c in classes if hasattr(transformers, c))(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, x in model.named_parameters():
            x.copy_(_random(path, x, name, generator).to(torch.bfloat16))
    return model.float()


def _random(path: str, x: torch.Tensor, name: str, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=generator)
    if x.ndim == 1:  # gains, which Gemma keeps as their distance from one, and biases
        return 0.3 * noise + float("bias" not in path and not name.startswith("Gemma"))
    return noise * (0.6 if "embed" in path or ".wte" in path or ".wpe" in path else 1.5 * x.shape[-1] ** -0.5)


def ids_of(case: str) -> np.ndarray:
    """Two rows of 12 tokens, int32."""
    return np.random.default_rng(len(case)).integers(3, 40, (2, 12)).astype(np.int32)


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """float32 [batch, tokens, vocab]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), use_cache=False).logits.float().numpy()


def save(case: str, folder: Path) -> Any:
    """Writes the model's checkpoint folder as transformers saves it, and reference.safetensors beside; the model."""
    model, ids = model_of(case), ids_of(case)
    model.save_pretrained(folder)
    tokens = model.generate(torch.from_numpy(ids).long(), max_new_tokens=6, do_sample=False, eos_token_id=None,
                            pad_token_id=0).numpy().astype(np.int32)  # fmt: skip
    save_file({"ids": ids, "logits": logits_of(model, ids), "greedy": tokens}, folder / "reference.safetensors")
    return model


def _shrink(folder: Path) -> None:
    """The same weights as bfloat16, which holds them exactly; without the files that no test reads."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    tensors = load_file(folder / "model.safetensors")
    save_torch({name: x.to(torch.bfloat16) for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    for case in GOLDEN:
        target = Path(sys.argv[1]) / case
        save(case, target)
        _shrink(target)
