"""The page of a traced model: what flows where, nothing on top of another, nothing loaded, no name that is code."""

import base64
import hashlib
import itertools
import json
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from typer.testing import CliRunner

import jqopt
from jqopt import _cli_trace
from jqopt._trace_layout import Box, place
from jqopt._trace_page import drawing, page
from jqopt.analysis.edges import edges
from jqopt.analysis.flow import LEAVE
from jqopt.cli import app
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import browser, zoo

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip
IDS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
EVIL = "<script>window.hacked = 1</script><img src=x onerror=hacked=1>@@DATA@@-->"
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
B = jax.ShapeDtypeStruct((8,), jnp.float32)


def llama(scan=False):
    model = LlamaForCausalLM(CONFIG, scan_layers=scan)
    return jqopt.trace(model, jax.eval_shape(model.init, jax.random.key(0), IDS), IDS)


def deep(blocks):
    """Residual blocks of three products with biases; one parameter's name is markup."""

    def run(params, x):
        for p in params.values():
            h = jnp.tanh(x @ p["up"] + p["bias"])
            x = x + (h @ p["down"]) * (x @ p["gate"])
        return x

    block = {"up": W, "down": W, "gate": W, "bias": B}
    names = [f"block_{i:03}" for i in range(blocks - 1)]
    return jqopt.trace(run, {**{name: dict(block) for name in names}, EVIL: dict(block)}, X)


def residual(params, x):
    x = x + jnp.tanh(x * params["gain"] @ params["up"] + params["bias"]) @ params["down"]
    return x @ params["head"]


RESIDUAL = {"up": W, "down": W, "head": W, "gain": B, "bias": B}


def traced(cls):
    """The graph of a model of the zoo, from shapes."""
    model, x = cls(), zoo.SEVERAL.get(cls, zoo.X)
    return jqopt.trace(model, jax.eval_shape(model.init, jax.random.key(1), x), x)


def drawn(graph):
    return edges(graph.flow, graph.sites)


# ---- edges


def test_edges_of_a_residual_block():
    found = drawn(jqopt.trace(residual, RESIDUAL, X))
    assert [(n.name, n.kind) for n in found.nodes] == [
        ("input", "input"), ("up", "site"), ("down", "site"), ("head", "site"), ("output", "output"),
    ]  # fmt: skip
    assert {(e.source, e.target) for e in found.edges} == {
        ("input", "up"), ("up", "down"), ("input", "head"), ("down", "head"), ("head", "output"),
    }  # fmt: skip
    assert not any(e.loop for e in found.edges)
    assert found.before == {"gain": ("up",)}
    assert found.after == {"bias": ("up",)}


def test_a_stream_of_additions_stays_small():
    """Every later site reads what every earlier one wrote, and yet edges grow with the sites only."""
    counts = {}
    for blocks in (10, 40):
        graph = deep(blocks)
        found = drawn(graph)
        counts[blocks] = len(found.edges)
        assert len(found.between("input")) >= 2 * blocks
    assert 3.5 < counts[40] / counts[10] < 4.5


def test_a_scan_hands_on_to_its_next_round():
    found = drawn(llama(scan=True))
    [(source, target)] = [(e.source, e.target) for e in found.edges if e.loop]
    kinds = {n.name: (n.kind, n.op) for n in found.nodes}
    assert kinds[source] == ("join", "add")
    assert kinds[target][0] == "loop"
    assert "layers/self_attn/q_proj/kernel" in found.between("layers/mlp/down_proj/kernel")
    assert found.before["layers/input_layernorm/scale"] == tuple(f"layers/self_attn/{m}_proj/kernel" for m in "qkv")


def recurrent(params, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, None, length=3)[0]


def test_a_site_that_reads_what_it_gave():
    graph = jqopt.trace(recurrent, {"w": W}, X)
    assert {(e.source, e.target, e.loop) for e in drawn(graph).edges} == {
        ("input", "w", False), ("w", "w", True), ("w", "output", False),
    }  # fmt: skip
    [lane] = drawing(_cli_trace.facts(graph))["lanes"]
    assert lane[0] == lane[1]


def test_a_gain_on_one_way_out_of_a_site_stands_before_the_readers_of_that_way():
    """The embedding goes into the first norm and past it: the gain acts on what three projections read."""
    found = drawn(llama())
    assert found.before["layers_0/input_layernorm/scale"] == tuple(f"layers_0/self_attn/{m}_proj/kernel" for m in "qkv")
    assert found.after == {}


