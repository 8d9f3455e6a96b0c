"""What mkdocs.yml builds beside the pages of docs/: nothing here is a copy that could go stale.

- Pages from elsewhere in the repository: notebooks/ as tutorials, benchmarks/results/ as benchmarks.
- Links of docs/ to files outside docs/, which work where the repository is read, lead to these pages on the site.
- A line `<!-- generated: NAME -->` is replaced by what the function NAME below makes from the package.
"""

import argparse
import contextlib
import dataclasses
import html
import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import nbconvert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
GENERATED = re.compile(r"^<!-- generated: (\w+)((?: [\w-]+)*) -->$", re.MULTILINE)
# Where files of the repository are found on the site, by the beginning of their path.
ON_THE_SITE = {
    "benchmarks/results/": "benchmarks/",
    "benchmarks/pictures/": "benchmarks/pictures/",
}
# Files that are shown on a page, each under a heading of its own.
SHOWN_ON = {"recipes": "reference/recipes.md", "examples": "how-to/own-training-code.md"}


def on_config(config: Any) -> None:
    """The navigation of the pages from elsewhere."""
    for section in config.nav:
        ((title, pages),) = section.items()
        if title == "Tutorials":
            pages += [f"tutorials/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
        if title == "Benchmarks":
            pages += [f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))]


