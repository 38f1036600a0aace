"""distill: after everything else, trains what the quantized model has left to choose on the float model's outputs."""

from __future__ import annotations

import dataclasses

from jqopt.algorithms import _statistics
from jqopt.algorithms._base import Algorithm
from jqopt.errors import PlanError

LOSSES = ("kl", "mse")


@dataclasses.dataclass(frozen=True)
class Training:
    """How a quantized model is trained; the rates are of the first step, and fall to nothing."""

    steps: int
    rate: float
    gains: bool
    scales: bool
    loss: str


def distill(
    steps: int = 64, rate: float = 0.002, gains: bool = True, scales: bool = True, loss: str = "kl"
) -> Algorithm:
    """Trains norm gains and the scales of weights so that the model's outputs come near the float model's.

    Codes stay, and so do shapes, formats and bits: nothing is added at run time. One step of Adam a batch, in turn, on
    the calibration batches only; the same batches in the same order give the same result. If the loss over all
    batches isn't lower in the end than it was before, everything is left as it was.

    Args:
        steps: of descent; 0 trains nothing.
        rate: the first step's relative change of a gain or a scale.
        gains: train the gains of norms.
        scales: train the scale of each tile, as it is stored (e4m3: rounded straight through; powers of two stay).
        loss: `kl`, KL(float || quantized) of outputs that are logits along their last axis, or `mse`, their mean
            squared difference, relative to the float outputs' mean square.

    Sources: Li et al., Norm Tweaking, arXiv 2309.02784; Kim et al., PEQA, arXiv 2305.14152 (scales alone); the loss as
    in quantization-aware distillation.

    Raises:
        PlanError: an option has no such value.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise PlanError(f"distill: steps is {steps!r}; write a number such as 64")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        raise PlanError(f"distill: rate is {rate!r}; write a number between 0 and 1, such as 0.002")
    for name, value in (("gains", gains), ("scales", scales)):
        if not isinstance(value, bool):
            raise PlanError(f"distill: {name} is {value!r}; write true or false")
    if loss not in LOSSES:
        raise PlanError(f"distill: loss is {loss!r}; write {' or '.join(LOSSES)}")
    how = Training(steps, float(rate), gains, scales, loss)
    return Algorithm("distill", lambda task: task, "model", (_statistics.AMAX,), training=how)
