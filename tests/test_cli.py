"""The command line: every word on tiny models, exit status, JSON and nothing else on stdout, errors that teach."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

import jqopt
from jqopt import _cli_models, cli
from jqopt.cli import app

ROOT = Path(__file__).parents[1]

TOYS = '''
"""Models for the tests of the command line."""
import jax, jax.numpy as jnp
from flax import linen as nn, nnx

x = jax.random.normal(jax.random.key(0), (4, 32))

class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.Dense(16)(x)
        return y * 2 if train else y

def linen():
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(16)])
    return model, model.init(jax.random.key(1), x), x

def bare():
    return linen()[:2]

def options():
    model = Scaled()
    return model, model.init(jax.random.key(1), x, train=False), {"x": x, "train": False}

def nnx_module():
    return nnx.Linear(32, 16, rngs=nnx.Rngs(0))

def nnx_inputs():
    return nnx_module(), x

def words():
    """Logits of the next word from the last one alone."""
    w = jax.random.normal(jax.random.key(0), (7, 7))
    run = lambda params, ids: jax.nn.one_hot(ids, 7) @ params["w"]
    return run, {"w": w}, jnp.zeros((1, 4), jnp.int32)

def three():
    return 3

def nothing():
    return ()

def broken():
    raise ValueError("the weights are at home")

def chatty():
    print("hello from the model")
    return linen()

number = 3
'''

CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with toys.py and a token file; what the command line changes in the process is undone."""
    (tmp_path / "toys.py").write_text(TOYS)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 7, 200).astype(np.uint16))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(12, 32)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "toys", raising=False)
    yield tmp_path
    sys.modules.pop("toys", None)


