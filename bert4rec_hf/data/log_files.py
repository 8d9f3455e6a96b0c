"""Finding the files of a log: patterns, folders, remote paths, compressed files; and what kind of file each is."""

import bz2
import glob
import gzip
import io
import os
import shutil
import tempfile
import urllib.parse
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from .named_datasets import NAMED_DATASETS

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
REFUSED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"\x04\x22\x4d\x18": "compressed with lz4: recompress it with gzip, zstd or bzip2",
    b"\xfd7zXZ\x00": "compressed with xz: recompress it with gzip, zstd or bzip2",
    b"ORC\n": "ORC: convert it to Parquet",
    b"Obj\x01": "Avro: convert it to Parquet",
    b"\xff\xfe": "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
}
CHUNK_SIZE = 1 << 22
# A compressed file may have this number of times its size in it, and this number of bytes more.
MAX_UNPACKED_RATIO, MAX_UNPACKED_BYTES = 100, 1 << 30


@dataclass
class LogFiles:
    """The files of a log, on the local disk and uncompressed.

    Attributes:
        source: What the user named.
        paths: The files to read, in order.
        spelled: For each of `paths`, the name of the file in messages. Remote and packed files are read from copies.
        partitions: For each of `paths`, the keys and values of folders such as day=2026-01-31.
    """

    source: str
    paths: list[str]
    spelled: dict[str, str]
    partitions: dict[str, dict[str, str | None]] = field(default_factory=dict)


def find_files(source: str | Path | Sequence[str | Path]) -> LogFiles:
    """Find the files of a log. Remote files are copied, and compressed files are unpacked, into a temporary folder.

    Args:
        source: A path, a pattern, a folder, or a list of these. A path with :// is read through fsspec.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is empty, or damaged, or of a kind that cannot be read.
    """
    given = [source] if isinstance(source, str | Path) else list(source)
    if not given:
        raise ValueError("expected the files of a log; got an empty list")
    for item in given:
        if not isinstance(item, str | Path):
            raise TypeError(f"expected paths in a list of files; got {type(item).__name__}: {item!r}")
    name = str(given[0]) if len(given) == 1 else f"{given[0]} and {len(given) - 1} more"
    folder = tempfile.mkdtemp(prefix="bert4rec-")
    found = LogFiles(name, [], {})
    # The copies are removed when nothing refers to the files any more.
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    for item in given:
        text = os.fspath(item)
        for root, path, spelled in _remote(text, folder) if "://" in text else _local(text):
            if os.path.getsize(path) == 0:
                raise ValueError(f"{spelled} is empty; expected CSV with a header, JSON lines, or Parquet")
            plain = _unpacked(path, spelled, folder)
            found.paths.append(plain)
            found.spelled[plain] = spelled
            found.partitions[plain] = _partitions(os.path.relpath(path, root))
    return found


def _local(text: str) -> list[tuple[str, str, str]]:
    """For each file: the folder below which partitions are looked for, its path, and its path in messages."""
    text = os.path.expanduser(text)
    if os.path.isfile(text):
        return [(os.path.dirname(text), text, text)]
    if os.path.isdir(text):
        paths = sorted(os.path.join(here, name) for here, _, names in os.walk(text) for name in names)
        paths = [path for path in paths if not _is_hidden(os.path.relpath(path, text))]
        if not paths:
            raise FileNotFoundError(f"the folder {text} has no files; expected CSV, JSON lines or Parquet in it")
        return [(text, path, path) for path in paths]
    if glob.has_magic(text):
        paths = sorted(path for path in glob.glob(text, recursive=True) if os.path.isfile(path))
        if not paths:
            raise FileNotFoundError(f"no file matches {text}")
        root = text[: min(text.index(mark) for mark in "*?[" if mark in text)].rpartition(os.sep)[0] or os.curdir
        return [(root, path, path) for path in paths]
    is_a_name = os.path.basename(text) == text and not os.path.splitext(text)[1]
    known = f", or the name of a data set that prepare fetches: {', '.join(NAMED_DATASETS)}" if is_a_name else ""
    raise FileNotFoundError(
        f"no such file: {text}; expected a file, a folder or a pattern of CSV, JSON lines or Parquet{known}"
    )