def on_files(files: Files, config: Any) -> Files:
    """The pages from elsewhere."""
    for folder, place in ON_THE_SITE.items():
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in (".md", ".png", ".svg"):
                files.append(File.generated(config, f"{place}{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, found = nbconvert.MarkdownExporter().from_filename(path)
        for name, picture in found["outputs"].items():
            text = text.replace(f"({name})", f"({path.stem}-{name})")
            files.append(File.generated(config, f"tutorials/{path.stem}-{name}", content=picture))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside docs/, and what is generated."""
    if page.file.abs_src_path is not None:
        source = Path(page.file.abs_src_path)
        markdown = LINK.sub(lambda found: _site_link(found, source, page.file.src_uri), markdown)
    return GENERATED.sub(lambda found: globals()[found[1]](*found[2].split()), markdown)


def _site_link(found: re.Match, source: Path, page: str) -> str:
    target = Path(os.path.normpath(source.parent / found[2]))
    try:
        path = target.relative_to(ROOT).as_posix() + ("/" if found[2].endswith("/") else "")
    except ValueError:
        return found[0]
    if path.startswith("docs/"):
        place, anchor = path.removeprefix("docs/"), found[3]
    else:
        if not target.exists():
            return found[0]  # the build says that there is no such file
        folder = path.partition("/")[0]
        if folder == "notebooks":
            place, anchor = f"tutorials/{target.stem}.md", found[3]
        elif folder in SHOWN_ON:
            place, anchor = SHOWN_ON[folder], f"#{_anchor(path)})" if target.is_file() else ")"
        else:
            prefix = next((prefix for prefix in ON_THE_SITE if path.startswith(prefix)), None)
            if prefix is None:
                return found[0]
            place, anchor = ON_THE_SITE[prefix] + path.removeprefix(prefix), found[3]
    return f"{found[1]}{posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor}"


def _anchor(path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.lower()).strip("-")


def recipes() -> str:
    """Every recipe, under its path."""
    return _shown_files(sorted((ROOT / "recipes").rglob("*.yaml")), "yaml")


def examples() -> str:
    """Every example, under its path."""
    return _shown_files(sorted((ROOT / "examples").glob("*.py")), "python")


def _shown_files(paths: Iterable[Path], language: str) -> str:
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return "\n\n".join(
        f"## {name} {{ #{_anchor(name)} }}\n\n```{language}\n{(ROOT / name).read_text('utf-8').rstrip()}\n```"
        for name in names
    )


def command_line() -> str:
    """Every subcommand with its options, from the parsers."""
    from bert4rec_hf import Bert4RecTrainingArguments, cli

    parts = []
    for name in cli.COMMANDS:
        parser = _parser(name)
        positional = [action for action in parser._actions if not action.option_strings]
        options = [action for action in parser._actions if action.option_strings and action.dest != "help"]
        usage = " ".join(["bert4rec", name, *(action.dest.upper() for action in positional), "[OPTIONS]"])
        parts += [f"## bert4rec {name}", parser.description or "", f"```console\n$ {usage}\n```"]
        if positional:
            parts.append(_table(("argument", "meaning"), [(f"`{a.dest}`", _help(a)) for a in positional]))
        if name == "train":
            own = Bert4RecTrainingArguments.__annotations__
            groups: dict[str, list[argparse.Action]] = {"Data and model": [], "Training": [], "Architecture": []}
            groups["Other options of Transformers' TrainingArguments"] = []
            inherited = {field.name for field in dataclasses.fields(Bert4RecTrainingArguments)} - own.keys()
            for action in options:
                if (action.help or "").startswith("Architecture."):
                    groups["Architecture"].append(action)
                elif action.dest in own:
                    groups["Training"].append(action)
                elif action.dest in inherited:
                    groups["Other options of Transformers' TrainingArguments"].append(action)
                else:
                    groups["Data and model"].append(action)
            for title, actions in groups.items():
                parts += [f"### {title}", _options(actions)]
        else:
            parts.append(_options(options))
    return "\n\n".join(parts)


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser that a subcommand makes: the one that prints the help."""
    from bert4rec_hf import cli

    found: list[argparse.ArgumentParser] = []
    catch = mock.patch.object(cli.Parser, "print_help", lambda self, file=None: found.append(self))
    with catch, contextlib.suppress(SystemExit):
        cli.COMMANDS[command](["--help"])
    return found[0]


def _options(actions: Iterable[argparse.Action]) -> str:
    rows = []
    for action in actions:
        # The parser takes hyphens as well as underscores, and --no_NAME for flags: the table has one spelling.
        names = [name for name in action.option_strings if name.startswith("--") and "-" not in name[2:]]
        if not names or names[0].startswith("--no_"):
            continue
        default = "" if action.default is None or action.default == argparse.SUPPRESS else f"`{action.default}`"
        rows.append((f"`{names[0]}`", _help(action), default))
    return _table(("option", "meaning", "default"), rows)


def _help(action: argparse.Action) -> str:
    text = " ".join((action.help or "").removeprefix("Architecture. ").replace("%%", "%").split())
    choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
    is_flag = set(action.choices or ()) <= {True, False}
    text += " Required." if action.required and action.option_strings else ""
    return html.escape(text, quote=False) + (f" One of {choices}." if choices and not is_flag else "")


def dataclass_fields(name: str) -> str:
    """The fields that a public dataclass declares itself: type, default, help."""
    import bert4rec_hf

    kind = getattr(bert4rec_hf, name)
    rows = []
    for field in dataclasses.fields(kind):
        if field.name not in kind.__annotations__:
            continue
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default  # type: ignore[misc]
        choices = ", ".join(f"`{choice}`" for choice in field.metadata.get("choices", ()))
        text = html.escape(" ".join(field.metadata.get("help", "").split()), quote=False)
        rows.append((f"`{field.name}`", text + (f" One of {choices}." if choices else ""), f"`{default}`"))
    return _table(("field", "meaning", "default"), rows)


def config_fields() -> str:
    """The fields of Bert4RecConfig: what its docstring says, and the defaults of the class."""
    from bert4rec_hf import Bert4RecConfig

    pattern = r"^ {8}(\w+) \(.*\):\n((?: {12}.*\n)+)"
    described = dict(re.findall(pattern, Bert4RecConfig.__doc__ or "", re.MULTILINE))
    rows = []
    for name in Bert4RecConfig.__annotations__:
        if hasattr(Bert4RecConfig, name) and name in described:
            rows.append((f"`{name}`", " ".join(described[name].split()), f"`{getattr(Bert4RecConfig, name)}`"))
    return _table(("field", "meaning", "default"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
