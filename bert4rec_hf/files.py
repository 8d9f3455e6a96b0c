"""Atomic writing: files and folders are written beside their destination and moved there when they are complete."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


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
