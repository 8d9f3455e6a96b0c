"""Atomic writing: files and folders are written beside their place and moved there when they are complete."""

import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, so that a reader never sees half of it."""
    with file_beside(path) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """A file to write, which replaces the one at `path` when the block ends, and is removed if it fails."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}.new")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def files_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved into `folder` when the block ends, over those of the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        yield Path(temporary)
        for path in Path(temporary).iterdir():
            os.replace(path, folder / path.name)


@contextmanager
def folder_beside(
    destination: Path, *, last_file: str, own_files: Callable[[Path], Collection[str]] | None = None
) -> Iterator[Path]:
    """A folder to fill, which takes the place of `destination` when the block ends, and is removed if it fails.

    Args:
        destination: The folder to write: missing, empty, or one to replace. An empty one stays and is filled: it may be
            a volume, or in a folder of somebody else's.
        last_file: The file that makes a folder whole; it is moved last into an empty destination.
        own_files: Called when the block has ended, with a destination that is not empty. Returns the names that are
            replaced; other files stay. Raises if the folder is not ours. None: the destination must be empty.

    Raises:
        ValueError: If an empty destination is no longer empty.
    """
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    is_empty = destination.is_dir() and not any(destination.iterdir())
    beside = destination if is_empty else destination.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{destination.name}-") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        if not destination.exists():
            os.rename(folder, destination)
        elif is_empty or own_files is None:
            others = [path.name for path in destination.iterdir() if path not in folder.parents]
            if others:
                raise ValueError(f"{destination} was empty and now holds {others[0]}: choose another --output")
            for path in sorted(folder.iterdir(), key=lambda path: path.name == last_file):
                os.rename(path, destination / path.name)
        else:
            _replace_folder(folder, destination, Path(temporary) / "old", own_files(destination))


def _replace_folder(folder: Path, destination: Path, old: Path, own_files: Collection[str]) -> None:
    """Move the destination to `old`, the folder into its place, and files that are not ours back into it."""
    os.rename(destination, old)
    try:
        os.rename(folder, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    for path in old.iterdir():
        if path.name not in own_files and not (destination / path.name).exists():
            os.rename(path, destination / path.name)
