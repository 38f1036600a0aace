"""Training: in low precision, through a quantized model (QAT, distillation), adapters over packed weights."""

from jqopt.train._distill import distill_loss
from jqopt.train._lora import LoRA, lora
from jqopt.train._low import Prepared, prepare, remat_policy
from jqopt.train._low_nnx import LowPrecision
from jqopt.train._nnx import QuantizedTraining
from jqopt.train._qat import QAT, qat

__all__ = [
    "QAT",
    "LoRA",
    "LowPrecision",
    "Prepared",
    "QuantizedTraining",
    "distill_loss",
    "lora",
    "prepare",
    "qat",
    "remat_policy",
]
