"""The layout of the package: which folders import which, and which libraries an import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bert4rec_hf"
# Each entry may import only the entries above it.
ORDER = [
    {"version", "files", "reading", "defaults"},
    {"model"},
    {"data"},
    {"evaluation"},
    {"hub"},
    {"training", "serving", "convert"},
    {"runs"},
    {"command_line"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {entry: rank for rank, entries in enumerate(ORDER) for entry in entries}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
MODEL_IMPORTS = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub"}


def module(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(path: Path) -> list[tuple[str, ...]]:
    """The modules of the package that a file imports anywhere, each as the parts of its name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = module(path)[: len(module(path)) - node.level]
            names = [tuple(node.module.split("."))] if node.module else [(alias.name,) for alias in node.names]
            # `from .data import preparation` imports a module too, as `from .data.preparation import prepare` does.
            if node.module and (PACKAGE.joinpath(*folder, *names[0])).is_dir():
                names = [(*names[0], alias.name) for alias in node.names]
            found += [(*folder, *name) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=["/".join(module(path)) for path in FILES])
def test_a_file_imports_only_from_folders_above_its_own(path):
    entry = module(path)[0]
    for target in imported(path):
        assert target[0] == entry or RANK[target[0]] < RANK[entry], (
            f"{'/'.join(module(path))} imports {'/'.join(target)}"
        )


def test_no_files_import_one_another_in_a_circle():
    graph = {module(path): imported(path) for path in FILES}
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert name not in trail, f"these modules import one another in a circle: {[*trail, name]}"
        if name not in done:
            for target in graph.get(name, []):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) > 30


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_file_that_is_published_imports_its_neighbours_and_libraries_alone(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module, f"{path.name} has `from . import x`; write `from .x import y`"
            assert (PACKAGE / "model" / f"{node.module}.py").is_file()
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.partition(".")[0]
            assert top in MODEL_IMPORTS or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_every_folder_is_in_the_order_and_its_init_is_empty():
    entries = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert entries <= RANK.keys()
    assert {module(path)[0] for path in FILES} == RANK.keys()
    assert all((PACKAGE / entry / "__init__.py").read_bytes() == b"" for entry in entries)


def test_importing_the_package_loads_neither_data_frames_nor_databases_nor_plots():
    heavy = ["datasets", "ibis", "duckdb", "pyarrow", "pandas", "matplotlib", "onnx", "faiss", "sqlglot"]
    code = (
        "import sys, torch, transformers\n"
        "before = set(sys.modules)\n"
        "import bert4rec_hf\n"
        f"print([name for name in {heavy!r} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
