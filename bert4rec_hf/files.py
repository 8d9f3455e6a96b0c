"""Atomic writing: files and folders are written beside their destination and moved there when they are complete.

What is not complete has the name `.NAME.RANDOM.new`, beside or in the folder NAME. An error or a signal removes it. A
process that is killed leaves it, and the next one that writes NAME tells the user about it.
"""

import ctypes
import errno
import glob
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

logger = logging.getLogger(__name__)

UNFINISHED = ".{name}.{random}.new"
# In an unfinished folder: the new folder, and a file with the names of what moves from it into a folder that was empty.
NEW, MOVING = "new", "moving"
# Arguments of Linux's renameat2: paths are relative to the working folder, and the two paths change places.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def finished(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name, without what a process that was killed left unfinished."""
    left, moved = [], set()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and path.name.endswith(".new"):
            if (path / MOVING).is_file() and any((path / NEW).iterdir()):
                moved.update((path / MOVING).read_text("utf-8").split("/"))
        else:
            left.append(path)
    return [path for path in left if path.name not in moved]


def unfinished_folder(path: Path) -> Path:
    """The folder beside `path` in which all processes of a launch write what will be `path`."""
    return path.with_name(UNFINISHED.format(name=path.name, random="launch"))


def name_unfinished(parent: Path, name: str) -> None:
    """Warn about each file or folder that a process which was killed left in `parent` while it wrote `name`.

    They stay, since they may also be of another process that writes at the same time, maybe on another machine.
    """
    for path in sorted(parent.glob(UNFINISHED.format(name=glob.escape(name), random="*"))):
        logger.warning("%s is unfinished: another process writes it now, or was killed; in that case, remove it", path)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically, so that a reader never sees half of it."""
    with file_beside(path) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces `path` when the block ends, and is removed if the block fails."""
    name_unfinished(path.parent, path.name)
    beside = path.with_name(UNFINISHED.format(name=path.name, random=uuid4().hex))
    try:
        with _names_full_disk(path):
            yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def files_beside(folder: Path, *, last_file: str | None = None, own_files: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder. When the block ends, its files replace those of the same names in `folder`.

    If the process is killed between two moves, `last_file` is missing, so that nobody reads new files beside old ones.

    Args:
        folder: The folder to write into.
        last_file: The name of the file that describes the others. It is removed first and moved last.
        own_files: Names of files of `folder` that belong to the old files. They are removed if there are no new ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder, folder.resolve().name) as temporary:
        yield temporary
        _move_entries(temporary, folder, last_file, own_files)


@contextmanager
def folder_beside(
    destination: Path, *, last_file: str, own_files: Callable[[Path], Collection[str]] | None = None
) -> Iterator[Path]:
    """Yield a folder to fill. It replaces `destination` when the block ends, and is removed if the block fails.

    Args:
        destination: The folder to write. It is missing, empty, or a folder to replace. An empty folder, a volume, and a
            folder in a parent that is not writable are not replaced but filled.
        last_file: The file that marks a folder as complete. Where a folder is filled, it is removed first and moved
            last.
        own_files: Called at the end of the block with a destination that is not empty. Returns the names of the files
            to replace; other files stay. Raises if the destination must not be replaced. None: the destination must be
            empty.

    Raises:
        ValueError: If an empty destination is no longer empty.
    """
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    is_empty = destination.is_dir() and not finished(destination)
    is_fixed = destination.is_dir() and (destination.is_mount() or not os.access(destination.parent, os.W_OK))
    beside = destination if is_empty or is_fixed else destination.parent
    with _temporary_folder(beside, destination.name) as temporary:
        folder = temporary / NEW
        folder.mkdir()
        yield folder
        if not destination.exists():
            os.rename(folder, destination)
        elif is_empty or own_files is None:
            others = [path.name for path in finished(destination)]
            if others:
                raise ValueError(f"{destination} was empty before and now holds {others[0]}: choose another --output")
            earlier = list(destination.glob(f".*.new/{MOVING}"))
            # Where the process is killed between two moves, the next one finds the list and fills the folder anew.
            (temporary / MOVING).write_text("/".join(path.name for path in folder.iterdir()), "utf-8")
            for path in earlier:
                path.unlink()
            _move_entries(folder, destination, last_file)
        else:
            names = own_files(destination)
            if is_fixed:
                _move_entries(folder, destination, last_file, names)
            else:
                with _signals_held():  # an interrupt between two moves would lose the destination
                    replace_folder(folder, destination, temporary / "old", names)


