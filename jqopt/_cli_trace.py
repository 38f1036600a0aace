"""What tracing finds in a model, as JSON data and as text: sites, groups, folds, axis classes, unknown primitives."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jqopt._table import table
from jqopt._trace import Graph, Site
from jqopt.analysis.classes import AxisClass, Member
from jqopt.analysis.edges import Edges, edges
from jqopt.analysis.folds import Fold


def facts(graph: Graph) -> dict[str, Any]:
    """All there is to say of a traced model, as JSON data."""
    grouped = {site.key: group for group in graph.groups for site in group.sites}
    folds, modules = graph.folds, _modules(graph.parameters)
    found = edges(graph.flow, graph.sites)
    sites = []
    for site in graph.sites:
        group = grouped.get(site.key)
        sites.append({
            **_site(site),
            "layout": _layout(site),
            "module_path": site.module_path or _home(site.scope, modules),
            "scope": site.scope,
            "group": None if group is None else group.name,
            "fused": [] if group is None else [k for keys in group.fused if site.key in keys for k in keys],
            "fold": None if group is None else folds[group.name].describe(),
        })  # fmt: skip
    return {
        "model": {"kind": graph.function.kind, "name": graph.function.name},
        "sites": sites,
        "groups": [
            {"name": g.name, "sites": [s.key for s in g.sites], "reason": g.reason, "fused": [list(k) for k in g.fused]}
            for g in graph.groups
        ],
        "folds": [_fold(folds[g.name]) for g in graph.groups],
        "classes": [_class(c) for c in graph.classes],
        "symbols": [
            {"name": s.name, "path": s.path, "axis": s.axis, "size": s.size, "kind": s.kind, "roles": list(s.roles),
             "parts": graph.parts(s.name)}
            for s in graph.symbols
        ],
        "unknown": [
            {"primitive": u.primitive, "where": u.where, "scope": u.scope, "params": list(u.params), "reason": u.reason}
            for u in graph.unknown
        ],
        "opaque": [{"primitive": o.primitive, "scope": o.scope, "reason": o.reason} for o in graph.opaque],
        "parameters": {p: {"shape": list(s.shape), "dtype": str(s.dtype)} for p, s in graph.parameters.items()},
        **_dataflow(found),
    }  # fmt: skip


def _site(site: Site) -> dict[str, Any]:
    sizes = {part: math.prod(a.size for a in getattr(site, part)) for part in ("stack", "rows", "cols")}
    return {
        "site": site.key, "op": site.op, "path": site.path, "module": site.module, "shape": list(site.shape),
        "dtype": site.dtype, "matrices": sizes["stack"], "n": sizes["rows"], "k": sizes["cols"],
        "activation": site.activation if site.activation >= 0 else None, "reason": site.reason,
    }  # fmt: skip


def _layout(site: Site) -> str:
    """The matrices that a parameter is to this site: `4 x [768, 256]`, outputs first; '' where it is none."""
    if site.view is None or not site.cols:
        return ""
    stack, rows, cols = (math.prod(a.size for a in part) for part in (site.stack, site.rows, site.cols))
    return f"{stack} x [{rows}, {cols}]" if site.stack else f"[{rows}, {cols}]"


def _modules(paths: Collection[str]) -> set[str]:
    """The paths of all modules that hold parameters, at any depth."""
    parts = [path.split("/") for path in paths]
    return {"/".join(p[:n]) for p in parts for n in range(1, len(p))}


def _home(scope: str, modules: Collection[str]) -> str:
    """The innermost module that a scope names: `layers_0/self_attn` in `Model/layers_0/self_attn/bqd,bkd->bqk`."""
    parts = scope.split("/")
    spans = [(start, stop) for stop in range(len(parts), 0, -1) for start in range(stop)]
    named = ("/".join(parts[start:stop]) for start, stop in spans)
    return next((name for name in named if name in modules), "")


def _fold(fold: Fold) -> dict[str, Any]:
    return {
        "group": fold.group, "text": fold.describe(), "shape": list(fold.shape),
        "absorbers": [{"path": a.path, "kind": a.kind} for a in fold.absorbers],
        "consumers": [{"path": a.path, "kind": a.kind} for a in fold.consumers],
        "ties": None if fold.ties is None else len(np.unique(fold.ties)),
        "also": list(fold.also), "reason": fold.reason,
    }  # fmt: skip


def _class(c: AxisClass) -> dict[str, Any]:
    return {
        "name": c.name, "size": c.size, "symbols": list(c.symbols), "members": [_member(m) for m in c.members],
        "pinned": None if c.pinned is None else {"reason": c.pinned.reason, "where": c.pinned.where},
        "permutable": c.permutable, "ties": list(c.ties), "notes": list(c.notes),
    }  # fmt: skip


def _member(m: Member) -> dict[str, Any]:
    return {
        "symbol": m.symbol,
        "path": m.path,
        "axis": m.axis,
        "stride": m.stride,
        "start": m.start,
        "length": m.length,
    }


def _dataflow(found: Edges) -> dict[str, Any]:
    beside = {name: {"before": [], "after": []} for name in sorted({*found.before, *found.after})}
    for name, side in beside.items():
        side["before"] += found.before.get(name, ())
        side["after"] += found.after.get(name, ())
    return {
        "nodes": [{"node": n.name, "kind": n.kind, "op": n.op, "where": n.where} for n in found.nodes],
        "edges": [{"from": e.source, "to": e.target, "loop": e.loop} for e in found.edges],
        "beside": beside,
    }


# ---------------------------------------------------------------------------------------------------- as text


def text(graph: Graph, found: Mapping[str, Any]) -> str:
    """The facts of a graph for people."""
    return "\n\n".join((str(graph), _groups(found), _folds(found), _classes(found), _unknown(found)))


def _groups(found: Mapping[str, Any]) -> str:
    rows = [
        (g["name"], ", ".join(k for k in g["sites"] if k != g["name"]) or "-", g["reason"]) for g in found["groups"]
    ]
    return _section("groups: one input scale serves the sites of each", ("group", "with", "why"), rows)


def _folds(found: Mapping[str, Any]) -> str:
    rows = [
        (f["group"], "x".join(map(str, f["shape"])), f["ties"] or "-", ", ".join(f["also"]) or "-", f["text"])
        for f in found["folds"]
    ]
    heads = ("group", "scale", "factors", "also read by", "absorbed by")
    return _section("folds: where a scale on a group's input can go at no cost", heads, rows)


def _classes(found: Mapping[str, Any]) -> str:
    rows = [(c["name"], c["size"], len(c["symbols"]), _flags(c), "; ".join(c["ties"]) or "-") for c in found["classes"]]
    heads = ("class", "size", "axes", "flags", "ties")
    return _section("classes: axes that can only be pruned or permuted together", heads, rows)


def _flags(c: Mapping[str, Any]) -> str:
    if c["pinned"] is None:
        return "prunable, permutable" if c["permutable"] else "prunable"
    where = f" ({c['pinned']['where']})" if c["pinned"]["where"] else ""
    return f"pinned: {c['pinned']['reason']}{where}"


def _unknown(found: Mapping[str, Any]) -> str:
    rows = [(u["primitive"], u["where"] or u["scope"] or "the function", u["reason"]) for u in found["unknown"]]
    return _section(
        "unknown: primitives without a rule, which pin all they touch", ("primitive", "where", "reason"), rows
    )


def _section(title: str, heads: tuple[str, ...], rows: list[tuple]) -> str:
    return f"{title}\n{table(heads, rows)}" if rows else f"{title.partition(':')[0]}: none"