def test_joins_say_where():
    places = [n.where for n in drawn(llama()).nodes if n.kind == "join"]
    assert len(places) == 4
    assert all(re.fullmatch(r"decoder\.py:\d+ \(DecoderLayer\.__call__\)", where) for where in places)


def test_parameters_called_input_and_output():
    graph = jqopt.trace(lambda p, x: (x @ p["input"]) @ p["output"], {"input": W, "output": W}, X)
    found = drawn(graph)
    assert [(n.name, n.kind) for n in found.nodes] == [
        ("(input)", "input"), ("input", "site"), ("output", "site"), ("(output)", "output"),
    ]  # fmt: skip
    assert page(_cli_trace.facts(graph))


def reached(flow, sites, start):
    """What values lead to without passing a site, searched from each value anew."""
    at = {}
    for s in sites:
        at.setdefault(s.address, []).append(s.key)
    found, seen, todo = set(), set(), list(start)
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if any(value is out for out in flow.outputs):
            found.add("output")
        for equation, operand in value.uses:
            if "." not in equation.op and equation.address in at:
                found.update(at[equation.address])
            elif equation.op == LEAVE:
                carried, result = equation.inputs[0], equation.outputs[0]
                todo += [carried, result] if operand == 1 else [] if carried.loops[-1].length else [result]
            else:
                todo += equation.outputs
    return found


@pytest.mark.parametrize("name", [
    "llama", "scanned llama", "residual", "recurrent", "deep", "LSTM", "GRU", "MHA", "CondDense", "WhileDense",
    "RematScan", "Tied", "Vmapped", "MoE", "Ragged", "StackedByHand", "Split", "TwoSame", "CustomVjp",
])  # fmt: skip
def test_edges_are_what_reaches_what(name):
    own = {"llama": llama, "scanned llama": lambda: llama(True), "deep": lambda: deep(4),
           "residual": lambda: jqopt.trace(residual, RESIDUAL, X),
           "recurrent": lambda: jqopt.trace(recurrent, {"w": W}, X)}  # fmt: skip
    graph = own[name]() if name in own else traced(getattr(zoo, name))
    found, flow = drawn(graph), graph.flow
    assert found.between("input") == reached(flow, graph.sites, flow.inputs)
    for site in graph.sites:
        assert found.between(site.key) == reached(flow, graph.sites, flow.by_address[site.address].outputs), site.key
    order = {n.name: i for i, n in enumerate(found.nodes)}
    assert all(order[e.source] < order[e.target] for e in found.edges if not e.loop)


# ---- the layout


def overlaps(boxes):
    """Pairs of boxes (x, y, width, height) that share an inner point."""
    return [
        (a, b) for a, b in itertools.combinations(boxes, 2)
        if a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
    ]  # fmt: skip


@given(st.data())
def test_nothing_stands_on_another(data):
    count = data.draw(st.integers(1, 25))
    sizes = st.sampled_from([(22, 22), (150, 60), (240, 40), (90, 21)])
    boxes = [Box(*data.draw(sizes), near=data.draw(st.booleans())) for _ in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    chosen = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=60)) if pairs else []
    upward = [(j, i) for i, j in chosen[::7]]
    placed = place(boxes, chosen, upward)
    rectangles = [
        (x - b.width / 2, y - b.height / 2, b.width, b.height) for b, (x, y) in zip(boxes, placed.centres, strict=True)
    ]
    assert not overlaps(rectangles)
    assert all(x >= -0.1 and x + w <= placed.width + 0.1 and y + h <= placed.height + 0.1 for x, y, w, h in rectangles)
    for s, t in chosen:
        assert placed.centres[s][1] + boxes[s].height / 2 < placed.centres[t][1] - boxes[t].height / 2
    trunks = {t.source: t for t in placed.trunks}
    assert {(s, t) for s, trunk in trunks.items() for t, _ in trunk.branches} == set(chosen)
    for s, t, x in placed.lanes:
        assert x > max(placed.centres[s][0], placed.centres[t][0])
    assert placed == place(boxes, chosen, upward)


def test_lines_pass_beside_boxes():
    """The straight stretches of long lines cross no box."""
    found = drawing(_cli_trace.facts(llama()))
    for trunk in found["trunks"]:
        for (x, top), (_, bottom) in zip(trunk["points"][::2], trunk["points"][1::2], strict=True):
            line = (x - 0.5, top, 1, max(bottom - top, 1))
            assert not [b for b in found["boxes"] if overlaps([line, (b["x"], b["y"], b["w"], b["h"])])]