def _move_entries(source: Path, folder: Path, last_file: str | None, own_files: Collection[str] = ()) -> None:
    """Move all that is in `source` into a folder, in place of what has the same names or is in `own_files`."""
    with _signals_held():
        paths = sorted(source.iterdir(), key=lambda path: path.name == last_file)
        if last_file is not None and len(paths) > 1:
            (folder / last_file).unlink(missing_ok=True)
        for name in {*own_files, *(path.name for path in paths if path.is_dir())}:
            old = folder / name
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            elif not (source / name).exists():
                old.unlink(missing_ok=True)
        for path in paths:
            os.replace(path, folder / path.name)


def replace_folder(folder: Path, destination: Path, old: Path, own_files: Collection[str]) -> None:
    """Move a folder into the place of another one.

    At each moment the destination is the old folder or the new one, and has the files that are not replaced. So a
    process that is killed here loses nothing.

    Args:
        folder: The new folder.
        destination: The folder to replace.
        old: Where the old folder goes.
        own_files: The names of the files to replace. The others are in the new folder too.

    Raises:
        OSError: If a folder that must stay is a volume, which cannot be moved.
    """
    for path in destination.iterdir():
        if path.name not in own_files and path.is_mount():
            raise OSError(f"{path} is a volume, so {destination} cannot be replaced: choose another folder")
        if path.name not in own_files and not (folder / path.name).exists():
            _link(path, folder / path.name)
    _exchange(folder, destination, old)
    for path in old.iterdir():
        # These are new, or on a file system without links.
        if path.name not in own_files and not (destination / path.name).exists():
            os.rename(path, destination / path.name)


def _link(path: Path, other: Path) -> None:
    """Give a file, or a folder with all that it has, a second name. Nothing happens if the file system cannot."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, other, symlinks=True, copy_function=os.link)
        else:
            os.link(path, other, follow_symlinks=False)
    except (OSError, shutil.Error):
        if other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)


def _exchange(folder: Path, destination: Path, old: Path) -> None:
    """Move the destination to `old` and the folder into its place, in one step where the file system can."""
    # Linux has this function, Python does not offer it.
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = os.fsencode(folder), os.fsencode(destination)
    if rename is not None and rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        os.rename(folder, old)
        return
    os.rename(destination, old)
    try:
        os.rename(folder, destination)
    except BaseException:
        os.rename(old, destination)
        raise


@contextmanager
def _temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder in `parent` for what will be `name`, and remove it when the block ends.

    When a process of a launch fails, the others get an error, and soon afterwards a signal, which must not interrupt
    the removal that the error has begun.
    """
    name_unfinished(parent, name)
    prefix, suffix = UNFINISHED.format(name=name, random="/").split("/")
    temporary = None
    try:
        with _signals_held():  # an interrupt here would leave a folder that nothing removes
            temporary = tempfile.TemporaryDirectory(dir=parent, prefix=prefix, suffix=suffix)
        with _names_full_disk(parent):
            yield Path(temporary.name)
    finally:
        if temporary is not None:
            with _signals_held():
                temporary.cleanup()


@contextmanager
def _names_full_disk(path: Path) -> Iterator[None]:
    """Add the place to the error of a full disk, which names none where it comes from writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = os.fspath(path)
        raise


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
