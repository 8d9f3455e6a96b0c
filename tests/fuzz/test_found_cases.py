"""Inputs that fuzzing has found faults with, and a few new ones for each reader. `make test-fuzz` has many."""

import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi")
sys.path.insert(0, str(Path(__file__).parent))

from readers import Fuzzer

DEEP = b'{"a":' * 100_000
_file = io.BytesIO()
pq.write_table(pa.table({"user_id": ["u1"], "item_id": [["i1"]], "exclude": [["i2"]]}), _file)
PARQUET_NAME_IS_NO_TEXT = _file.getvalue().replace(b"exclude", b"exc\xffude")
# For each reader, inputs that once left it with another error than those that the command line shows as one line.
FOUND = {
    "item features of a table": [b'{"item_id": "i1", "\\u0000": "x"}', PARQUET_NAME_IS_NO_TEXT],
    "histories files: bytes": [PARQUET_NAME_IS_NO_TEXT],
    "files of item ids": [b"item_id,x\ni1,,2\ni2,3", b"item_id,x\ni1,2\ni2", b"item_id,x\ni\xcf7,2\n"],
    "histories files: values": [DEEP],
    "config.json": [b"null", DEEP, b'{"model_type": "bert4rec", "dtype": []}'],
    "items.json": [b"null", DEEP, b'{"counts": {}, "titles": {"+": 1}}'],
    "item_features.json": [DEEP, b"[]", b'{"columns": [{"kind": "category"}]}'],
    "preparation.json, for the card": [b"{}", DEEP],
    "evaluation.json, for the card": [b"[1]", b"{}", DEEP],
    "training.json, for the card": [b"{}", DEEP],
}  # fmt: skip


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    fuzzer = Fuzzer(tmp_path_factory.mktemp("fuzz"))
    yield fuzzer
    fuzzer.close()


@pytest.mark.parametrize("name", FOUND)
def test_what_fuzzing_has_found_is_refused_in_one_line(fuzzer, name):
    for content in FOUND[name]:
        with pytest.raises(ValueError) as found:  # noqa: PT011 - the messages are those of many readers
            fuzzer.readers[name].read(content)
        assert type(found.value) is ValueError


def test_a_new_input_for_each_reader(fuzzer):
    faults = {reader.name: fuzzer.run(reader, 1).faults for reader in fuzzer.readers.values()}
    assert not any(faults.values()), {name: kinds for name, kinds in faults.items() if kinds}