# ---- facts


@pytest.mark.parametrize("scan", [False, True])
def test_facts_are_complete(scan):
    graph = llama(scan)
    facts = _cli_trace.facts(graph)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert [s["site"] for s in facts["sites"]] == [s.key for s in graph.sites]
    assert (
        [g["name"] for g in facts["groups"]] == [f["group"] for f in facts["folds"]] == [g.name for g in graph.groups]
    )
    for g in graph.groups:
        assert {s["site"] for s in facts["sites"] if s["group"] == g.name} == {s.key for s in g.sites}
        assert {s["fold"] for s in facts["sites"] if s["group"] == g.name} == {graph.folds[g.name].describe()}
    assert [c["name"] for c in facts["classes"]] == [c.name for c in graph.classes]
    assert {m["symbol"] for c in facts["classes"] for m in c["members"]} == {s["name"] for s in facts["symbols"]}
    assert {s["path"] for s in facts["symbols"]} == set(facts["parameters"]) == set(graph.parameters)
    assert {n["node"] for n in facts["nodes"] if n["kind"] == "site"} == {s.key for s in graph.sites}
    homes = {s["site"]: s["module_path"] for s in facts["sites"]}
    block = "layers" if scan else "layers_0"
    assert homes["activations#1"] == f"{block}/self_attn"
    assert homes[f"{block}/mlp/up_proj/kernel"] == f"{block}/mlp/up_proj"
    layouts = {s["site"]: s["layout"] for s in facts["sites"]}
    assert layouts[f"{block}/mlp/up_proj/kernel"] == ("2 x [48, 32]" if scan else "[48, 32]")
    assert layouts["activations#1"] == ""


def biases(params, x):
    for name in sorted(params):
        x = x @ params[name] if name == "a" else x + params[name]
    return x


BIASES = {"a": W, **{f"bias_{'long_' * i}name": B for i in range(5)}}


def test_every_parameter_is_drawn():
    for graph in (jqopt.trace(biases, BIASES, X), llama(), llama(True), deep(3), traced(zoo.MHA), traced(zoo.LSTM)):
        found = drawing(_cli_trace.facts(graph))
        assert {p for b in found["boxes"] for p in b["params"]} == set(graph.parameters)
        assert not overlaps([(b["x"], b["y"], b["w"], b["h"]) for b in found["boxes"]])
        for b in found["boxes"]:
            inside = [(c["x"], c["y"], c["w"], 17) for c in b["chips"]]
            assert not overlaps(inside)
            assert all(x > 0 and x + w < b["w"] and y + h < b["h"] for x, y, w, h in inside)


def test_a_parameter_that_only_a_fold_names_stands_at_its_group():
    facts = _cli_trace.facts(jqopt.trace(residual, RESIDUAL, X))
    del facts["beside"]["gain"]
    facts["folds"][0]["absorbers"] = [{"path": "gain", "kind": "gain"}]
    found = drawing(facts)
    [(number, box)] = [(i, b) for i, b in enumerate(found["boxes"]) if b["kind"] == "before"]
    assert box["node"] == "gain"
    [trunk] = [t for t in found["trunks"] if t["source"] == number]
    assert [found["boxes"][t]["node"] for t, _ in trunk["branches"]] == ["up"]


def test_bands_are_the_blocks():
    bands = drawing(_cli_trace.facts(llama()))["bands"]
    assert [b["text"] for b in bands] == ["layers_0", "layers_1"]
    assert bands[0]["y"] + bands[0]["h"] <= bands[1]["y"]


# ---- the page


