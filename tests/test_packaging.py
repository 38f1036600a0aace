"""What is shipped: the wheel and the sdist hold what they should, and an installed wheel works anywhere.

Builds happen in a copy of the repository, without isolation and hence without a network.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

import jqopt

pytestmark = pytest.mark.install

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Where each import package lives in the repository and in the wheel.
HOMES = {"jqopt": "jqopt", "kernels/jqopt_kernels": "jqopt_kernels", "recipes": "jqopt/recipes"}
INFO = f"jqopt-{jqopt.__version__}.dist-info/"
SHIPPED = {".py", ".yaml", ".typed", ".html", ".json", ".h", ".cc"}


def run(*command: object, cwd: pathlib.Path) -> str:
    """Runs a command and returns what it printed; a failure shows all of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    parts = [str(part) for part in command]
    done = subprocess.run(parts, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def expected_files() -> set[str]:
    """Names in the wheel of every source file, type marker and recipe of the repository."""
    return {
        f"{target}/{path.relative_to(ROOT / source)}"
        for source, target in HOMES.items()
        for path in (ROOT / source).rglob("*")
        if path.suffix in SHIPPED
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    work = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, work / "source", ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", cwd=work / "source")
    return work / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> pathlib.Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> pathlib.Path:
    """The interpreter of a fresh environment with the wheel in it, and this environment's other packages.

    The others come in by a .pth file: their folders are searched after the fresh environment's own, and .pth
    files inside them (an editable install of this repository among them) are not read.
    """
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False)
    interpreter = home / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        interpreter,
        "install",
        "--quiet",
        "--no-deps",
        wheel,
        cwd=home,
    )
    (site,) = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return interpreter


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if not name.startswith(INFO)} == expected_files()
    assert {"jqopt/py.typed", "jqopt_kernels/py.typed"} <= names
    assert any(name.startswith("jqopt/recipes/") and name.endswith(".yaml") for name in names)


def test_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(INFO + "METADATA").decode()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert INFO + "licenses/LICENSE" in archive.namelist()
    assert "jqopt = jqopt.cli:main" in archive.read(INFO + "entry_points.txt").decode()


def test_sdist_holds_what_a_build_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        str(path.relative_to(ROOT)) for source in HOMES for path in (ROOT / source).rglob("*") if path.suffix in SHIPPED
    }
    assert sources | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_installed_wheel_finds_its_recipes(python, tmp_path):
    """From a folder that is not the repository: the package and the recipes come from the wheel."""
    code = (
        "import jqopt, jqopt_kernels, pathlib\n"
        "print(pathlib.Path(jqopt.__file__).parent.parent)\n"
        "print(pathlib.Path(jqopt_kernels.__file__).parent.parent)\n"
        "print(*sorted(str(name) for name in jqopt.list_recipes()))\n"
    )
    package, kernels, recipes = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert pathlib.Path(package) == pathlib.Path(kernels)
    assert pathlib.Path(package).is_relative_to(python.parents[1])
    found = [path.relative_to(ROOT / "recipes").with_suffix("") for path in (ROOT / "recipes").rglob("*.yaml")]
    assert set(recipes.split()) == {str(name) for name in found if name.parts[0] != "defaults"}


def test_installed_command_runs(python, tmp_path):
    assert "recipes" in run(python.parent / "jqopt", "--help", cwd=tmp_path)
    assert "recipes" in run(python, "-m", "jqopt", "--help", cwd=tmp_path)
