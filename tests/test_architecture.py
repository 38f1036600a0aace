"""The plan of the house, kept true: imports run down, one door to each dependency, one face."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jqopt"
KERNELS = ROOT / "kernels" / "jqopt_kernels"

# Ground first. A module imports from floors below its own and from its own folder, not from beside or above.
FLOORS: list[set[str]] = [
    {"errors", "_compat", "_table", "_view", "_trace_layout"},
    {"formats", "_hadamard", "_trace_page", "_recipe_base", "_stage"},
    {"_numerics", "_recipe_train"},
    {"_qtensor"},
    {"_feedback"},
    {"_ops"},
    {"_jaxpr"},
    {"algorithms", "analysis"},
    {"_recipe", "_trace"},
    {"_leaves", "_attention"},
    {"_rotate"},
    {"_plan", "transforms", "axis_rules", "_attention_ops", "kv_cache"},
    {"_apply"},
    {"_program", "_simulated"},
    {"_calibrate"},
    {"_layerwise", "_distill"},
    {"_quantize"},
    {"_report", "_evaluate"},
    {"_auto"},
    {"export"},
    {"hf"},
    {"artifacts"},
    {"frontends"},
    {"_model"},
    {"_export", "_load_hf"},
    {"train"},
    {"linen", "nnx"},
    {"__init__"},
    {"_cli_print"},
    {"_cli_data"},
    {"_cli_models"},
    {"_cli_inspect", "_cli_trace", "_cli_evaluate", "_cli_generate", "_cli_quantize", "_cli_serve"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What only one module may name, and which: a dependency or a rule that has one home.
DOORS = {"jqopt_kernels": "_ops", "jax._src": "_compat", "yaml": "_recipe"}

# Modules that no file of the product may import: they run code out of files, or belong to another framework.
BANNED = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "torch", "tensorflow", "qwix", "modelopt")

# The public names. `LATER` holds the ones that may still be missing; a name moves up when it is there.
FACE = {
    *("load_recipe", "list_recipes", "trace", "plan", "calibrate", "quantize", "apply"),
    *("quantize_model", "save", "load", "export", "load_hf", "QTensor", "formats", "algorithms", "linen", "nnx"),
    *("artifacts", "axis_rules", "kv_cache", "train", "transforms"),
    *("JqoptError", "RecipeError", "TraceError", "PlanError"),
    *("CalibrationError", "CheckpointError", "UnsupportedError"),
}
LATER = {"auto_quantize"}

PRODUCT = sorted(PACKAGE.rglob("*.py"))
KERNEL_FILES = sorted(KERNELS.rglob("*.py"))
EVERY_FILE = sorted(
    path for folder in ("jqopt", "kernels", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: pathlib.Path) -> str:
    """The first part of the module's name below jqopt: `algorithms` for jqopt/algorithms/awq.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def has_module(dotted: str) -> bool:
    """Whether `jqopt.<something>` is a file or a folder, and not a name that jqopt/__init__.py defines."""
    base = ROOT / dotted.replace(".", "/")
    return base.with_suffix(".py").exists() or base.is_dir()


def imported(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Dotted names of everything imported anywhere in `tree`, whose module lies in `package`.

    Counts imports inside functions, relative ones, and `import_module("...")` with a literal.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else ()
                stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
                found |= {f"{stem}.{alias.name}" for alias in node.names}
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func).split(".")[-1] in ("import_module", "__import__"):
                    found.add(name)
    return found


@functools.cache
def imports(path: pathlib.Path) -> set[str]:
    source = ROOT / "kernels" if path.is_relative_to(KERNELS) else ROOT
    return imported(ast.parse(path.read_text()), path.relative_to(source).parent.parts)


def rooms_imported(names: set[str]) -> set[str]:
    """The rooms of jqopt behind imported names; the package, or a name that is no module, is `__init__`."""
    parts = [name.split(".") for name in names if within({name}, "jqopt")]
    return {part[1] if len(part) > 1 and has_module(f"jqopt.{part[1]}") else "__init__" for part in parts}


