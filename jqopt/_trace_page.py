"""The page of a traced model: one HTML file with a drawing of its graph and tables of all there is to say."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jqopt._trace_layout import Box, Placed, place

# Widths of a character, at the sizes of the page's style: names are set in a fixed-width font.
TITLE, SMALL, TAG = 7.9, 6.7, 6.4
PAD = 10
LINE = 21  # of chips
WIDEST = 300
SIGNS = {"add": "+", "add_any": "+", "sub": "−", "mul": "×", "concatenate": "⧺", "select_n": "?"}


def page(facts: Mapping[str, Any]) -> str:
    """The page, complete: it loads nothing, and no name in `facts` can become markup or code.

    Args:
        facts: of a graph, as `jqopt trace --json` prints them.
    """
    template = importlib.resources.files("jqopt").joinpath("_trace_page.html").read_text(encoding="utf-8")
    [style] = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    [script] = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    # only this style and this script: what else might end up in the page does nothing
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    model = facts["model"]
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(f"{model['name']}: jqopt trace"),
        "NAME": html.escape(model["name"]),
        "KIND": html.escape(model["kind"]),
        "DATA": _data({"facts": facts, "drawing": drawing(facts)}),
    }
    return re.sub("@@([A-Z]+)@@", lambda m: parts[m[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(data: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ------------------------------------------------------------------------------------------------ drawing


def drawing(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Where everything stands, and what is written on it.

    boxes: sites, joins, input and output, and the parameters that act before one of them (kind `before`).
    """
    shapes = {path: p["shape"] for path, p in facts["parameters"].items()}
    sites = {s["site"]: s for s in facts["sites"]}
    chips = _chips(facts, sites, shapes)
    before = _before(facts, sites, chips)
    boxes = [_pill(path, shapes.get(path), targets) for path, targets in before.items()]
    boxes += [_site(sites[n["node"]], chips[n["node"]]) if n["kind"] == "site" else _small(n) for n in facts["nodes"]]
    index = {b["node"]: i for i, b in enumerate(boxes) if b["kind"] != "before"}
    edges = [(i, index[t]) for i, targets in enumerate(before.values()) for t in targets]
    edges += [(index[e["from"]], index[e["to"]]) for e in facts["edges"] if not e["loop"]]
    upward = [(index[e["from"]], index[e["to"]]) for e in facts["edges"] if e["loop"]]
    placed = place([Box(b["w"], b["h"], b["kind"] == "before") for b in boxes], edges, upward)
    for box, (x, y), layer in zip(boxes, placed.centres, placed.layers, strict=True):
        box |= {"x": round(x - box["w"] / 2, 1), "y": round(y - box["h"] / 2, 1), "layer": layer}
    bands = _bands(boxes, placed)
    for box in boxes:
        del box["home"]
    return {
        "boxes": boxes,
        "trunks": [{"source": t.source, "points": t.points, "branches": t.branches} for t in placed.trunks],
        "lanes": placed.lanes,
        "bands": bands,
        "gutter": 20 + max((_width(b["text"], SMALL * 1.1) for b in bands), default=0) + (20 if bands else 0),
        "width": placed.width,
        "height": placed.height,
    }


def _chips(facts: Mapping[str, Any], sites: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, list[dict]]:
    """The parameters on each site: its own, and those that act on what it gives."""
    found: dict[str, list[str]] = {key: [s["path"]] if s["path"] else [] for key, s in sites.items()}
    for path, beside in facts["beside"].items():
        for key in beside["after"]:
            found[key].append(path)
    return {key: [_chip(path, sites[key], shapes.get(path)) for path in paths] for key, paths in found.items()}


def _chip(path: str, site: Mapping[str, Any], shape: Sequence[int] | None) -> dict[str, Any]:
    own = site["module_path"] + "/"
    name = path[len(own) :] if path.startswith(own) else path
    text = f"{_short(name, 26, keep_end=True)} {_times(shape)}".rstrip()
    return {"param": path, "text": text, "w": 12 + _width(text, SMALL)}


def _before(facts: Mapping[str, Any], sites: Mapping[str, Any], chips: Mapping[str, list]) -> dict[str, list[str]]:
    """The parameters that stand before nodes; one that stands nowhere, at the group whose fold names it."""
    found = {path: beside["before"] for path, beside in facts["beside"].items() if beside["before"]}
    shown = {*found, *(c["param"] for on in chips.values() for c in on)}
    groups = {g["name"]: g["sites"] for g in facts["groups"]}
    for fold in facts["folds"]:
        for path in (a["path"] for a in fold["absorbers"]):
            if path not in shown and path in facts["parameters"]:
                found[path] = groups[fold["group"]]
                shown.add(path)
    return found