@pytest.fixture
def folder(here):
    """A Hugging Face folder with random weights."""
    shapes = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,), "lm_head.weight": (50, 16)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{m}_proj.weight": (16, 16) for m in "qo"}
        shapes |= {f"{block}.self_attn.{m}_proj.weight": (8, 16) for m in "kv"}
        shapes |= {f"{block}.mlp.{m}_proj.weight": (24, 16) for m in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{block}.{n}.weight": (16,) for n in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(0)
    (here / "hf").mkdir()
    values = {name: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(values, here / "hf" / "model.safetensors", metadata={"format": "pt"})
    (here / "hf" / "config.json").write_text(json.dumps(CONFIG))
    (here / "hf" / "generation_config.json").write_text("{}")
    return "hf"


def run(*words: object, status: int = 0):
    """One command in this process; what it printed, with the expected exit status."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == status, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def facts(*words: object, status: int = 0):
    """The same with --json: stdout, parsed."""
    return json.loads(run(*words, "--json", status=status).stdout, parse_constant=pytest.fail)


# ---- recipes


def test_recipes_list():
    assert {r["name"]: r["description"] for r in facts("recipes", "list")} == jqopt.list_recipes()
    assert re.search(r"^nvfp4_weight_only +NVFP4 weights", run("recipes", "list").stdout, re.MULTILINE)


def test_recipes_show_is_a_recipe_file(here):
    (here / "again.yaml").write_text(run("recipes", "show", "nvfp4").stdout)
    shown, shipped = jqopt.load_recipe(here / "again.yaml"), jqopt.load_recipe("nvfp4")
    assert shown.rules == shipped.rules
    assert facts("recipes", "show", "nvfp4")["fingerprint"] == shipped.fingerprint


def test_recipes_check(here):
    (here / "wrong.yaml").write_text("schema: 1\nrules:\n  - match: '*'\n    weigth: fp8\n")
    result = run("recipes", "check", "fp8", "wrong.yaml", status=1)
    assert result.stdout.startswith("ok     fp8")
    assert "wrong.yaml:4" in result.stdout
    assert "did you mean 'weight'" in result.stdout
    found = facts("recipes", "check", "fp8", "wrong.yaml", status=1)
    assert [f["ok"] for f in found] == [True, False]
    run("recipes", "check", "fp8")


def test_recipes_schema():
    assert json.loads(run("recipes", "schema").stdout) == facts("recipes", "schema")
    assert facts("recipes", "schema")["title"] == "jqopt recipe"


# ---- trace and plan


@pytest.mark.parametrize("name", ["linen", "options", "nnx_inputs", "words", "chatty"])
def test_trace_of_each_kind_of_model(here, name):
    found = facts("trace", f"toys:{name}")
    assert [s["op"] for s in found["sites"] if s["path"]]
    assert all(s["k"] in (7, 32, 64) for s in found["sites"])
    assert "dot_general" in run("trace", f"toys:{name}").stdout


@pytest.mark.parametrize("words", [["toys:bare", "--input", "4x32:float32"], ["toys:bare", "--data", "x.npy"],
                                   ["toys:nnx_module", "--input", "inputs=4x32"]])  # fmt: skip
def test_trace_with_inputs_from_elsewhere(here, words):
    assert facts("trace", *words)["sites"][0]["k"] == 32


def test_trace_without_inputs_says_what_to_write(here):
    error = run("trace", "toys:bare", status=1).stderr
    assert "--input SHAPE" in error
    assert "--data FILE" in error


def test_plan(here):
    found = facts("plan", "toys:linen", "--recipe", "nvfp4")
    assert [d["path"] for d in found["decisions"]] == ["layers_0/kernel", "layers_2/kernel"]
    assert found["decisions"][0]["weight"]["format"] == "nvfp4"
    assert "2 of 4 parameters quantized" in run("plan", "toys:linen", "--recipe", "nvfp4").stdout


def test_plan_with_a_recipe_file_that_matches_nothing(here):
    (here / "r.yaml").write_text("schema: 1\nrules:\n  - {match: '*/layers_9/*', weight: fp8}\n")
    error = run("plan", "toys:linen", "--recipe", "r.yaml", status=1).stderr
    assert error.startswith("error: r.yaml:3 rules[0]: the rule matches no site")
    assert "Traceback" not in error


def test_trace_of_a_folder_reads_no_weights(folder, here):
    (here / "hf" / "model.safetensors").unlink()
    found = facts("trace", folder, "--scan-layers")
    assert {s["matrices"] for s in found["sites"] if s["path"] and s["path"].startswith("layers")} == {2}
    assert facts("plan", folder, "--recipe", "fp8")["parameters"]["lm_head/kernel"]["dtype"] == "float32"
    assert (
        facts("plan", folder, "--recipe", "fp8", "--dtype", "bfloat16")["parameters"]["lm_head/kernel"]["dtype"]
        == "bfloat16"
    )


# ---- the whole way of a function's model


def test_quantize_eval_inspect_report(here):
    words = ("quantize", "toys:linen", "--recipe", "int8", "--data", "x.npy", "--out", "q", "--batch", 4)
    done = facts(*words)
    # 32*64 + 64*16 codes, 64 + 16 scales and two input scales of four bytes, biases as they were
    assert done["report"]["bytes_after"] == 32 * 64 + 64 * 16 + 4 * (64 + 16 + 2) + 4 * (64 + 16)
    assert done["calibration"] == "x.npy, 3 batches of 4"
    assert done["report"]["rows"][0]["sqnr_db"] > 30

    found = facts("eval", "q", "--model", "toys:linen", "--reference", "toys:linen", "--data", "x.npy")
    assert found["kind"] == "difference"
    assert 0 < found["relative_error"] < 0.05
    assert found["values"] == 12 * 16

    shown = facts("inspect", "q")
    assert shown["source"] == {"kind": "function", "name": "toys:linen", "scan_layers": False, "dtype": "float32",
                               "calibration": "x.npy, 3 batches of 4", "files": {}}  # fmt: skip
    assert shown["bytes"]["after"] == done["report"]["bytes_after"]
    assert {t["name"]: t["bytes"] for t in shown["tensors"]}["layers_0/bias"] == 256

    assert facts("report", "q")["rows"][0]["sqnr_db"] is None
    with_model = facts("report", "q", "--model", "toys:linen")
    assert with_model["rows"] == done["report"]["rows"]


def test_a_quantized_model_is_what_the_library_makes(here):
    run("quantize", "toys:linen", "--recipe", "int8", "--data", "x.npy", "--out", "q", "--batch", 4)
    toys = _cli_models.load("toys:linen")
    x = np.load("x.npy").astype(np.float32)
    qm = jqopt.quantize_model(toys.model, "int8", params=toys.params, batches=x.reshape(3, 4, 32))
    assert np.array_equal(jqopt.load("q", toys.model)(x), qm(x))


@pytest.mark.parametrize("name", ["nnx_inputs", "options", "words", "chatty"])
def test_quantize_other_kinds(here, name):
    facts("quantize", f"toys:{name}", "--recipe", "int8_weight_only", "--out", "q")
    assert "xla" in run("inspect", "q").stdout


def test_nnx_to_the_end(here):
    run("quantize", "toys:nnx_module", "--recipe", "int8", "--data", "x.npy", "--out", "q")
    found = facts("eval", "q", "--model", "toys:nnx_module", "--reference", "toys:nnx_module", "--data", "x.npy")
    assert 0 < found["relative_error"] < 0.05
    assert facts("report", "q", "--model", "toys:nnx_module")["rows"][0]["sqnr_db"] > 30


def test_options_go_with_every_batch(here):
    """`train` is False in the function's inputs: data files hold arrays only."""
    np.savez("x.npz", x=np.load("x.npy").astype(np.float32))
    run("quantize", "toys:options", "--recipe", "int8", "--data", "x.npz", "--out", "q")
    found = facts("eval", "q", "--model", "toys:options", "--reference", "toys:options", "--data", "x.npz")
    assert 0 < found["relative_error"] < 0.05


def test_overwrite(here):
    words = ("quantize", "toys:linen", "--recipe", "int8_weight_only", "--out", "q")
    run(*words)
    assert "--overwrite" in run(*words, status=1).stderr
    run(*words, "--overwrite")


def test_data_that_the_recipe_does_not_need(here):
    words = ("quantize", "toys:linen", "--recipe", "int8_weight_only", "--data", "x.npy", "--out", "q")
    assert "needs no calibration" in run(*words).stderr
    assert facts("inspect", "q")["source"]["calibration"] == ""


def test_calibration_that_is_missing(here):
    error = run("quantize", "toys:linen", "--recipe", "fp8", "--out", "q", status=1).stderr
    assert "layers_0/kernel" in error
    assert "--data FILE" in error
    assert not Path("q").exists()


def test_random_calibration_is_loud(here):
    done = run("quantize", "toys:linen", "--recipe", "fp8", "--random-calibration", "--out", "q", "--json")
    assert done.stderr.count("WARNING") == 2
    assert "means nothing" in json.loads(done.stdout)["calibration"]
    assert "calibrated with: random numbers" in run("inspect", "q").stdout
    evaluated = run("eval", "q", "--model", "toys:linen", "--reference", "toys:linen", "--data", "x.npy")
    assert "WARNING: q was calibrated with random numbers" in evaluated.stderr


def test_random_ids_need_a_vocabulary(here):
    words = ("quantize", "toys:words", "--recipe", "fp8", "--random-calibration", "--out", "q")
    assert "--vocab" in run(*words, status=1).stderr
    run(*words, "--vocab", 7)


# ---- evaluation


def test_perplexity_written_out(here):
    ids = np.load("ids.npy")[:192].reshape(12, 16).astype(int)
    w = np.asarray(_cli_models.load("toys:words").params["w"], np.float64)
    scores = w - np.log(np.exp(w).sum(axis=1, keepdims=True))
    expected = np.exp(-scores[ids[:, :-1], ids[:, 1:]].mean())
    found = facts("eval", "toys:words", "--data", "ids.npy", "--seq", 16)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (found["windows"], found["predictions"]) == (12, 180)
    assert (
        facts("eval", "toys:words", "--data", "ids.npy", "--seq", 16, "--batch", 2, "--max-batches", 3)["windows"] == 6
    )


def test_a_model_against_itself(here):
    found = facts("eval", "toys:words", "--reference", "toys:words", "--data", "ids.npy", "--seq", 16)
    assert (found["kl"], found["agreement"], found["loss_change"]) == (0, 1, 0)
    assert found["perplexity"] == found["reference_perplexity"]
    text = run("eval", "toys:words", "--reference", "toys:words", "--data", "ids.npy", "--seq", 16).stdout
    assert "top-1 agreement 100.00%" in text


def test_one_window_has_no_standard_error(here):
    """NaN is no JSON: null."""
    found = facts("eval", "toys:words", "--reference", "toys:words", "--data", "ids.npy", "--seq", 200)
    assert found["loss_change_error"] is None


def test_no_perplexity_without_logits(here):
    assert "--reference MODEL" in run("eval", "toys:linen", "--data", "x.npy", status=1).stderr


# ---- Hugging Face folders


def test_a_folder_and_its_checkpoint_alone(folder, here):
    done = facts("quantize", folder, "--recipe", "int8", "--data", "ids.npy", "--seq", 8, "--scan-layers", "--out", "q")
    assert done["calibration"] == "ids.npy, 4 batches of 8"  # 25 windows
    assert sorted(f.name for f in (here / "q" / "hf").iterdir()) == ["config.json", "generation_config.json"]
    compared = facts("eval", "q", "--reference", folder, "--data", "ids.npy", "--seq", 8)
    assert 0 < compared["kl"] < 0.05
    (here / "hf").rename(here / "gone")
    assert facts("eval", "q", "--data", "ids.npy", "--seq", 8)["perplexity"] == pytest.approx(compared["perplexity"])
    assert {tuple(s["kernels"][0]) for s in facts("inspect", "q")["sites"]} == {("rows", "kernel", "not")}
    assert facts("report", "q", "--model", "gone")["rows"][0]["sqnr_db"] > 30


def test_ids_beyond_the_vocabulary(folder, here):
    np.save("big.npy", np.full(300, 50))
    error = run("eval", folder, "--data", "big.npy", status=1).stderr
    assert "token ids from 50 to 50, but the model's vocabulary has 50" in error


def test_random_ids_below_the_vocabulary(folder, here):
    run("quantize", folder, "--recipe", "fp8", "--random-calibration", "--max-batches", 1, "--seq", 8, "--out", "q")


def test_text_needs_a_tokenizer(folder, here, monkeypatch):
    (here / "t.txt").write_text("some words")
    assert "tokenizer.json" in run("eval", folder, "--data", "t.txt", status=1).stderr
    (here / "hf" / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'jqopt[hf]'" in run("eval", folder, "--data", "t.txt", status=1).stderr


def test_text(folder, here):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(50)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(here / "hf" / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(0, 50, 64)
    (here / "t.txt").write_text(" ".join(f"w{i}" for i in ids))
    np.save("t.npy", ids)
    by_text, by_ids = (facts("eval", folder, "--data", f, "--seq", 8) for f in ("t.txt", "t.npy"))
    assert by_text == by_ids


def test_a_damaged_kept_file_is_noticed(folder, here):
    run("quantize", folder, "--recipe", "int8_weight_only", "--out", "q")
    config = here / "q" / "hf" / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 2'))
    assert "missing or damaged" in run("eval", "q", "--data", "ids.npy", status=1).stderr
    config.unlink()
    assert "missing or damaged" in run("eval", "q", "--data", "ids.npy", status=1).stderr


def test_a_checkpoint_is_no_float_model(here):
    run("quantize", "toys:linen", "--recipe", "int8_weight_only", "--out", "q")
    assert "quantized already" in run("quantize", "q", "--recipe", "int8", "--out", "r", status=1).stderr


# ---- a checkpoint runs no code


def test_a_name_in_a_checkpoint_is_not_called(here):
    (here / "evil.py").write_text("open('was_here', 'w').close()\ndef run(): raise SystemExit\n")
    toys = _cli_models.load("toys:linen")
    qm = jqopt.quantize_model(toys.model, "int8_weight_only", params=toys.params, inputs=toys.inputs)
    jqopt.save("q", qm, source={"kind": "function", "name": "evil:run"})
    error = run("eval", "q", "--data", "x.npy", status=1).stderr
    assert "if you trust that code, write --model evil:run" in error
    run("inspect", "q")
    run("report", "q")
    assert not Path("was_here").exists()


@pytest.mark.parametrize("source", [None, {}, {"kind": 3}, {"kind": "huggingface", "name": "x", "files": {"../x": "0"}},
                                    {"mine": [1, 2]}])  # fmt: skip
def test_sources_that_the_command_line_did_not_write(here, source):
    toys = _cli_models.load("toys:linen")
    qm = jqopt.quantize_model(toys.model, "int8_weight_only", params=toys.params, inputs=toys.inputs)
    jqopt.save("q", qm, source=source)
    assert "--model" in run("eval", "q", "--data", "x.npy", status=1).stderr
    run("inspect", "q")
    found = facts("eval", "q", "--model", "toys:linen", "--reference", "toys:linen", "--data", "x.npy")
    assert found["relative_error"] < 0.05


def test_the_wrong_model(here):
    run("quantize", "toys:linen", "--recipe", "int8_weight_only", "--out", "q")
    assert "another model" in run("eval", "q", "--model", "toys:options", "--data", "x.npy", status=1).stderr
    assert "isn't the model" in run("report", "q", "--model", "toys:options", status=1).stderr


# ---- errors and exit status


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes", "show", "nvfp"], "did you mean 'nvfp4'"),
        (["plan", "toys:linen", "--recipe", "nope.yaml"], "no file 'nope.yaml'"),
        (["trace", "nosuch:make"], "found no module 'nosuch'"),
        (["trace", "toys:nosuch"], "toys has no 'nosuch'; it has"),
        (["trace", "toys:number"], "it is a int, expected a function"),
        (["trace", "toys:three"], "it returned int; expected (model, params)"),
        (["trace", "toys:nothing"], "it returned (); expected (model, params)"),
        (["trace", "toys:broken"], "calling it raised ValueError: the weights are at home"),
        (["trace", "toys:linen", "--input", "4x31:float32"], "can't run with these inputs: float32[4, 31]"),
        (["trace", "."], "found no config.json"),
        (["trace", "toys:linen", "--data", "nope.npy"], "nope.npy: no such file"),
        (["trace", "toys:linen", "--data", "toys.py"], "unknown kind of data file '.py'"),
        (["trace", "toys:linen", "--data", "bad.npy"], "bad.npy: NumPy can't read it"),
        (["trace", "toys:linen", "--data", "pickled.npy"], "pickled.npy: NumPy can't read it"),
        (["trace", "toys:linen", "--data", "floats.npy"], "one axis is for token ids"),
        (["trace", "toys:linen", "--data", "ids.npy"], "200 tokens don't fill one window of 256; write --seq 200"),
        (["trace", "toys:linen", "--data", "odd.npz"], "as many examples each"),
        (["inspect", "nope"], "is no checkpoint"),
        (["inspect", "."], "is no checkpoint"),
        (["report", "nope"], "is no checkpoint"),
        (["eval", "nope_at_all:f", "--data", "x.npy"], "found no module"),
    ],
)
def test_failures(here, words, message):
    (here / "bad.npy").write_bytes(b"no array")
    np.save("pickled.npy", np.asarray([{}], dtype=object), allow_pickle=True)
    np.save("floats.npy", np.zeros(8))
    np.savez("odd.npz", a=np.zeros((2, 3)), b=np.zeros((3, 3)))
    result = run(*words, status=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    told = facts(*words, status=1)["error"]
    assert message in told["message"]
    assert issubclass(getattr(jqopt, told["type"]), jqopt.JqoptError)


@pytest.mark.parametrize(
    "words",
    [
        ["nosuch"],
        ["recipes", "nosuch"],
        ["trace"],
        ["trace", "neither-folder-nor-function"],
        ["trace", "toys:linen", "--input", "2y3"],
        ["trace", "toys:linen", "--input", "2x3:nosuch"],
        ["trace", "toys:linen", "--input", "a=2x3", "--input", "2x3"],
        ["trace", "toys:linen", "--dtype", "float8"],
        ["plan", "toys:linen"],
        ["quantize", "toys:linen", "--recipe", "int8"],
        ["quantize", "toys:linen", "--recipe", "int8", "--out", "q", "--batch", "0"],
        ["quantize", "toys:linen", "--recipe", "int8", "--out", "q", "--data", "x.npy", "--random-calibration"],
        ["eval", "toys:linen"],
        ["inspect"],
    ],
)
def test_bad_usage(here, words):
    assert run(*words, status=2).stdout == ""


def test_debug_shows_where(here):
    error = run("trace", "toys:broken", "--debug", status=1).stderr
    assert "Traceback" in error
    assert 'raise ValueError("the weights are at home")' in error
    assert error.splitlines()[-1].startswith("error: toys:broken")


def test_an_error_that_nobody_foresaw(here, monkeypatch):
    monkeypatch.setattr(_cli_models, "load", lambda *a, **k: 1 / 0)
    error = run("trace", "toys:linen", status=1).stderr
    assert "error: ZeroDivisionError" in error
    assert "--debug shows where" in error
    assert "Traceback" not in error


def test_stdout_holds_the_result_only(here):
    result = run("trace", "toys:chatty", "--json")
    json.loads(result.stdout)
    assert "hello from the model" in result.stderr


def test_version_and_help():
    assert run("--version").stdout.strip() == jqopt.__version__
    words = ("trace", "plan", "quantize", "eval", "inspect", "report", "recipes")
    assert all(word in run("--help").stdout for word in words)
    for word in words[:-1]:
        assert {"--json", "--debug"} <= set(run(word, "--help").stdout.split())


# ---- as a process


def process(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "jqopt", *words],
        env=os.environ | {"PYTHONPATH": path}, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


def test_a_process_from_its_working_folder(here):
    done = process("plan", "toys:linen", "--recipe", "int8_per_token", "--json", folder=here)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["decisions"]) == 2
    assert done.stderr == ""


def test_a_process_that_fails(here):
    done = process("plan", "toys:linen", "--recipe", "int8_per_tokens", folder=here)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "did you mean 'int8_per_token'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_touches_no_device():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "jqopt", "quantize", "--help"],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "no_such_platform"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "bytes_"), [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("500 MB", 5 * 10**8), ("7", 7)]
)
def test_sizes(text, bytes_):
    assert cli._size(text) == bytes_


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 gigabytes"])
def test_what_is_no_size(text):
    with pytest.raises(typer.BadParameter, match="is no size"):
        cli._size(text)