def _remote(url: str, folder: str) -> list[tuple[str, str, str]]:
    import fsspec

    root = tempfile.mkdtemp(dir=folder)
    try:
        files, path = fsspec.core.url_to_fs(url)
        protocol = url.partition("://")[0]
        if glob.has_magic(path) and protocol not in ("http", "https"):
            paths = sorted(str(found) for found in files.glob(path) if files.isfile(found))
        elif protocol not in ("http", "https") and files.isdir(path):
            paths = sorted(str(found) for found in files.find(path))
        else:
            paths = [path]
        base = os.path.commonpath([os.path.dirname(found) for found in paths]) if paths else ""
        # With http, the query belongs to the address and not to the name.
        names = [urllib.parse.unquote(os.path.relpath(found.partition("?")[0], base)) for found in paths]
        chosen = [pair for pair in zip(paths, names, strict=True) if not _is_hidden(pair[1])]
        for found, name in chosen:
            local = _below(root, name)
            os.makedirs(os.path.dirname(local), exist_ok=True)
            files.get_file(found, local)
    except ImportError as error:
        raise ValueError(f"cannot read {url}: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {url}") from error
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"cannot read {url}: {type(error).__name__}: {error}") from error
    if not chosen:
        raise FileNotFoundError(f"no file matches {url}")
    return [(root, _below(root, name), url if len(chosen) == 1 else f"{url} ({name})") for _, name in chosen]


def _below(root: str, name: str) -> str:
    """The path of a name in a folder, which a name such as ../x does not leave."""
    return root + os.path.normpath(os.sep + name)


def _is_hidden(path: str) -> bool:
    """Whether a file is one that Spark, Hadoop and others write beside the data, such as _SUCCESS and .part.crc."""
    return any(part.startswith((".", "_")) and "=" not in part for part in Path(path).parts)


def _partitions(path: str) -> dict[str, str | None]:
    pairs = [part.split("=", 1) for part in Path(path).parts[:-1] if "=" in part]
    values = {urllib.parse.unquote(key): urllib.parse.unquote(value) for key, value in pairs}
    return {key: None if value == "__HIVE_DEFAULT_PARTITION__" else value for key, value in values.items()}


def _unpacked(path: str, spelled: str, folder: str) -> str:
    """The path itself; or of a compressed file that of its content, which is read to its end and checked."""
    with open(path, "rb") as file:
        start = file.read(8)
    for mark, what in REFUSED.items():
        if start.startswith(mark):
            raise ValueError(f"{spelled} is {what}")
    kind = next((kind for mark, kind in COMPRESSIONS.items() if start.startswith(mark)), None)
    if kind is None:
        return path
    handle, plain = tempfile.mkstemp(dir=folder)
    try:
        with open(path, "rb") as packed, os.fdopen(handle, "wb") as target, OPENERS[kind](packed) as reader:
            left = MAX_UNPACKED_RATIO * os.path.getsize(path) + MAX_UNPACKED_BYTES
            while content := reader.read(CHUNK_SIZE):
                left -= len(content)
                if left < 0:
                    raise ValueError(
                        f"it has more than {MAX_UNPACKED_RATIO} times its size in it, as no log has: unpack it "
                        "yourself, if you trust it"
                    )
                target.write(content)
    except (EOFError, OSError, zlib.error, ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"{spelled} is damaged: it cannot be unpacked with {kind} to its end ({error}); copy or write it again"
        ) from error
    if os.path.getsize(plain) == 0:
        raise ValueError(f"{spelled} holds nothing, once unpacked; expected CSV with a header, JSON lines, or Parquet")
    return _unpacked(plain, spelled, folder)


def _open_zstd(file: BinaryIO) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


class _BZ2Reader(io.RawIOBase):
    """The content of all streams of a bzip2 file. `bz2.open` takes a damaged later stream for the end of the file."""

    def __init__(self, file: BinaryIO):
        self.file, self.stream = file, bz2.BZ2Decompressor()

    def read(self, size: int = -1) -> bytes:
        while True:
            if self.stream.eof:
                rest = self.stream.unused_data or self.file.read(CHUNK_SIZE)
                if not rest:
                    return b""
                self.stream = bz2.BZ2Decompressor()
            else:
                rest = self.file.read(CHUNK_SIZE) if self.stream.needs_input else b""
                if not rest and self.stream.needs_input:
                    raise EOFError("the file ends early")
            content = self.stream.decompress(rest, CHUNK_SIZE)
            if content:
                return content


OPENERS: dict[str, Any] = {"gzip": gzip.open, "bz2": _BZ2Reader, "zstd": _open_zstd}


def is_parquet(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def is_json(path: str) -> bool:
    """Whether the file begins as JSON does, with an object or a list of objects."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"{") or (start.startswith(b"[") and start[1:].lstrip().startswith((b"{", b"]")))
