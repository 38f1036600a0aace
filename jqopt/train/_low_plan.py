"""The plan of low-precision training: for each site what each GEMM reads, or why it stays in high precision."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jax.extend import core as jex_core

from jqopt import _compat, _plan
from jqopt._jaxpr import inner_jaxpr, open_jaxpr
from jqopt._plan import Plan
from jqopt._recipe import Recipe
from jqopt._table import table
from jqopt._trace import Graph, Site
from jqopt.errors import PlanError
from jqopt.train import _conv, _gather
from jqopt.train._linear import Gemms, gemms
from jqopt.train._operand import ROWS, Quantizer


@dataclasses.dataclass(frozen=True)
class Trained:
    """What happens at one site. `gemms` None: high precision, for `reason`."""

    key: str
    op: str
    path: str | None
    gemms: Gemms | None = None
    rule: str = ""
    reason: str = ""
    outer: tuple[int, ...] = ()  # lengths of the scans over its layers


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """One decision a site; `print` it. `ptq`: the plan of quantization after training by the same recipe."""

    recipe: Recipe
    sites: tuple[Trained, ...]
    ptq: Plan = dataclasses.field(repr=False)

    def __getitem__(self, key: str) -> Trained:
        """The decision for a site, by its key."""
        return self.by_key[key]

    @functools.cached_property
    def by_key(self) -> Mapping[str, Trained]:
        return {s.key: s for s in self.sites}

    @property
    def trained(self) -> tuple[Trained, ...]:
        """The sites whose products are quantized."""
        return tuple(s for s in self.sites if s.gemms is not None)

    @property
    def needs_key(self) -> bool:
        """Do gradients need random numbers?"""
        return any(s.gemms.stochastic for s in self.trained if s.gemms)

    @property
    def delayed(self) -> tuple[Trained, ...]:
        """The sites with state: scales from the largest values of past steps."""
        return tuple(s for s in self.trained if s.gemms is not None and s.gemms.delayed)

    def __str__(self) -> str:
        head = ("site", "op", "fprop: x, w", "dgrad: dy, w", "wgrad: dy, x", "decided by")
        text = table(head, [_row(s) for s in self.sites])
        return f"{text}\n{len(self.trained)} of {len(self.sites)} sites in low precision; recipe {self.recipe.name!r}"


def _row(s: Trained) -> tuple[str, ...]:
    if s.gemms is None:
        return (s.key, s.op, "-", "-", "-", s.reason)
    g = s.gemms
    if g.backward == "high_precision":
        back = [("float", "float"), ("float", "float")]
    elif g.backward == "dequantized":
        back = [("float", _word(g.weight[0])), ("float", _word(g.input[0]))]
    else:
        back = [(_word(g.grad[0]), _word(g.weight[1])), (_word(g.grad[1]), _word(g.input[1]))]
    pairs = [(_word(g.input[0]), _word(g.weight[0])), *back]
    return (s.key, s.op, *(f"{a}, {b}" for a, b in pairs), s.rule + (f"; {s.reason}" if s.reason else ""))


def _word(q: Quantizer | None) -> str:
    return "float" if q is None else str(q)


def make(recipe: Recipe, graph: Graph, gather: _gather.Asked | None = None) -> TrainPlan:
    """Decides every site: those that a rule quantizes are trained as the recipe's section `train` says.

    Raises:
        PlanError: no section `train`; as `jqopt.plan` does; no site would be in low precision, or none of their weights
            gathered as codes.
    """
    if recipe.train is None:
        raise PlanError(
            f"recipe {recipe.name!r} has no section `train`: it doesn't say how the operands of each GEMM are "
            "quantized in training. Write one, such as `train: {input: fp8, weight: fp8, grad: fp8_e5m2}`, or use a "
            "shipped recipe: train/nvfp4, train/fp8_current, train/mxfp8, ..."
        )
    ptq = _plan.make_plan(recipe, graph)
    sites = tuple(_decided(recipe, graph, s, ptq[s.key]) for s in graph.sites)
    sites = _together(graph, _without_ends(recipe, graph, sites))
    plan = TrainPlan(recipe, sites if gather is None else _gathered(graph, sites, gather), ptq)
    if not plan.trained:
        raise PlanError(
            f"recipe {recipe.name!r} would train nothing of {graph.function.name} in low precision:\n{plan}"
        )
    if gather is not None and not any(s.gemms and s.gemms.gather for s in plan.trained):
        raise PlanError(
            f"gather={gather.axes}: no weight that is trained in low precision would be gathered as codes; shard the "
            f"weights along these axes, or leave it out:\n{plan}"
        )
    return plan


def _decided(recipe: Recipe, graph: Graph, site: Site, d: _plan.Decision) -> Trained:
    plain = Trained(site.key, site.op, site.path)
    if d.weight is None or recipe.train is None:
        return dataclasses.replace(plain, reason=d.reason)
    reason = refused(graph.jaxpr, site)
    if reason:
        return dataclasses.replace(plain, reason=reason)
    assert site.view is not None, site.key
    ragged = site.op == "ragged_dot"
    asked = gemms(recipe.train, ragged, f"{site.key} ({d.rule})", site.key)
    loops = [a for a, e in around(graph.jaxpr, site.address) if e.primitive.name in ("scan", "while")]
    if asked.delayed and any(a not in site.scans for a in loops):
        why = "delayed scaling in a loop that doesn't run over its layers: it has one scale and several largest values"
        return dataclasses.replace(plain, reason=why)
    note = "no Hadamard transform: groups of tokens end anywhere" if ragged and _turned(recipe) else ""
    outer = tuple(a.full for a in site.view.scanned)
    return dataclasses.replace(plain, gemms=asked, rule=d.rule, reason=note, outer=outer)


def _turned(recipe: Recipe) -> bool:
    spec = recipe.train
    return spec is not None and any(o is not None and o.columns is not None and o.columns.hadamard
                                    for o in (spec.input, spec.grad))  # fmt: skip


def refused(jaxpr: Any, site: Site) -> str:
    """Why a site that quantization after training can do can't be trained in low precision; '' if it can."""
    if site.op == "gather":
        return "a lookup multiplies nothing"
    enclosing = around(jaxpr, site.address)
    own = next((e for _, e in enclosing if e.primitive.name.startswith("custom_")), None)
    if own is not None:
        return f"inside a {own.primitive.name}: its derivative is the model's own"
    eqn = at(jaxpr, site.address)
    if site.op == "ragged_dot" and not _plain_ragged(eqn):
        return "a ragged dot of another form than x [m, k], w [g, k, n]"
    return _conv.refused(eqn) if site.op == "conv" else ""


