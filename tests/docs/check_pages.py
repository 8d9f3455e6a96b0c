"""Checks of the documentation site beyond `mkdocs build --strict`, which `make docs` runs and `make test` does not.

- The Python blocks of README.md and of each page run. The blocks of one page run in order, in one process, in a
  folder with a small log `events-*.parquet`, the prepared folder `data` and the model folder `model`. A block below
  `<!-- not run: REASON -->` is left out.
- Every public name has a docstring and an entry in the reference; every option of the command line is in it too.
- Every file of the repository that a page names or links to exists, since pages are read in the repository too.
"""

import ast
import inspect
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bert4rec_hf
from bert4rec_hf import cli

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = ROOT / "build" / "site"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"((?:^[^\n]*\n)?)^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
# A path in backticks that begins with a folder of the repository.
NAMED_FILE = re.compile(r"`((?:benchmarks|bert4rec_hf|docs|examples|notebooks|recipes|tests)/[\w./-]+\.\w+)`")
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")
TEXTS = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
NUM_USERS, NUM_ITEMS = 80, 200


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, without those that are marked as not run."""
    found = BLOCK.findall(page.read_text("utf-8"))
    return [inspect.cleandoc("\n" + code) for before, _, code in found if not NOT_RUN.fullmatch(before.strip())]


WITH_BLOCKS = [page for page in PAGES if blocks(page)]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with the log, the prepared folder and the model folder that pages use."""
    folder = tmp_path_factory.mktemp("pages")
    chance = random.Random(0)
    for part in (1, 2):
        rows = []
        for user in range(part, NUM_USERS, 2):
            item = chance.randrange(NUM_ITEMS)
            for time in range(chance.randrange(5, 30)):
                rows.append({"uid": f"u{user}", "sku": str(item + 1), "ts": time})
                item = (item + 7) % NUM_ITEMS if chance.random() < 0.7 else chance.randrange(NUM_ITEMS)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"events-{part}.parquet")
    titles = {str(item + 1): f"Film {item + 1}" for item in range(NUM_ITEMS)}
    bert4rec_hf.prepare(
        str(folder / "events-*.parquet"), folder / "data", user_column="uid", item_column="sku", time_column="ts",
        item_titles=titles,
    )  # fmt: skip
    arguments = bert4rec_hf.Bert4RecTrainingArguments(
        str(folder / "model"), num_train_epochs=1, use_cpu=True, disable_tqdm=True
    )
    bert4rec_hf.train_prepared(folder / "data", arguments, hidden_size=32)
    return folder


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=[page.relative_to(ROOT).as_posix() for page in WITH_BLOCKS])
def test_the_blocks_of_a_page_run(page, workplace, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(workplace, folder)
    # README.md and the quickstart use folders in `quickstart`.
    shutil.copytree(workplace / "model", folder / "quickstart" / "model")
    code = "\n\n".join(blocks(page))
    ast.parse(code)
    (folder / "page.py").write_text(code, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", TEXTS, ids=[page.relative_to(ROOT).as_posix() for page in TEXTS])
def test_a_page_names_files_that_are_there(page):
    text = page.read_text("utf-8")
    for name in NAMED_FILE.findall(text):
        assert (ROOT / name).exists(), name
    for link in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        assert (page.parent / link).exists(), link


@pytest.fixture(scope="module")
def reference() -> set[str]:
    """The names that the built site documents."""
    found: set[str] = set()
    for page in (SITE / "reference").rglob("index.html"):
        found |= set(re.findall(r'id="([\w.]+)"', page.read_text("utf-8")))
    return found


@pytest.mark.parametrize("name", bert4rec_hf.__all__)
def test_a_public_name_is_documented(reference, name):
    assert f"bert4rec_hf.{name}" in reference
    value = getattr(bert4rec_hf, name)
    assert not callable(value) or inspect.getdoc(value)


def test_every_option_of_every_command_is_in_the_reference(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = (SITE / "reference" / "command-line" / "index.html").read_text("utf-8")
    sections = re.split(r'<h2 id="bert4rec-([\w-]+)"', page)
    shown = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(shown) == list(cli.COMMANDS)
    for command, text in shown.items():
        with pytest.raises(SystemExit):
            cli.COMMANDS[command](["--help"])
        options = set(re.findall(r"^  (?:-h, )?(--\w+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
        assert "--config" in options or command == "convert-config"
        missing = {option for option in options if f"<code>{option}</code>" not in text}
        assert not {option for option in missing if not option.startswith("--no_")}, command


def test_a_page_with_a_wrong_block_is_noticed(workplace, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n<!-- not run: needs a GPU -->\n```python\nraise SystemExit(3)\n```\n\n"
                    "```python\nprint(1)\n```\n\n- In a list:\n\n    ```python\n    print(2)\n    ```\n")  # fmt: skip
    assert blocks(page) == ["print(1)", "print(2)"]
    page.write_text("```python\nimport bert4rec_hf.nothing\n```\n")
    with pytest.raises(AssertionError, match="No module named"):
        test_the_blocks_of_a_page_run(page, workplace, tmp_path)