def _site(site: Mapping[str, Any], chips: list[dict]) -> dict[str, Any]:
    title, sub = _names(site)
    tag = _width(site["op"], TAG)
    width = max(150.0, 2 * PAD + _width(title, TITLE) + 14 + tag, 2 * PAD + _width(sub, SMALL), 0.0)
    width = min(max([width, *(2 * PAD + c["w"] for c in chips)]), WIDEST)
    y = 8 + 17 + (15 if sub else 0)
    x = float(PAD)
    for chip in chips:
        chip["w"] = min(chip["w"], width - 2 * PAD)
        if x > PAD and x + chip["w"] > width - PAD:
            x, y = float(PAD), y + LINE
        chip |= {"x": round(x, 1), "y": y}
        x += chip["w"] + 5
    height = y + (LINE + 5 if chips else 5)
    texts = [("title", PAD, 20, title), ("op", round(width - PAD - tag, 1), 19.5, site["op"])]
    texts += [("sub", PAD, 35, sub)] if sub else []
    return _box("site", site["site"], width, height, texts, chips, home=site["module_path"])


def _names(site: Mapping[str, Any]) -> tuple[str, str]:
    """(title, the module it stands in) of a site: `q_proj`, `layers_0/self_attn`; a numbered module with its list."""
    home = site["module_path"]
    if not site["path"] or not home or not site["path"].startswith(home + "/"):
        return _short(site["site"], 26), _short(home, 38)
    if not site["module"]:  # a function's parameters: what holds them is no module with a name of its own
        return _short(site["site"][len(home) + 1 :], 26), _short(home, 38)
    parts = home.split("/")
    cut = len(parts) - (2 if parts[-1].isdigit() and len(parts) > 1 else 1)
    again = site["site"][len(site["path"]) :]  # `#2`
    return _short("/".join(parts[cut:]), 24) + again, _short("/".join(parts[:cut]), 38)


def _pill(path: str, shape: Sequence[int] | None, targets: Sequence[str]) -> dict[str, Any]:
    name = path.split("/")
    text = f"{_short('/'.join(name[-2:]), 34, keep_end=True)} {_times(shape)}".rstrip()
    texts = [("sub", 10, 14.5, text)]
    return _box("before", path, 20 + _width(text, SMALL), 21, texts, params=[path], home="/".join(name[:-1]))


def _small(node: Mapping[str, Any]) -> dict[str, Any]:
    """A join, a loop's value, input or output."""
    if node["kind"] in ("input", "output"):
        width = 28 + _width(node["kind"], TITLE)
        return _box(node["kind"], node["node"], width, 27, [("title", 14, 18, node["kind"])])
    sign = "↻" if node["kind"] == "loop" else SIGNS.get(node["op"], "•")
    box = _box(node["kind"], node["node"], 22, 22, [("sign", 11, 15.5, sign)])
    return box | {"op": node["op"], "where": node["where"]}


def _box(
    kind: str, node: str, width: float, height: float, texts: list, chips: Sequence[dict] = (),
    params: Sequence[str] = (), home: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "kind": kind, "node": node, "w": round(width, 1), "h": round(height, 1), "texts": texts, "chips": list(chips),
        "params": [*params, *(c["param"] for c in chips)], "home": home,
    }  # fmt: skip


def _bands(boxes: Sequence[Mapping[str, Any]], placed: Placed) -> list[dict[str, Any]]:
    """Stretches of layers that hold one part of the model only (`layers_0`), where there is more than one such part."""
    homes: list[set[str]] = [set() for _ in placed.rows]
    for box in boxes:
        if box["home"] is not None:
            homes[box["layer"]].add(_part(box["home"]))
    named = [(layer, *found) for layer, found in enumerate(homes) if len(found) == 1 and found != {""}]
    found = []
    for (part, _), run in itertools.groupby(_numbered(named, homes), key=lambda item: (item[1], item[2])):
        layers = [layer for layer, *_ in run]
        top, bottom = placed.rows[layers[0]][0], placed.rows[layers[-1]][1]
        if len(layers) > 1:
            found.append({"text": _short(part, 20), "y": top - 13, "h": bottom - top + 26})
    return found


def _numbered(named: Iterable[tuple], homes: Sequence[set[str]]) -> Iterable[tuple[int, str, int]]:
    """(layer, part, run): a new run where a layer between holds another part."""
    run, last = 0, -1
    for layer, part in named:
        run += any(homes[i] for i in range(last + 1, layer))
        last = layer
        yield layer, part, run


def _part(home: str) -> str:
    """The first part of a module's path; with its number, where modules stand in a list: `layers/0`."""
    first = home.split("/")
    count = next((i + 1 for i, p in enumerate(first[:3]) if re.search(r"\d$", p)), 1)
    return "/".join(first[:count])


def _width(text: str, of_one: float) -> float:
    return math.ceil(len(text) * of_one)


def _times(shape: Sequence[int] | None) -> str:
    return "×".join(map(str, shape or ()))


def _short(text: str, most: int, keep_end: bool = False) -> str:
    """The text, or its beginning and end."""
    if len(text) <= most:
        return text
    start = 6 if keep_end else most // 2
    return f"{text[:start]}…{text[start + 1 - most :]}"