def _plain_ragged(eqn: Any) -> bool:
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return eqn.primitive.name == "ragged_dot"
    contract, batch = numbers.dot_dimension_numbers
    plain = (tuple(map(tuple, contract)), tuple(map(tuple, batch))) == (((1,), (1,)), ((), ()))
    return plain and list(numbers.lhs_ragged_dimensions) == [0] and list(numbers.rhs_group_dimensions) == [0]


def varying(jaxpr: Any, address: tuple[int, ...], operand: int) -> frozenset[str]:
    """The axes of a shard_map over which an operand of this equation differs, before JAX cast it for the product."""
    inner, _ = open_jaxpr(jaxpr)
    first, *rest = address
    if rest:
        return varying(_below(inner.eqns[first], rest[0]), tuple(rest[1:]), operand)
    atom = inner.eqns[first].invars[operand]
    casts = {e.outvars[0]: e.invars[0] for e in inner.eqns if e.primitive.name in ("pvary", "pcast")}
    while not isinstance(atom, jex_core.Literal) and atom in casts:
        atom = casts[atom]
    return _compat.varying(atom.aval)


def around(jaxpr: Any, address: tuple[int, ...]) -> list[tuple[tuple[int, ...], Any]]:
    """(address, equation) of each call, loop or branch that a site stands in, outermost first."""
    out = []
    for n in range(1, len(address), 2):
        out.append((address[:n], at(jaxpr, address[:n])))
    return out


def at(jaxpr: Any, address: tuple[int, ...]) -> Any:
    """The equation with this address."""
    inner, _ = open_jaxpr(jaxpr)
    eqn = inner.eqns[address[0]]
    return eqn if len(address) == 1 else at(_below(eqn, address[1]), address[2:])