def within(names: set[str], dotted: str) -> bool:
    return any(name == dotted or name.startswith(dotted + ".") for name in names)


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of the constants that are docstrings: text about the code, not code."""
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    return {id(n.body[0].value) for n in nodes if n.body and isinstance(n.body[0], ast.Expr)}


def mentions(tree: ast.AST, dotted: str) -> bool:
    """Whether code reaches `dotted` by attribute access (`jax._src.x`) or through a string."""
    about, word = docstrings(tree), re.compile(rf"(?<![\w.]){re.escape(dotted)}(?!\w)")
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if ast.unparse(node) == dotted:
                return True
            case ast.Constant(value=str(text)) if id(node) not in about and word.search(text):
                return True
    return False


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter that finds the packages where the tests find them."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


# ---- floors


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_every_module_has_a_floor(path):
    assert room(path) in FLOOR, f"{name_of(path)} has no floor: add {room(path)!r} to FLOORS, as low as it can stand"


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_imports_run_down(path):
    own = room(path)
    for other in sorted(rooms_imported(imports(path)) - {own}):
        assert FLOOR[other] < FLOOR[own], (
            f"{name_of(path)} imports {other} (floor {FLOOR[other]}), which stands beside or above it (floor "
            f"{FLOOR[own]}): move what both need to a lower floor"
        )


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name_of)
def test_kernels_know_nothing_of_jqopt(path):
    assert not within(imports(path), "jqopt"), f"{name_of(path)} imports jqopt; kernels/ stands below all of it"


# ---- doors


@pytest.mark.parametrize(("name", "home"), DOORS.items())
def test_one_door(name, home):
    users = {room(path) for path in PRODUCT if within(imports(path), name)}
    assert users <= {home}, f"{name} is imported by {sorted(users - {home})}; only {home} may"


def test_private_jax_has_one_home():
    allowed = PACKAGE / "_compat.py"
    for path in [*PRODUCT, *KERNEL_FILES]:
        if path != allowed:
            private = within(imports(path), "jax._src") or mentions(ast.parse(path.read_text()), "jax._src")
            assert not private, f"{name_of(path)} names jax._src; put the need into {name_of(allowed)}"


@pytest.mark.parametrize("path", [*PRODUCT, *KERNEL_FILES], ids=name_of)
def test_no_banned_import(path):
    found = [name for name in BANNED if within(imports(path), name)]
    assert not found, f"{name_of(path)} imports {found}"


@pytest.mark.parametrize("path", [*PRODUCT, *KERNEL_FILES], ids=name_of)
def test_no_global_switch(path):
    """The caller's JAX stays as it was: no configuration is changed behind the user's back."""
    code = ast.parse(path.read_text())
    found = [switch for switch in ("jax.config.update", "jax.disable_jit") if mentions(code, switch)]
    assert not found, f"{name_of(path)} uses {found}, which changes JAX for the whole program"


@pytest.mark.parametrize("path", EVERY_FILE, ids=name_of)
def test_every_file_says_what_it_is(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert text.strip(), f"{name_of(path)} has no docstring; its first line says the one thing the file is for"


# ---- the face


def test_face_is_exact():
    import jqopt

    names = set(jqopt.__all__)
    assert len(jqopt.__all__) == len(names), "a name stands twice in jqopt.__all__"
    assert names >= FACE, f"missing from jqopt.__all__: {sorted(FACE - names)}"
    assert names <= FACE | LATER, f"not public by design: {sorted(names - FACE - LATER)}"
    assert all(hasattr(jqopt, name) for name in names), "jqopt.__all__ lists a name that jqopt doesn't have"


def test_nothing_else_shows():
    import jqopt

    shown = {name for name in dir(jqopt) if not name.startswith("_")}
    stray = {name for name in shown - set(jqopt.__all__) if not has_module(f"jqopt.{name}")}
    assert not stray, f"dir(jqopt) shows {sorted(stray)}: import them with a leading underscore or not at all"


def test_errors_form_one_tree():
    import jqopt

    errors = [getattr(jqopt, name) for name in FACE if name.endswith("Error")]
    assert all(issubclass(error, jqopt.JqoptError) for error in errors)
    assert issubclass(jqopt.JqoptError, Exception)


# A platform that doesn't exist: importing is fine, whatever touches a device raises.
NOWHERE = {"JAX_PLATFORMS": "no_such_platform"}


def test_import_touches_no_device():
    done = run_python("import jqopt", **NOWHERE)
    assert done.returncode == 0, f"importing jqopt initialises a JAX backend:\n{done.stderr[-2000:]}"


def test_that_touching_a_device_would_be_seen():
    assert run_python("import jax.numpy as jnp; jnp.zeros(1)", **NOWHERE).returncode != 0


def test_import_is_light():
    heavy = ("torch", "tensorflow", "triton", "jax_triton", "transformers", "tokenizers", "typer")
    done = run_python(f"import sys, jqopt; print(*[name for name in {heavy} if name in sys.modules])")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout.split(), f"importing jqopt also imports {done.stdout.split()}"


# ---- the tests' own eyes: each rule above sees what it is there to see


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from jqopt import _plan", "_plan"),
        ("from jqopt._plan import plan", "_plan"),
        ("from . import _plan", "_plan"),
        ("def f():\n    import jqopt._plan as p", "_plan"),
        ("import importlib\nimportlib.import_module('jqopt._plan')", "_plan"),
        ("import jqopt", "__init__"),
        ("from jqopt import a_name_of_the_face", "__init__"),
        ("from jqopt import *", "__init__"),
    ],
)
def test_imports_are_seen(code, expected, monkeypatch):
    monkeypatch.setitem(globals(), "has_module", lambda dotted: dotted == "jqopt._plan")
    assert rooms_imported(imported(ast.parse(code), ("jqopt",))) == {expected}


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("import jax\njax._src.core.x", True),
        ("x = 'jax._src.core'", True),
        ('"""Speaks of jax._src."""', False),
        ("x = 'ajax._src'", False),
    ],
)
def test_mentions_are_seen(code, seen):
    assert mentions(ast.parse(code), "jax._src") is seen
