"""Generated broken files: each is prepared, or refused with an error that names the file; nothing is left behind."""

import bz2
import gc
import gzip
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec_hf.data.duckdb_tables import LIBRARY_ERRORS
from bert4rec_hf.data.preparation import histories, prepare

NUM_BROKEN = 500
ROWS = [(f"u{number % 7}", f"é{number:03}", 1706702400 + number) for number in range(60)]
TABLE = pa.table(dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*ROWS, strict=True)), strict=True)))


def _contents(folder: Path) -> dict[str, bytes]:
    """A log in each format."""
    csv = "user_id,item_id,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in ROWS)
    lines = "".join(f'{{"user_id": "{user}", "item_id": "{item}", "timestamp": {time}}}\n' for user, item, time in ROWS)
    contents = {"csv": csv.encode(), "jsonl": lines.encode()}
    for name, options in (("plain", {"compression": "none"}), ("snappy", {"compression": "snappy", "version": "1.0"})):
        pq.write_table(TABLE, folder / name, use_dictionary=name == "plain", row_group_size=25, **options)
        contents[f"{name}.parquet"] = (folder / name).read_bytes()
    contents["csv.gz"] = gzip.compress(contents["csv"])
    contents["csv.bz2"] = bz2.compress(contents["csv"][:900]) + bz2.compress(contents["csv"][900:])
    contents["parquet.gz"] = gzip.compress(contents["plain.parquet"])
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(contents["jsonl"])
    contents["jsonl.zst"] = sink.getvalue().to_pybytes()
    return contents


def _broken(content: bytes, kind: str, chance: random.Random) -> bytes:
    """The content with one fault."""
    place = chance.randrange(len(content))
    faults = ["cut", "bit", "bits", "byte", "zeros", "twice", "gap"]
    if kind in ("csv", "jsonl"):
        faults += ["encoding", "ragged", "type", "line ends", "quote"]
    match chance.choice(faults):
        case "cut":
            return content[:place]
        case "bit":
            return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
        case "bits":
            for _ in range(20):
                place = chance.randrange(len(content))
                content = content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
            return content
        case "byte":
            return content[:place] + bytes([chance.randrange(256)]) + content[place:]
        case "zeros":
            return content[:place] + bytes(16) + content[place + 16 :]
        case "twice":
            return content[:place] + content[max(0, place - 50) :]
        case "gap":
            return content[:place] + content[place + 30 :]
        case "encoding":
            return content.decode().encode(chance.choice(["latin-1", "utf-16", "utf-16-le", "utf-32", "cp037"]))
        case "ragged":
            return content.replace(*chance.choice([(b",u1", b""), (b"\nu2,", b"\nu2,,"), (b",1706702433", b"")]))
        case "type":
            return content.replace(
                b"1706702433", chance.choice([b"noon", b"[1]", b"true", b"null", b'{"a": 1}', b"nan"])
            )
        case "line ends":
            return content.replace(b"\n", chance.choice([b"\r", b"\r\n", b"\n\n"]), chance.choice([-1, 20]))
        case _:
            return content[:place] + b'"' + content[place:]
    raise AssertionError


def test_broken_files_are_prepared_or_refused_by_name_and_nothing_is_left_behind(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    chance = random.Random(0)
    contents = _contents(tmp_path)
    names = [item for _, item, _ in ROWS]
    prepared, refused, wrong = 0, 0, []
    for number in range(NUM_BROKEN):
        kind = list(contents)[number % len(contents)]
        content = _broken(contents[kind], kind, chance)
        path = tmp_path / f"broken-{number}.log"
        path.write_bytes(content)
        try:
            table = histories(path)
            rows = table.to_pyarrow().to_pylist()
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            is_ours = not isinstance(error, (*LIBRARY_ERRORS, UnicodeError)) or isinstance(error, FileNotFoundError)
            if not is_ours or (path.name not in str(error) and "column '" not in str(error)):
                wrong.append((number, kind, repr(error)))
        else:
            prepared += 1
            items = [item for row in rows for item in row["item_id"]]
            assert len(items) <= 2 * len(ROWS), (number, kind)
            assert all([*items, *(row["user_id"] for row in rows)]), (number, kind)
            if kind.endswith((".gz", ".bz2")):  # they have checksums
                assert sorted(items) == names, (number, kind)
            del table
        path.unlink()
    assert wrong == []
    assert prepared > 30
    assert refused > 300
    gc.collect()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "snappy.parquet", "jsonl.zst"])
def test_a_broken_file_leaves_no_output(tmp_path, monkeypatch, kind):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    content = _contents(tmp_path)[kind]
    path = tmp_path / "broken.log"
    path.write_bytes(content[:-20] + b"\xff\xfe\xff" + content[-17:])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"broken\.log"):
        prepare(path, tmp_path / "out")
    gc.collect()
    assert sorted(tmp_path.iterdir()) == before
    assert list(temporary.iterdir()) == []
