"""The structure that the README promises: imports go one way, and torch is imported only where it works."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lowest import PYPROJECT, lowest_versions

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"
ORDER = (
    *("errors", "params", "files", "runtime", "data", "backbones", "features", "heads", "artifacts"),
    *("evaluate", "insight", "report", "finetune", "export", "predict", "stages", "sklearn", "cli"),
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package that a module belongs to: its folder, or its own name at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> list[str]:
    return ["pipeline", *path.relative_to(PACKAGE).with_suffix("").parts]


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[str, int]]:
    """Absolute names of all modules that a file imports, anywhere in it, each with its line."""
    for node in ast.walk(tree or ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module_name(path)[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(path: Path) -> list[str]:
    """Imports of ``path`` from parts that do not stand before its own."""
    own = part_of(path)
    allowed = {*ORDER[: ORDER.index(own)], own}
    wrong = []
    for name, line in imports(path):
        package, _, rest = name.partition(".")
        if package == "pipeline" and rest.partition(".")[0] not in allowed:
            wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}")
    return wrong


def test_imports_go_one_way() -> None:
    ordered = [path for path in MODULES if part_of(path) in ORDER]
    assert len(ordered) > 10
    assert [line for path in ordered for line in wrong_imports(path)] == []


def test_every_part_has_its_place() -> None:
    parts = {part_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert parts <= set(ORDER), f"{parts - set(ORDER)} stand in no order"


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in MODULES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("from .errors import DataError\nfrom ..runtime import seeds", False),
        ("from ..heads import make_head", True),
        ("from .. import predict", True),
        ("import pipeline.stages.extract", True),
        ("def late():\n    from pipeline.cli import main", True),
        ("from ..data import scan\nimport heads", False),
    ],
)
def test_the_check_sees_every_way_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, caught: bool
) -> None:
    (tmp_path / "pipeline" / "data").mkdir(parents=True)
    module = tmp_path / "pipeline" / "data" / "errors.py"
    module.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "pipeline")
    assert bool(wrong_imports(module)) is caught


def test_what_is_imported_is_a_declared_dependency() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    optional = {re.split("[>=<]", item)[0] for name, items in extras.items() if name != "dev" for item in items}
    declared = {name.lower() for name in {*lowest_versions(), *optional}}
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    found = {name.partition(".")[0] for path in MODULES for name, _ in imports(path)}
    foreign = found - set(sys.stdlib_module_names) - {"pipeline"}
    assert {names.get(name, name) for name in foreign} <= declared


@pytest.mark.parametrize(("name", "foreign"), [("extractor", {"h5py"}), ("store", {"torch", "torchvision"})])
def test_compute_and_storage_are_apart(name: str, foreign: set[str]) -> None:
    module = PACKAGE / "features" / f"{name}.py"
    if not module.exists():
        pytest.skip(f"{module.name} is not written yet")
    found = {name.partition(".")[0] for name, _ in imports(module)}
    assert not found & foreign


@pytest.mark.parametrize("part", ["errors", "params", "files"])
def test_the_foundation_knows_no_torch(part: str) -> None:
    found = {name.partition(".")[0] for path in MODULES if part_of(path) == part for name, _ in imports(path)}
    assert not found & {"torch", "torchvision", "sklearn", "h5py", "numpy"}


def imported_by(code: str) -> set[str]:
    """The top-level modules that an interpreter has loaded after running ``code``."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


def running(*arguments: str) -> str:
    """Code that runs the command line to its end."""
    return f"""
import contextlib, runpy, sys
sys.argv = ["pipeline", *{arguments}]
with contextlib.suppress(SystemExit):
    runpy.run_module("pipeline", run_name="__main__")
"""


@pytest.mark.parametrize(
    "code",
    [
        "import pipeline",
        "import pipeline.errors, pipeline.files, pipeline.params",
        "from pipeline.params import load_params; load_params('params.yaml', ['head.kind=svm'])",
        running("--help"),
        running("extract", "--help"),
        running("extract", "-s", "data.rot=wrong"),
    ],
)
def test_what_only_reads_and_explains_imports_no_torch(code: str) -> None:
    loaded = imported_by(code)
    assert "pipeline" in loaded
    assert not loaded & {"torch", "torchvision", "sklearn", "h5py", "matplotlib"}
