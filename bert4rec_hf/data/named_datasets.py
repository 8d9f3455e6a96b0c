"""Public logs by name: their sources, checksums, columns and terms of use."""

import csv
import hashlib
import io
import logging
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..files import write_file

logger = logging.getLogger(__name__)

LOG_FILE = "log.csv"
ITEMS_FILE = "item_table.csv"
CHECKSUMS_FILE = "SHA256SUMS"
TIMEOUT = 10  # seconds

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_MD5 = "0e33842e24a9c977be4e0107933c0723"  # published beside the file, ml-100k.zip.md5
WHEEL = "recbole==1.2.1"
WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
WHEEL_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}

# In the order of the columns of u.item, which u.genre names.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

Files = dict[str, bytes]


@dataclass(frozen=True)
class NamedDataset:
    """A downloaded public log, with the column names that `prepare` expects by default."""

    log: Path
    items: Path  # columns item_id, title, year and genres, separated by |


@dataclass(frozen=True)
class _Recipe:
    """How a named dataset is downloaded and converted.

    Attributes:
        sources: For each address, the function that fetches `LOG_FILE` and `ITEMS_FILE` from it. The first source that
            works is used.
        log_sha256: Checksum of `LOG_FILE`; it is the same for every source.
        license: The terms of use in one line.
        citation: The reference to cite in publications.
    """

    sources: dict[str, Callable[[], Files]]
    log_sha256: str
    license: str
    citation: str


def fetch(name: str) -> NamedDataset:
    """Return a named dataset from the cache, or download it. A download prints the terms of use on stderr.

    Raises:
        ValueError: If the name is unknown.
        OSError: If no source can be reached, or the downloaded file has another checksum.
    """
    if name not in NAMED_DATASETS:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(NAMED_DATASETS)}, or give a file")
    recipe = NAMED_DATASETS[name]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bert4rec_hf" / name
    if not _is_intact(folder, recipe):
        print(f"{name}: {recipe.license} Cite {recipe.citation}", file=sys.stderr)
        _store(folder, _download(name, recipe))
    return NamedDataset(log=folder / LOG_FILE, items=folder / ITEMS_FILE)


def _download(name: str, recipe: _Recipe) -> Files:
    failures = []
    for address, source in recipe.sources.items():
        try:
            files = source()
            _check(LOG_FILE, files[LOG_FILE], recipe.log_sha256)
            return files
        except (OSError, zipfile.BadZipFile, KeyError, subprocess.SubprocessError) as error:
            logger.info("cannot fetch %s from %s: %s", name, address, error)
            failures.append(f"{address} ({error})")
    raise OSError(
        f"cannot fetch {name}; tried {' and '.join(failures)}. Give a local file instead: a CSV or Parquet "
        "log with a user, an item and a time column"
    )


def _movielens_100k_from_grouplens() -> Files:
    with urllib.request.urlopen(GROUPLENS_URL, timeout=TIMEOUT) as response:
        content = response.read()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != GROUPLENS_MD5:
        raise OSError(f"expected a file of md5 {GROUPLENS_MD5}; got {md5}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        log = archive.read("ml-100k/u.data").decode("ascii")
        items = archive.read("ml-100k/u.item").decode("latin-1")
    movies = [line.split("|") for line in items.splitlines()]
    genres = ["|".join(name for name, flag in zip(GENRES, movie[5:], strict=False) if flag == "1") for movie in movies]
    rows = ((movie[0], movie[1].strip(), _year(movie[1]), of) for movie, of in zip(movies, genres, strict=True))
    return _movielens_files(log.splitlines(), rows)


def _movielens_100k_from_wheel() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
        ]
        command += ["--timeout", str(TIMEOUT), "--retries", "1", "--dest", folder, WHEEL]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if outcome.returncode or not wheels:
            raise OSError((outcome.stderr.strip().splitlines() or ["pip fetched no wheel"])[-1])
        with zipfile.ZipFile(wheels[0]) as archive:
            members = {name: archive.read(f"{WHEEL_FOLDER}/{name}") for name in WHEEL_SHA256}
    for name, content in members.items():
        _check(name, content, WHEEL_SHA256[name])
    log = members["ml-100k.inter"].decode("utf-8").splitlines()[1:]
    rows = (line.split("\t") for line in members["ml-100k.item"].decode("utf-8").splitlines()[1:])
    # The wheel stores the year apart from the title. Item 267, which has neither, is spelled "unkonwn" there.
    titles = (
        (row[0], "unknown" if row[1] == "unkonwn" else f"{row[1]} ({row[2]})", _year(f"({row[2]})"), _genres(row[3]))
        for row in rows
    )
    return _movielens_files(log, titles)


def _year(title: str) -> str:
    """The year in brackets at the end of a title; nothing if it has none."""
    found = re.search(r"\((\d{4})\)\s*$", title)
    return found[1] if found else ""


def _genres(text: str) -> str:
    """Genres separated by spaces, none of which has a space in its name, as the other source has them."""
    return "|".join(name for name in GENRES if name in text.split())


def _movielens_files(log: Iterable[str], items: Iterable[tuple[str, ...]]) -> Files:
    """The two CSV files, from tab-separated lines of user, item, rating, timestamp, and from rows of films."""
    return {
        LOG_FILE: _csv(["user_id", "item_id", "rating", "timestamp"], (line.split("\t") for line in log)),
        ITEMS_FILE: _csv(["item_id", "title", "year", "genres"], items),
    }


def _csv(header: Iterable[str], rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def _check(name: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise OSError(f"expected {name} of sha256 {sha256}; got {found}")


def _is_intact(folder: Path, recipe: _Recipe) -> bool:
    try:
        lines = (folder / CHECKSUMS_FILE).read_text("utf-8").splitlines()
        checksums = {name: sha256 for sha256, name in (line.split("  ") for line in lines)}
        for name in (LOG_FILE, ITEMS_FILE):
            _check(name, (folder / name).read_bytes(), checksums[name])
    except (OSError, ValueError, KeyError):
        return False
    return checksums[LOG_FILE] == recipe.log_sha256


def _store(folder: Path, files: Files) -> None:
    """Write the files atomically. The checksums are written last, so that an incomplete folder is not valid."""
    # The sources may spell titles differently, so the checksum of the titles is computed from the downloaded file.
    checksums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files | {CHECKSUMS_FILE: checksums.encode("utf-8")}).items():
        write_file(folder / name, content)


NAMED_DATASETS = {
    "ml-100k": _Recipe(
        sources={
            GROUPLENS_URL: _movielens_100k_from_grouplens,
            f"the Python package {WHEEL}": _movielens_100k_from_wheel,
        },
        log_sha256="010fac14271cf92527353173e77ddb19b9168a476d99c55c2f4bd55d93d4c205",
        license=("MovieLens 100K by GroupLens: for research, no commercial use, no redistribution."),
        citation=(
            "Harper and Konstan 2015, The MovieLens Datasets: History and Context, ACM TiiS 5(4):19, "
            "https://doi.org/10.1145/2827872"
        ),
    )
}
