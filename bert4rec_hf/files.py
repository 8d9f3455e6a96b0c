"""Reading JSON and YAML that may be damaged or hostile. Writing beside a destination, and moving what is complete."""

import json
import os
import signal
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

# Number of values that a YAML file may have, each counted as often as it is referred to. Aliases of aliases would make
# a short file endless.
MAX_YAML_VALUES = 100_000
JOINERS = "\u200c\u200d"


def read_json(path: str | os.PathLike, form: Any = object, *, hint: str = "copy or write it again") -> Any:
    """Read a JSON file, and check that it has the values that its readers use.

    Args:
        path: The file.
        form: What it holds: a type; a union of types; a list of one form, that of all elements; or a mapping of keys to
            forms, where a key that ends with "?" may be missing or null, and "*" stands for all other keys. A `float`
            may be an integer, and no number may be a boolean.
        hint: What to do about a file that is damaged.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no JSON, is nested too deeply, or has another form.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        _check_form(content, form, "")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {hint}") from error
    return content


def read_yaml(path: str | os.PathLike, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """Read a YAML file of keys and values. An empty file has none.

    Args:
        path: The file.
        loader: A safe loader of PyYAML.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no YAML, is nested too deeply, has too many values, or is no mapping of texts to values.
    """
    try:
        # This loader is safe, as are all that are derived from it or from BaseLoader.
        content = yaml.load(Path(path).read_text("utf-8"), Loader=loader)
        _check_size(content)
    except (ValueError, OverflowError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must be a mapping of names to values; got {content!r:.100}")
    return content


def inert(text: str) -> str:
    """A text whose control characters are spelled out, so that it does nothing but be read.

    These are the escape sequences of a terminal, line ends of any kind, and marks that change the direction of what
    follows. The joiners of emoji and of Persian and Indic scripts stay.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
        else character
        for character in text
    )


def _check_form(value: Any, form: Any, place: str) -> None:
    where = place or "the content"
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object; got {value!r:.80}")
        known = [key.removesuffix("?") for key in form]
        for key, part in form.items():
            name = key.removesuffix("?")
            if key == "*":
                for other in value.keys() - set(known):
                    _check_form(value[other], part, f"{place}/{other}")
            elif name not in value and not key.endswith("?"):
                raise ValueError(f"{where} lacks {name!r}")
            elif value.get(name) is not None or not key.endswith("?"):
                _check_form(value[name], part, f"{place}/{name}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list; got {value!r:.80}")
        for number, element in enumerate(value):
            _check_form(element, form[0], f"{place}/{number}")
    else:
        kinds = form | int if form is float else form
        is_bool = isinstance(value, bool)
        is_odd = is_bool != (form is bool) or (isinstance(value, int) and abs(value) >= 2**63)
        if form is not object and (not isinstance(value, kinds) or is_odd):
            raise ValueError(f"{where} must be of type {getattr(form, '__name__', form)}; got {value!r:.80}")


def _check_size(content: Any) -> None:
    """Raise ValueError if a value has too many values in it, or has itself."""
    left, number = [content], 0
    while left:
        value = left.pop()
        number += 1
        if number > MAX_YAML_VALUES:
            raise ValueError(f"it has more than {MAX_YAML_VALUES:,} values, also through aliases")
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically, so that a reader never sees half of it."""
    with file_beside(path) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces `path` when the block ends, and is removed if the block fails."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}.new")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def files_beside(folder: Path, *, last_file: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder. When the block ends, its files replace those of the same names in `folder`.

    Args:
        folder: The folder to write into.
        last_file: The name of the file that is moved last, since it describes the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder) as temporary:
        yield temporary
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == last_file):
            os.replace(path, folder / path.name)


@contextmanager
def folder_beside(
    destination: Path, *, last_file: str, own_files: Callable[[Path], Collection[str]] | None = None
) -> Iterator[Path]:
    """Yield a folder to fill. It replaces `destination` when the block ends, and is removed if the block fails.

    Args:
        destination: The folder to write. It is missing, empty, or a folder to replace. An empty folder is not replaced
            but filled, since it may be a volume, or its parent may not be writable.
        last_file: The file that marks a folder as complete. It is moved last into an empty destination.
        own_files: Called at the end of the block with a destination that is not empty. Returns the names of the files
            to replace; other files stay. Raises if the destination must not be replaced. None: the destination must be
            empty.

    Raises:
        ValueError: If an empty destination is no longer empty.
    """
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    is_empty = destination.is_dir() and not any(destination.iterdir())
    beside = destination if is_empty else destination.parent
    with _temporary_folder(beside, f".{destination.name}-") as temporary:
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        if not destination.exists():
            os.rename(folder, destination)
        elif is_empty or own_files is None:
            others = [path.name for path in destination.iterdir() if path not in folder.parents]
            if others:
                raise ValueError(f"{destination} was empty before and now holds {others[0]}: choose another --output")
            for path in sorted(folder.iterdir(), key=lambda path: path.name == last_file):
                os.rename(path, destination / path.name)
        else:
            names = own_files(destination)
            with _signals_held():  # an interrupt between two moves would lose the destination
                _replace_folder(folder, destination, temporary / "old", names)


def _replace_folder(folder: Path, destination: Path, old: Path, own_files: Collection[str]) -> None:
    """Move the destination to `old` and the folder into its place. Files that are not in `own_files` are moved back."""
    os.rename(destination, old)
    try:
        os.rename(folder, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    for path in old.iterdir():
        if path.name not in own_files and not (destination / path.name).exists():
            os.rename(path, destination / path.name)


@contextmanager
def _temporary_folder(parent: Path, prefix: str | None = None) -> Iterator[Path]:
    """Make a folder in `parent`, and remove it when the block ends.

    When a process of a launch fails, the others get an error, and soon afterwards a signal, which must not interrupt
    the removal that the error has begun.
    """
    temporary = tempfile.TemporaryDirectory(dir=parent, prefix=prefix)
    try:
        yield Path(temporary.name)
    finally:
        with _signals_held():
            temporary.cleanup()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the block ends."""
    held: list[int] = []
    handlers: dict[int, Any] = {}
    try:
        # Python runs handlers in the main thread, which alone may set them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.getsignal(number)
                if handlers[number] is not None:  # None: a handler that is not of Python and could not be set again
                    signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for held_number, handler in handlers.items():
            if handler is not None:
                signal.signal(held_number, handler)
        if held:
            signal.raise_signal(held[0])
