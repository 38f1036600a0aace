"""The command line: parses, calls, prints. `jqopt --help` lists the words; each takes --json and --debug."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from jqopt._cli_print import Shown, command, note

# The modules that do the work are imported inside the commands: `--help` answers without them.

MODEL_HELP = "package.module:function, or a Hugging Face folder."
LOUD = (
    "WARNING: --random-calibration: the scales of the inputs come from random numbers. Sizes and speed are right;\n"
    "WARNING: what the model computes is NOT, and its accuracy means nothing. Use real data for a model to keep."
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="""
Quantization for JAX: recipes, plans, packed checkpoints.

A MODEL is package.module:function (found from the working folder; the function returns (model, params),
(model, params, inputs), an NNX module, or (nnx_module, inputs)), or a Hugging Face checkpoint folder.
Exit status: 0, 1 (failed), 2 (bad usage).
""")  # fmt: skip
recipes = typer.Typer(no_args_is_help=True, help="The shipped recipes, and checks of your own.")
app.add_typer(recipes, name="recipes")


def _model(text: str) -> str:
    """A MODEL argument of the right form; whether it is there shows later."""
    if Path(text).is_dir() or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        return text
    raise typer.BadParameter(f"{text!r} is neither a folder nor of the form package.module:function")


def _size(text: str) -> int:
    """Bytes, from `2GB`, `500 MB` or a plain number."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    if not found or float(found[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no size; write a number of bytes, or 500MB, 2GB, 1.5GiB")
    step = 1024 if found[3] else 1000
    return int(float(found[1]) * step ** ("KMGT".index(found[2].upper()) + 1 if found[2] else 0))


def _bounds(text: str) -> tuple[int, int]:
    """`1:512`, or one size."""
    found = re.fullmatch(r"([1-9][0-9]*)(?::([1-9][0-9]*))?", text.strip())
    if not found or int(found[1]) > int(found[2] or found[1]):
        raise typer.BadParameter(f"{text!r} is neither a size nor LEAST:MOST, such as 1:512")
    return int(found[1]), int(found[2] or found[1])