def data_of(text):
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def test_the_page_stands_alone():
    facts = _cli_trace.facts(llama())
    text = page(facts)
    assert data_of(text)["facts"] == facts
    without = re.sub(r'(<script type="application/json" id="data">).*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"https?:|\bsrc=|\bhref=|@import|url\((?!#)|\bfetch\(|XMLHttpRequest|\bimport\(", without)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", without)
    assert "@@" not in without
    assert page(facts) == text


def test_only_its_own_code_may_run():
    """The page's policy lists the hashes of its one style and its one script, and allows nothing else."""
    text = page(_cli_trace.facts(deep(2)))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for element, rule in (("style", "style-src"), ("script", "script-src")):
        [inside] = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


def test_names_are_not_markup():
    graph = deep(2)
    assert f"{EVIL}/up" in graph.parameters
    facts = _cli_trace.facts(graph)
    facts["model"]["name"] = EVIL
    text = page(facts)
    assert data_of(text)["facts"]["model"]["name"] == EVIL
    assert text.count("<script>") == 1  # the page's own
    assert text.count("<!--") == text.count("-->") == text.count("<img") == 0


def test_a_model_without_sites():
    text = page(_cli_trace.facts(jqopt.trace(lambda p, x: x * p["w"], {"w": B}, X)))
    assert [b["node"] for b in data_of(text)["drawing"]["boxes"]] == ["w", "input", "output"]


# ---- the command


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a Hugging Face folder of a config only."""
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, status=0):
    result = CliRunner().invoke(app, ["trace", *words])
    assert result.exit_code == status, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def test_trace_writes_the_page(here):
    done = run("hf", "--scan-layers", "--html", "page.html", "--json")
    assert "wrote page.html" in done.stderr
    facts = json.loads(done.stdout)
    assert (here / "page.html").read_text(encoding="utf-8") == page(facts)
    assert data_of((here / "page.html").read_text(encoding="utf-8"))["facts"] == facts


def test_trace_says_where_it_cannot_write(here):
    assert "no/page.html: No such file" in run("hf", "--html", "no/page.html", status=1).stderr


def test_trace_as_text(here):
    text = run("hf").stdout
    graph_text, groups, folds, classes, unknown = text.rstrip().split("\n\n")
    assert graph_text.startswith("site ")
    assert re.search(r"^layers_1/mlp/gate_proj/kernel +layers_1/mlp/up_proj/kernel +they read", groups, re.MULTILINE)
    assert re.search(r"^layers_0/mlp/down_proj/kernel +24 +- +- +up_proj/kernel \(rows\)$", folds, re.MULTILINE)
    assert re.search(r"^layers_0/self_attn/o_proj/kernel +16 +8 ", folds, re.MULTILINE)  # two kv heads of four
    assert re.search(r"^layers_0/mlp/down_proj/kernel\[0\] +24 +3 +prunable, permutable +-$", classes, re.MULTILINE)
    assert re.search(r"^embed_tokens/embedding\[0\] +50 +1 +pinned: ", classes, re.MULTILINE)
    assert unknown == "unknown: none"


def test_text_of_an_unknown_primitive():
    graph = jqopt.trace(lambda p, x: jnp.linalg.qr(x @ p["w"])[0], {"w": W}, X)
    facts = _cli_trace.facts(graph)
    [unknown] = facts["unknown"]
    assert unknown["primitive"] == "qr"
    assert re.search(rf"^qr +\S.* +{unknown['reason']}$", _cli_trace.text(graph, facts), re.MULTILINE)
    assert "pinned: qr" in _cli_trace.text(graph, facts)


# ---- in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(browser.NAMES)} is on the PATH")
    with browser.browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The pages of a tiny language model and of a model of 252 sites, with their facts."""
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for name, graph in (("tiny", llama()), ("scanned", llama(True)), ("deep", deep(84))):
        facts = _cli_trace.facts(graph)
        (folder / f"{name}.html").write_text(page(facts), encoding="utf-8")
        made[name] = (folder / f"{name}.html", facts)
    return made


@pytest.fixture
def opened(tab, files):
    """Opens one of the pages; after the test nothing may have gone wrong in it, and nothing been loaded."""

    def open(name, **options) -> tuple[browser.Page, dict]:
        file, facts = files[name]
        tab.open(file, **options)
        return tab, facts

    tab.faults.clear()
    tab.requests.clear()
    yield open
    assert tab.faults == []
    assert all(url.startswith("file:") for url in tab.requests)
    assert tab.run("window.hacked === undefined")


def centre(tab, selector):
    return tab.run(
        f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )


def node(key):
    return f'.node.site[data-node="{key}"]'


def nodes_with(tab, name):
    """The keys of the sites with a class."""
    script = f"[...document.querySelectorAll('.node.site.{name}')].map(n => n.dataset.node)"
    return set(tab.run(script))


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["tiny", "scanned", "deep"])
def test_every_site_is_drawn(opened, name, dark):
    tab, facts = opened(name, dark=dark)
    drawn = tab.run("[...document.querySelectorAll('.node.site')].map(n => n.dataset.node)")
    assert sorted(drawn) == sorted(s["site"] for s in facts["sites"])
    assert name != "deep" or len(drawn) == 252
    kinds = tab.run("[...document.querySelectorAll('.node:not(.site)')].map(n => n.dataset.node)")
    before = [p for p, beside in facts["beside"].items() if beside["before"]]
    assert sorted(kinds) == sorted([*(n["node"] for n in facts["nodes"] if n["kind"] != "site"), *before])
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 60) == dark


