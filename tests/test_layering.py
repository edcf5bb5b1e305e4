"""The arrows of the house: who may import whom, which modules stay light, and how long a module may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "pixart_data": set(),
    "pixart_model": {"pixart_data"},
    "pipelines": {"pixart_data"},
    "jobs": {"pixart_data", "pixart_model", "pipelines"},
}
LIGHT_CORE = {
    "errors", "config", "sections", "records", "buckets", "shards", "entries", "codecs", "calibrations", "queries",
    "remotes", "commits", "leases", "retries", "storage", "uploads",
}  # fmt: skip
MAY_IMPORT_RAY = {"pipelines", "jobs"}
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}

# What must not be loaded by importing a module: the price of `pixart --help`, and of a node that only trains.
SILENT = {
    "jobs.cli": {"torch", "ray", "numpy", "pyarrow", "transformers", "diffusers", "nltk", "PIL"},
    "pipelines.config": {"torch", "ray", "numpy", "pyarrow", "transformers", "diffusers", "nltk", "PIL"},
    "pixart_model.sizes": {"torch", "ray", "numpy", "pyarrow", "transformers", "diffusers", "nltk", "PIL"},
    "pixart_model.config": {"torch", "ray", "numpy", "pyarrow", "transformers", "diffusers", "nltk", "PIL"},
    "jobs.config": {"torch", "ray", "numpy", "pyarrow"},
    "pixart_model.train": {"ray", "transformers", "diffusers", "nltk", "PIL"},
    "pixart_model.sampling": {"ray", "transformers", "diffusers", "nltk", "PIL"},
    "pixart_data.sources": {"torch", "ray", "transformers", "diffusers", "nltk", "PIL"},
    "pixart_data.nouns": {"torch", "ray", "nltk", "textblob"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_run_down_only(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        if top in MAY_IMPORT and top != package:
            assert top in MAY_IMPORT[package], f"{package} must not import {name}"
        if top == "ray":
            assert package in MAY_IMPORT_RAY, f"{package} must not import ray"
        if package == "pixart_model" and top == "pixart_data" and name.count("."):
            assert name.split(".")[1] in LIGHT_CORE, f"pixart_model may use the light core only, not {name}"


@pytest.mark.parametrize("module", SILENT)
def test_module_is_light(module):
    code = f"import sys, {module}; print(sorted({SILENT[module]!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_is_one_noun_of_moderate_length(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES, "which two things live here?"
    assert path.stem not in DRAWERS, "a drawer, not a room"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_says_what_it_is_and_nothing_more(package):
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_every_module_is_found():
    assert len(MODULES) > 30
