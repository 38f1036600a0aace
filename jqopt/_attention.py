"""What a plan decides about attention: one decision for each operand (q, k, v, p) of each attention of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jqopt import _trace
from jqopt._jaxpr import Address
from jqopt._ops import InputFormat
from jqopt._recipe import OperandSpec, Recipe
from jqopt._trace import Graph
from jqopt._view import View
from jqopt.analysis.attention import ROLES, Attention, AttentionSite, Operand, attention
from jqopt.analysis.flow import flow
from jqopt.errors import PlanError


@dataclasses.dataclass(frozen=True)
class OperandDecision:
    """What happens to one operand of one attention.

    Attributes:
        key: the attention's (`layers_0/attn`).
        spec: its quantizer; None for queries that are only rotated, because the keys are.
        rotated: are q and k of this attention rotated?
        channels: shape of its bias, heads first; () where it has none.
        outer: lengths of the scans over layers: one scale for each.
        bounded: is it a softmax's output, which is never above 1?
        rule: the place in the recipe that asks for it.
    """

    key: str
    role: str
    spec: OperandSpec | None
    rotated: bool = False
    channels: tuple[int, ...] = ()
    outer: tuple[int, ...] = ()
    bounded: bool = False
    rule: str = ""

    @property
    def affine(self) -> bool:
        return self.spec is not None and self.spec.affine

    @property
    def has_scale(self) -> bool:
        """Is there a scale that is known before the model runs?"""
        return self.spec is not None and self.spec.scaling in ("static", "cast")

    @property
    def needs_data(self) -> bool:
        """Does its scale or bias come from calibration batches?"""
        return self.affine or (self.spec is not None and self.spec.scaling == "static" and not self.bounded)

    @property
    def input_format(self) -> InputFormat | None:
        """Its quantizer as products take it; None: it isn't quantized."""
        if self.spec is None:
            return None
        return InputFormat(self.spec.element_format(), self.spec.granularity or "tensor", self.has_scale)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        spec = None if self.spec is None else self.spec.to_dict()
        return {**out, "spec": spec, "channels": list(self.channels), "outer": list(self.outer)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperandDecision:
        """The inverse of `to_dict`."""
        spec = None if data["spec"] is None else OperandSpec.from_dict(data["spec"])
        return cls(**{**data, "spec": spec, "channels": tuple(data["channels"]), "outer": tuple(data["outer"])})


ByRole = Mapping[str, OperandDecision]


class Product(NamedTuple):
    """One of attention's two products in a jaxpr, as the evaluator's rules look at sites."""

    key: str
    address: Address
    scans: tuple[Address, ...]
    operands: tuple[Operand, ...]

    @property
    def path(self) -> str:
        """Under which its scales and statistics stand in the evaluator's state."""
        return self.key


def decide(recipe: Recipe, graph: Graph) -> tuple[OperandDecision, ...]:
    """A decision for each operand that the recipe asks for, of each attention of the graph.

    Raises:
        PlanError: the recipe asks for operands of attention, and there is none; or a block doesn't fit.
    """
    asked = recipe.operands
    if not asked:
        return ()
    found = graph.attention
    if not found.sites:
        raise PlanError(_nothing(recipe, graph, found))
    return tuple(d for site in found.sites for d in _of_site(asked, site))


def _of_site(asked: Mapping[str, OperandSpec], site: AttentionSite) -> Iterable[OperandDecision]:
    rotated = "k" in asked and asked["k"].rotate
    for role in ROLES:
        spec = asked.get(role)
        if spec is None and not (rotated and role == "q"):
            continue
        operand = site[role]
        if spec is not None and spec.affine and site.sharded:
            raise PlanError(
                f"{spec.where}: affine takes one bias for each head and channel, and {site.key} is inside a shard_map, "
                "where each device may hold other heads; leave affine out."
            )
        channels = tuple(operand.shape[i] for i in (*operand.heads, *operand.channels))
        yield OperandDecision(
            site.key, role, spec, rotated and role in ("q", "k"), channels if spec is not None and spec.affine else (),
            site.outer, role == "p" and site.bounded, spec.where if spec is not None else asked["k"].where,
        )  # fmt: skip


def _nothing(recipe: Recipe, graph: Graph, found: Attention) -> str:
    keys = " and ".join(k for k in ("kv_cache", "attention") if getattr(recipe, k) is not None)
    reasons = "\n".join(f"  {_product(graph, a)}: {why}" for a, why in list(found.others.items())[:12])
    opaque = [o.primitive for o in graph.opaque]
    return (
        f"recipe {recipe.name!r} asks for {keys}, but {graph.function.name} has no attention that jqopt can see. It "
        "looks for a product of two activations (q . k) whose result goes through exp and is divided by its sum, and "
        "is then an operand of another product (p . v). "
        + (f"Products of two activations, and why they are none:\n{reasons}" if reasons else "No two activations meet")
        + ("" if reasons else " in a product.")
        + (f" It can't look into {', '.join(sorted(set(opaque)))}: attention in a kernel has no" if opaque else "")
        + (" operands to quantize; use the XLA implementation." if opaque else "")
        + f"\nLeave {keys} out, or trace the model with inputs that reach its attention."
    )


def _product(graph: Graph, address: Address) -> str:
    return next((f"{s.key} in {s.scope or graph.function.name}" for s in graph.sites if s.address == address), "?")


def rows(decisions: Iterable[OperandDecision]) -> list[tuple[str, str, str, str, str]]:
    """The plan's table: attention, operand, format, scaling, decided by."""
    return [(d.key, d.role, *describe(d), d.rule) for d in decisions]


HEAD = ("attention", "operand", "format", "scaling", "decided by")


def describe(d: OperandDecision) -> tuple[str, str]:
    """(format, scaling) in a few words: `("nvfp4/16 rotated", "static")`."""
    turned = " rotated" if d.rotated else ""
    if d.spec is None:
        return turned.strip(), "-"
    size = d.spec.block if d.spec.granularity == "block" else d.spec.granularity
    format = f"{d.spec.format}/{size}{turned}{' affine' if d.affine else ''}"
    scaling = "static, amax 1" if d.spec.scaling == "static" and d.bounded else d.spec.scaling or ""
    return format, f"{scaling} x{'x'.join(map(str, d.outer))}" if d.outer else scaling


def reasons(graph: Graph, decisions: Sequence[OperandDecision]) -> dict[str, str]:
    """For sites that multiply two activations what happens there, by site key; {} if a recipe asks for nothing."""
    if not decisions:
        return {}
    quantized = {(d.key, d.role) for d in decisions if d.spec is not None}
    says = dict(graph.attention.others)
    for site in graph.attention.sites:
        for address, roles in ((site.address_qk, "qk"), (site.address_pv, "pv")):
            done = [r for r in roles if (site.key, r) in quantized]
            verb = f"; {' and '.join(done)} quantized (see attention)" if done else ""
            says[address] = f"{' and '.join(roles)} of {site.key}{verb}"
    return {s.key: f"{s.reason}: {says[s.address]}" for s in graph.sites if s.path is None and s.address in says}


def held(graph: Graph, decisions: Iterable[OperandDecision]) -> dict[str, str]:
    """Weights that no scale may go into, since operands that are quantized come from them: {path: which}."""
    quantized = {(d.key, d.role) for d in decisions if d.spec is not None}
    if not quantized:
        return {}
    return {
        path: f"{role} of {site.key}"
        for site in graph.attention.sites
        for role, paths in site.weights
        if (site.key, role) in quantized
        for path in paths
    }


def by_key(decisions: Iterable[OperandDecision]) -> dict[str, dict[str, OperandDecision]]:
    """{attention: {role: decision}}."""
    out: dict[str, dict[str, OperandDecision]] = {}
    for d in decisions:
        out.setdefault(d.key, {})[d.role] = d
    return out


def products(
    decisions: Sequence[OperandDecision], jaxpr: Any, views: Sequence[View | None]
) -> list[tuple[Product, ByRole]]:
    """The products of a staged model whose operands are quantized, with the decisions for each; [] if none is planned.

    Raises:
        PlanError: an attention that the plan doesn't know, or with other heads.
    """
    if not decisions:
        return []
    known = by_key(decisions)
    sites, _ = _trace.walk(jaxpr, views, {})
    program = flow(jaxpr, [None if v is None else ("parameter", v.path) for v in views])
    out: list[tuple[Product, ByRole]] = []
    for site in attention(program, sites).sites:
        if site.key not in known:
            raise PlanError(
                f"attention {site.key} ({site.where or site.scope}) appeared that the plan doesn't know: the model "
                "runs differently here than at the inputs it was traced with. Trace with inputs like those you run."
            )
        _check(site, known[site.key])
        for roles in (("q", "k"), ("p", "v")):
            operands = tuple(site[r] for r in roles if r in known[site.key])
            if operands:
                out.append((Product(site.key, operands[0].address, site.scans, operands), known[site.key]))
    return out


def _check(site: AttentionSite, decisions: ByRole) -> None:
    for d in decisions.values():
        operand = site[d.role]
        found = tuple(operand.shape[i] for i in (*operand.heads, *operand.channels))
        if site.outer != d.outer or (d.affine and found != d.channels):
            raise PlanError(
                f"{d.key}: the plan has a bias of shape {[*d.outer, *d.channels]} for {d.role}, but here it has "
                f"channels {[*site.outer, *found]}. Trace with inputs like those you run."
            )