@pytest.mark.browser
def test_hover_says_what_a_site_is(opened):
    tab, facts = opened("tiny")
    key = "layers_0/self_attn/k_proj/kernel"
    tab.hover(*centre(tab, node(key)))
    text = tab.run("document.querySelector('#tip').innerText")
    [site] = [s for s in facts["sites"] if s["site"] == key]
    for expected in (key, "dot_general", "32 × 16", "float32", "[16, 32]", site["group"], site["fold"]):
        assert expected in text
    assert tab.run("document.querySelectorAll('#over path').length") == 3  # from the embedding, the gain; to scores
    tab.hover(*centre(tab, node("activations#1")))
    assert "multiplies two activations" in tab.run("document.querySelector('#tip').innerText")
    tab.hover(340, 500)
    assert tab.run("document.querySelector('#tip').hidden")


@pytest.mark.browser
def test_search_finds_and_cycles(opened):
    tab, facts = opened("deep")
    tab.key("/")
    tab.type("block_04 GATE")
    expected = [s["site"] for s in facts["sites"] if "block_04" in s["site"] and "gate" in s["site"]]
    assert len(expected) == 10
    assert nodes_with(tab, "hit") == set(expected)
    assert tab.run("document.querySelector('.search output').textContent") == "1 of 10"

    def seen():
        inside = "r => r.y > 80 && r.y + r.height < innerHeight"
        return tab.run(
            "[...document.querySelectorAll('.node.hit')].filter(n => "
            f"({inside})(n.getBoundingClientRect())).map(n => n.dataset.node)"
        )

    first = seen()
    assert "block_040/gate" in first
    for _ in range(5):
        tab.key("Enter")
    assert tab.run("document.querySelector('.search output').textContent") == "6 of 10"
    assert "block_045/gate" in seen()
    assert "block_040/gate" not in seen()
    tab.key("Enter", shift=True)
    assert tab.run("document.querySelector('.search output').textContent") == "5 of 10"
    tab.key("Escape")
    assert nodes_with(tab, "hit") == set()
    assert not tab.run("document.querySelector('#drawing').classList.contains('dim')")


@pytest.mark.browser
@pytest.mark.parametrize("name", ["tiny", "deep"])
def test_a_class_lights_its_parameters(opened, name):
    tab, facts = opened(name)
    tab.run("document.querySelector('[data-mode=class]').click()")
    chosen = facts["classes"][2]
    tab.run("document.querySelectorAll('[data-item]')[2].click()")
    tab.settle()
    paths = {m["path"] for m in chosen["members"]}
    after = {key for p in paths for key in facts["beside"].get(p, {"after": []})["after"]}
    assert nodes_with(tab, "on") == {s["site"] for s in facts["sites"] if s["path"] in paths} | after
    assert set(tab.run("[...document.querySelectorAll('.chip.on')].map(c => c.dataset.param)")) == {
        p for p in paths if not facts["beside"].get(p, {"before": []})["before"]
    }
    said = tab.run("document.querySelector('#detail').textContent")
    assert chosen["name"] in said
    assert all(note in said for note in chosen["notes"])
    tab.run("document.querySelectorAll('[data-item]')[2].click()")  # once more: off
    assert nodes_with(tab, "on") == set()


@pytest.mark.browser
def test_a_group_lights_its_sites(opened):
    tab, facts = opened("tiny")
    tab.run("document.querySelectorAll('[data-item]')[0].click()")
    assert nodes_with(tab, "on") == set(facts["groups"][0]["sites"])
    assert len(facts["groups"][0]["sites"]) == 3
    lit = tab.run("[...document.querySelectorAll('.node.before.on')].map(n => n.dataset.node)")
    assert lit == ["layers_0/input_layernorm/scale"]


