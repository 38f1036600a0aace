"""For rules of primitives that jqopt doesn't know: what they do to axes, for `graph.with_rules({"name": rule})`.

A rule is a function of the equation (`.params`, `.inputs` and `.outputs` with their shapes) and of the axes of each
operand; it returns the axes of each result. `unify` says that two axes are one; `pin` that one must stay as it is.
"""

from jqopt.analysis.axes import Axes, Node, concat, fresh, note, piece, pin, pinned, product, reshape, split, unify
from jqopt.analysis.axis_rules import RULES, Rule, elementwise, same, unknown
from jqopt.analysis.flow import Equation

__all__ = [
    "RULES",
    "Axes",
    "Equation",
    "Node",
    "Rule",
    "concat",
    "elementwise",
    "fresh",
    "note",
    "piece",
    "pin",
    "pinned",
    "product",
    "reshape",
    "same",
    "split",
    "unify",
    "unknown",
]