def _shapes(texts: list[str]) -> list[str]:
    from jqopt._cli_models import inputs_of

    try:
        inputs_of(texts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return texts


class DtypeName(enum.StrEnum):
    """What --dtype takes."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


DEVICES = ("cpu", "gpu", "cuda", "rocm", "tpu")


def _device(value: str | None) -> str | None:
    """What --device takes: a platform, or "cuda:90" with its capability."""
    name, colon, capability = (value or "cpu").partition(":")
    if name in DEVICES and (not colon or (name == "cuda" and capability.isdigit())):
        return value
    raise typer.BadParameter(f"{value!r}: write one of {', '.join(DEVICES)}, or cuda:90 for a capability of 9.0")


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, show the traceback.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, callback=_model)]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A folder that quantize or jqopt.save wrote.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name, or a YAML file.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", callback=lambda x: _shapes(x or []),
                 help="Shape of an input, such as 2x128:int32 or x=8x32:float32; once for each input."),
]  # fmt: skip
Scan = Annotated[bool, typer.Option("--scan-layers", help="Hugging Face: run the layers as one scan.")]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="Hugging Face: of weights and computation.")]
DataFile = Annotated[
    Path | None, typer.Option("--data", help="Token ids or examples (.npy), keyword inputs (.npz), text (.txt).")
]
Length = Annotated[int, typer.Option("--seq", min=1, help="Tokens in a window, where the data are one long text.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Examples in a batch.")]
Memory = Annotated[
    int | None,
    typer.Option("--memory", metavar="SIZE", parser=_size, help="Most memory of calibration statistics, such as 2GB."),
]
Vocab = Annotated[int | None, typer.Option("--vocab", min=1, help="Number of token ids, if the model can't say.")]
OtherModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", callback=lambda x: x and _model(x), help="The model of the checkpoint."),
]


# ---------------------------------------------------------------------------------------------------- recipes


@recipes.command("list")
@command
def recipes_list(as_json: Json = False, debug: Debug = False) -> Shown:
    """The shipped recipes."""
    import jqopt
    from jqopt._table import table

    found = jqopt.list_recipes()
    return Shown(
        [{"name": n, "description": d} for n, d in found.items()], table(("recipe", "what"), list(found.items()))
    )


@recipes.command("show")
@command
def recipes_show(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """One recipe with all that it extends: the rules in the order in which they decide."""
    import jqopt

    found = jqopt.load_recipe(recipe)
    return Shown({**found.to_dict(), "fingerprint": found.fingerprint}, found.to_yaml().rstrip())


@recipes.command("check")
@command
def recipes_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML files, or names of shipped recipes.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """Whether recipes are right; names file, line and key of what isn't."""
    import jqopt

    found: list[dict[str, Any]] = []
    for file in files:
        try:
            recipe = jqopt.load_recipe(file)
            found.append({"file": file, "ok": True, "rules": len(recipe.rules), "error": None})
        except jqopt.RecipeError as error:
            found.append({"file": file, "ok": False, "rules": None, "error": str(error)})
    lines = [f"ok     {f['file']} ({f['rules']} rules)" if f["ok"] else f"wrong  {f['error']}" for f in found]
    return Shown(found, "\n".join(lines), failed=not all(f["ok"] for f in found))


@recipes.command("schema")
@command
def recipes_schema(as_json: Json = False, debug: Debug = False) -> Shown:
    """The JSON Schema of recipe files, for editors."""
    from jqopt._cli_print import dumped
    from jqopt._recipe import recipe_schema

    schema = recipe_schema()
    return Shown(schema, dumped(schema))


# ------------------------------------------------------------------------------------------------- trace, plan


@app.command()
@command
def trace(
    model: Model,
    inputs: Inputs = None,
    data: DataFile = None,
    seq: Length = 256,
    batch: Batch = 8,
    scan_layers: Scan = False,
    dtype: Dtype = DtypeName.FLOAT32,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with a drawing of the graph.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """A model's sites (operations that read a parameter), groups, folds and axis classes; what can't be and why."""
    from jqopt import _cli_trace
    from jqopt._cli_models import load
    from jqopt._trace_page import page

    loaded = load(model, scan_layers=scan_layers, dtype=dtype.value, weights=False)
    graph = loaded.trace(loaded.example(inputs or [], loaded.read(data, seq, batch)))
    facts = _cli_trace.facts(graph)
    if html is not None:
        html.write_text(page(facts), encoding="utf-8")
        note(f"wrote {html}")
    return Shown(facts, _cli_trace.text(graph, facts))


@app.command()
@command
def plan(
    model: Model,
    recipe: RecipeName,
    inputs: Inputs = None,
    data: DataFile = None,
    seq: Length = 256,
    batch: Batch = 8,
    scan_layers: Scan = False,
    dtype: Dtype = DtypeName.FLOAT32,
    memory: Memory = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """What a recipe would do to each site of a model, and by which rule. Nothing runs, no weight is read."""
    import jqopt
    from jqopt import _calibrate, _plan
    from jqopt._cli_models import load

    rules = jqopt.load_recipe(recipe)
    loaded = load(model, scan_layers=scan_layers, dtype=dtype.value, weights=False)
    graph = loaded.trace(loaded.example(inputs or [], loaded.read(data, seq, batch)))
    made = jqopt.plan(rules, graph)
    passes = _calibrate.described(made, memory)
    return Shown({**_plan.to_dict(made), "calibration": passes}, f"{made}\ncalibration: {passes}")


# ---------------------------------------------------------------------------------------------------- quantize


@app.command()
@command
def quantize(
    model: Model,
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", help="Folder of the checkpoint to write.")],
    data: DataFile = None,
    random: Annotated[bool, typer.Option("--random-calibration", help="Random numbers in place of data.")] = False,
    inputs: Inputs = None,
    seq: Length = 256,
    batch: Batch = 8,
    batches: Annotated[int, typer.Option("--max-batches", min=1, help="Batches to calibrate with.")] = 8,
    vocab: Vocab = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that is there.")] = False,
    scan_layers: Scan = False,
    dtype: Dtype = DtypeName.FLOAT32,
    memory: Memory = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """Quantize a model and save it: packed weights, scales, plan and recipe."""
    if data is not None and random:
        raise typer.BadParameter("--data and --random-calibration exclude each other")
    import jqopt
    from jqopt import _cli_quantize as work
    from jqopt._cli_models import kept_files, load, remembered
    from jqopt.export.orbax import check_target, save

    check_target(out, overwrite)
    rules = jqopt.load_recipe(recipe)
    loaded = load(model, scan_layers=scan_layers, dtype=dtype.value, weights=False)
    found = loaded.read(data, seq, batch, vocab)
    example = loaded.example(inputs or [], found)
    feed = None if found is None else work.feed_of(found.first(batches), str(data))
    if random:
        note(LOUD)
        feed = work.random_feed(loaded, example, vocab, (batch, seq), batches)
    done = work.quantize(loaded, rules, example, feed, memory)
    save(out, done.model, overwrite=overwrite, source=remembered(loaded, done.calibration), files=kept_files(loaded))
    facts = {"out": str(out), "model": model, "calibration": done.calibration, "report": done.report.to_dict()}
    return Shown(facts, f"{done.report.summary}\nsaved to {out}")


# -------------------------------------------------------------------------------------- eval, generate, inspect, report


@app.command("eval")
@command
def evaluate(
    target: Annotated[str, typer.Argument(metavar="CKPT|MODEL", help="What to evaluate.", callback=_model)],
    data: Annotated[Path, typer.Option("--data", help="Token ids or examples, as for quantize.")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL|CKPT", callback=lambda x: x and _model(x), help="Compare with it."),
    ] = None,
    model: OtherModel = None,
    seq: Length = 256,
    batch: Batch = 8,
    batches: Annotated[int | None, typer.Option("--max-batches", min=1, help="Batches to use; default all.")] = None,
    scan_layers: Scan = False,
    dtype: Dtype = DtypeName.FLOAT32,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """Perplexity of a language model; with a reference also KL and agreement, or for other models the distance."""
    from jqopt import _cli_evaluate
    from jqopt._cli_models import runnable

    run, loaded = runnable(target, model, scan_layers=scan_layers, dtype=dtype.value)
    examples = loaded.read(data, seq, batch)
    assert examples is not None
    other = None if reference is None else runnable(reference, scan_layers=scan_layers, dtype=dtype.value)[0]
    return _cli_evaluate.evaluate(run, other, examples.first(batches))


@app.command()
@command
def generate(
    target: Annotated[str, typer.Argument(metavar="CKPT|MODEL", help="Whose text it is.", callback=_model)],
    prompts: Annotated[list[str], typer.Option("--prompt", help="What the text begins with; may stand several times.")],
    model: OtherModel = None,
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to make.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest, as many as reach it.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    kv_cache: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Hold keys and values packed: fp8, nvfp4. Default: as the recipe says."),
    ] = None,
    scan_layers: Scan = False,
    dtype: Dtype = DtypeName.FLOAT32,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """Text after a prompt, of a Hugging Face model or its quantized checkpoint."""
    from jqopt import _cli_generate

    settings = _cli_generate.Settings(tokens, temperature, top_p, seed, kv_cache)
    options = {"scan_layers": scan_layers, "dtype": dtype.value}
    return _cli_generate.generate(target, model, prompts, settings, **options)


@app.command()
@command
def inspect(
    checkpoint: Checkpoint,
    rows: Annotated[
        list[int] | None, typer.Option("--rows", min=1, help="Rows of the activation to choose kernels for.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=f"Choose kernels for it: {', '.join(DEVICES)} or cuda:90.", callback=_device)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """What is in a checkpoint, and which kernel each site would run and why not the others. Reads no weight."""
    from jqopt import _cli_inspect
    from jqopt.export.checkpoint import Checkpoint as Opened

    facts = _cli_inspect.facts(Opened(checkpoint), rows or [1, 512], device)
    return Shown(facts, _cli_inspect.text(facts))


@app.command()
@command
def report(
    checkpoint: Checkpoint,
    model: OtherModel = None,
    scan_layers: Scan = False,
    dtype: Dtype = DtypeName.FLOAT32,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """Bytes and bits of each packed weight; with the float model also its error."""
    from jqopt import _cli_inspect
    from jqopt._cli_models import floats_of
    from jqopt.export.checkpoint import Checkpoint as Opened

    opened = Opened(checkpoint)
    floats = None if model is None else floats_of(opened, model, scan_layers=scan_layers, dtype=dtype.value)
    found = _cli_inspect.stored_report(opened, floats)
    return Shown(found.to_dict(), str(found))


@app.command()
@command
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    target: Annotated[
        str, typer.Option("--target", help="compressed-tensors, modelopt or stablehlo.")
    ] = "compressed-tensors",
    source: Annotated[
        Path | None,
        typer.Option("--source", help="Hugging Face folder of the float model, where CKPT doesn't keep its files."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Who must load it; default vllm. `other`: whoever.")
    ] = None,
    dtype: Annotated[DtypeName | None, typer.Option("--dtype", help="Of unquantized parameters.")] = None,
    max_shard_size: Annotated[
        int | None,
        typer.Option("--max-shard-size", metavar="SIZE", parser=_size, help="Most bytes of a file, such as 2GB."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that is there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an export that was cut.")] = False,
    batch: Annotated[
        Any, typer.Option("--batch", metavar="N|MIN:MAX", parser=_bounds, help="stablehlo: rows; default 1:8.")
    ] = None,
    length: Annotated[
        Any, typer.Option("--length", metavar="N|MIN:MAX", parser=_bounds, help="stablehlo: tokens; default 1:512.")
    ] = None,
    platform: Annotated[
        list[str] | None, typer.Option("--platform", help="stablehlo: cpu (default), cuda, rocm, tpu; once for each.")
    ] = None,
    model: OtherModel = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """Write a checkpoint for other programs: vLLM, SGLang, TensorRT-LLM, transformers; or as a program of its own."""
    from jqopt import _cli_serve
    from jqopt._cli_models import warn_if_random

    warn_if_random(checkpoint)
    folders = {
        "source": source, "engine": engine, "dtype": None if dtype is None else dtype.value, "resume": resume or None,
        "max_shard_size": max_shard_size,
    }  # fmt: skip
    programs = {"batch": batch, "length": length, "platforms": platform or None, "model": model}
    mine, others = (programs, folders) if target == "stablehlo" else (folders, programs)
    if wrong := [name for name, x in others.items() if x is not None]:
        raise typer.BadParameter(f"--{wrong[0].replace('_', '-').removesuffix('s')} isn't for --target {target}")
    options = {name: x for name, x in {**mine, "overwrite": overwrite or None}.items() if x is not None}
    done = _cli_serve.export(checkpoint, out, target, options.pop("model", None), options)
    return Shown(done.to_dict() if hasattr(done, "to_dict") else {"out": str(out)}, str(done))


@app.command("serve-check")
@command
def serve_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `jqopt export` wrote.")],
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows to try; default 2.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Tokens to try; default 16.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Shown:
    """Whether an export loads and runs: one batch of random tokens."""
    from jqopt import _cli_serve

    asked = {"batch": batch, "length": length}
    return _cli_serve.serve_check(folder, {name: x for name, x in asked.items() if x is not None})


def _version(wanted: bool) -> None:
    if wanted:
        import jqopt

        typer.echo(jqopt.__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point `jqopt`."""
    app(prog_name="jqopt")