@pytest.mark.browser
def test_colours(opened):
    """Sites of one group share a colour that the next group doesn't have; by operation all dots have one."""
    tab, _ = opened("tiny")

    def tone(key):
        return tab.run(f"document.querySelector({json.dumps(node(key))}).style.getPropertyValue('--tone')")

    q, k, up = (f"layers_0/{m}/kernel" for m in ("self_attn/q_proj", "self_attn/k_proj", "mlp/up_proj"))
    assert tone(q) == tone(k) != tone(up) != ""
    tab.run("document.querySelector('[data-mode=op]').click()")
    assert tone(q) == tone(up) != tone("embed_tokens/embedding")
    tab.run("document.querySelector('[data-mode=class]').click()")
    assert tone(q) == ""
    bars = f"[...document.querySelectorAll({json.dumps(node(q) + ' .bar')})].map(b => b.style.fill)"
    assert len(set(tab.run(bars))) == 4  # what it contracts; kv heads, repeats and pairs of a head of what it gives


@pytest.mark.browser
def test_keys_alone(opened):
    tab, _ = opened("tiny")
    focused = "document.activeElement.dataset.node"
    tab.run("document.querySelector('.node[tabindex=\"0\"]').focus()")
    tab.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'x', bubbles: true}))")
    tab.key("End")
    assert tab.run(focused) == "output"
    tab.key("ArrowUp")
    assert tab.run(focused) == "embed_tokens/embedding#2"
    tab.key("ArrowUp")
    assert tab.run(focused).startswith(("+", "norm"))
    tab.key("Home")
    tab.key("ArrowDown")
    first = tab.run(focused)
    tab.key("ArrowRight")
    assert tab.run(focused) != first
    tab.key("Enter")
    assert tab.run("document.querySelector('#detail h2').textContent") == tab.run(focused)
    assert tab.run("document.querySelectorAll('.node[tabindex=\"0\"]').length") == 1
    tab.run("document.querySelector('[role=tab]').focus()")
    tab.key("ArrowRight")
    assert tab.run("document.activeElement.dataset.view") == "sites"
    assert not tab.run("document.querySelector('.sheet').hidden")


@pytest.mark.browser
def test_zoom_and_pan(opened):
    tab, _ = opened("deep")
    x, y = centre(tab, node("block_000/up"))

    def box():
        return tab.run(f"document.querySelector({json.dumps(node('block_000/up'))}).getBoundingClientRect().toJSON()")

    before = box()
    tab.wheel(x, y, -100, control=True)
    after = box()
    assert after["width"] > 1.2 * before["width"]
    assert after["x"] + after["width"] / 2 == pytest.approx(x, abs=1.5)  # what is under the mouse stays there
    assert after["y"] + after["height"] / 2 == pytest.approx(y, abs=1.5)
    tab.wheel(x, y, 120)
    assert box()["y"] == pytest.approx(after["y"] - 120, abs=1.5)


@pytest.mark.browser
def test_tables(opened):
    tab, facts = opened("deep")
    counts = {"sites": 252, "groups": len(facts["groups"]), "folds": len(facts["folds"]),
              "classes": len(facts["classes"]), "parameters": 84 * 4}  # fmt: skip
    for name, count in counts.items():
        tab.run(f"document.querySelector('[data-view={name}]').click()")
        assert tab.run("document.querySelectorAll('.sheet tbody tr').length") == count, name
    tab.run("document.querySelector('[data-view=unknown]').click()")
    assert "None." in tab.run("document.querySelector('.sheet').textContent")
    tab.run("document.querySelector('[data-view=sites]').click()")
    tab.run("document.querySelectorAll('.sheet tbody tr')[30].querySelector('button').click()")  # to the drawing
    assert tab.run("document.querySelector('.sheet').hidden")
    assert nodes_with(tab, "picked") == {facts["sites"][30]["site"]}


@pytest.mark.browser
def test_markup_in_names_is_text(opened):
    tab, _ = opened("deep")
    tab.key("/")
    tab.type("<script>")
    assert tab.run("document.querySelectorAll('.node.hit').length") == 3
    for view in ("sites", "groups", "folds", "classes", "parameters", "graph"):
        tab.run(f"document.querySelector('[data-view={view}]').click()")
        assert tab.run("document.querySelectorAll('img, script').length") == 2  # the data and the code
    tab.hover(*centre(tab, ".node.hit"))
    assert EVIL in tab.run("document.querySelector('#tip').textContent")


@pytest.mark.browser
def test_small_window(opened):
    tab, _ = opened("tiny", width=420, height=800)
    assert tab.run("document.documentElement.scrollWidth") <= 420
    assert tab.run("document.querySelector('#stage').clientHeight") > 200
