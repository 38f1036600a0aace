"""max: scales from the largest absolute value, of the weight and of the activations seen."""

from __future__ import annotations

from jqopt.algorithms._base import Algorithm


def max() -> Algorithm:
    """Round to nearest with scales from the maximum. Costs one forward pass; exact under any split of the data."""
    return Algorithm("max", lambda task: task, stage="range")