def _below(eqn: Any, branch: int) -> Any:
    p = eqn.params
    match eqn.primitive.name:
        case "while":
            return p["body_jaxpr"] if branch else p["cond_jaxpr"]
        case "cond":
            return p["branches"][branch]
        case "scan" | "shard_map":
            return p["jaxpr"]
    return inner_jaxpr(eqn)


def _together(graph: Graph, sites: tuple[Trained, ...]) -> tuple[Trained, ...]:
    """Weights that are concatenated for one product are trained alike, or not at all."""
    product: dict[tuple[int, ...], list[Trained]] = {}
    for site, d in zip(graph.sites, sites, strict=True):
        product.setdefault(site.address, []).append(d)
    out = []
    for site, d in zip(graph.sites, sites, strict=True):
        kept = next((o for o in product[site.address] if o.gemms is None), None)
        if d.gemms is not None and kept is not None:
            d = dataclasses.replace(d, gemms=None, reason=f"one product with {kept.key}, which isn't: {kept.reason}")
        out.append(d)
    return tuple(out)


def _gathered(graph: Graph, sites: tuple[Trained, ...], want: _gather.Asked) -> tuple[Trained, ...]:
    """Says how the weights of trained sites are gathered that lie cut over a mesh."""
    shared = {a for a, n in Counter(s.address for s in graph.sites).items() if n > 1}
    out = []
    for site, d in zip(graph.sites, sites, strict=True):
        if d.gemms is not None:
            eqn, inside = (
                at(graph.jaxpr, site.address),
                [e.primitive.name for _, e in around(graph.jaxpr, site.address)],
            )
            copies = ((d.gemms.weight[0], ROWS), d.gemms.kept[1])
            found, note = _gather.decide(want, site, eqn, inside, copies)
            if found is not None and site.address in shared:
                found, note = None, f"gathered over {', '.join(want.axes)} as floats: one product of several weights"
            reason = "; ".join(filter(None, (d.reason, note)))
            d = dataclasses.replace(d, gemms=dataclasses.replace(d.gemms, gather=found), reason=reason)
        out.append(d)
    return tuple(out)


# First and last blocks -----------------------------------------------------------------------------------------------

_NUMBERED = re.compile(r"^(.*?)(?:^|_|(?<=\D))(\d+)$")


def _without_ends(recipe: Recipe, graph: Graph, sites: tuple[Trained, ...]) -> tuple[Trained, ...]:
    """Keeps the sites of the first and last blocks that the recipe names."""
    spec = recipe.train
    if spec is None or not (spec.keep_first_blocks or spec.keep_last_blocks):
        return sites
    found = {s.key: block for s in sites if s.gemms is not None and s.path and (block := _block(s.path)) is not None}
    counts = {name: {n for other, n in found.values() if other == name} for name, _ in found.values()}
    stacked = next((s.key for s in sites if s.outer), None)
    if not counts or stacked is not None:
        raise PlanError(
            f"recipe {recipe.name!r}: keep_first_blocks and keep_last_blocks need blocks with numbers in their paths, "
            "such as layers_0/... or layers/0/...; "
            + (f"{stacked} is stacked, and a scan runs all its layers alike: unroll the scan, or leave the keys out" if
               stacked else f"{graph.function.name} has none: write rules with `keep: true`")
        )  # fmt: skip
    blocks = max(counts, key=lambda name: len(counts[name]))
    order = sorted(counts[blocks])
    ends = {*order[: spec.keep_first_blocks], *order[len(order) - spec.keep_last_blocks :]}
    out = []
    for s in sites:
        name, number = found.get(s.key, ("", -1))
        if name == blocks and number in ends:
            s = dataclasses.replace(s, gemms=None, reason=f"block {number}: among the first or last that are kept")
        out.append(s)
    return tuple(out)


def _block(path: str) -> tuple[str, int] | None:
    """(what its block is called without the number, the number), of the outermost part of a path that has one."""
    parts = path.split("/")
    for i, part in enumerate(parts):
        if (m := _NUMBERED.match(part)) is not None:
            return "/".join([*parts[:i], m[1]]), int(m[2])
    return None
