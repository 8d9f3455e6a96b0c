"""Item tables: files whose rows are put into the order of the token ids."""

import datetime
import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec_hf import Bert4RecTokenizer, ItemTable

DAY = datetime.datetime
ITEMS = ["007", "10", "11", "[MASK]", "a b"]
CSV = """item_id,price,category,on_sale,added,stock,note
10,1.5,shoes,true,2020-01-31,3,
a b,2,"hats, red",FALSE,2021/05/05 12:00:00,0,x
007,,,,,,7
unknown,9,x,true,2020-01-01,1,1
"""


@pytest.fixture(scope="module")
def tokenizer() -> Bert4RecTokenizer:
    return Bert4RecTokenizer.from_items(ITEMS)


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def test_a_csv_file_has_a_row_for_each_item_and_values_of_one_type(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "items.csv", CSV)
    with caplog.at_level(logging.WARNING):
        items = ItemTable.read(path, tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: left out 1 rows of items that the catalogue lacks, such as 'unknown'"
    ]
    assert len(items) == 5
    assert items.table.to_pydict() == {
        "item_id": ITEMS,
        "price": [None, 1.5, None, None, 2.0],
        "category": [None, "shoes", None, None, "hats, red"],
        "on_sale": [None, True, None, None, False],
        "added": [None, DAY(2020, 1, 31), None, None, DAY(2021, 5, 5, 12)],
        "stock": [None, 3, None, None, 0],
        "note": ["7", None, None, None, "x"],
    }
    assert items.mask("on_sale AND added < '2021-01-01' AND stock > 2").tolist() == [False, True, False, False, False]


def test_a_parquet_file_keeps_its_types(tokenizer, tmp_path, caplog):
    table = pa.table(
        {
            "item_id": [10, 11],
            "genres": [["x", None, "x"], []],
            "seen": pa.array([DAY(2020, 1, 1), None], pa.timestamp("us", "Europe/Berlin")),
            "kind": pa.array(["a", None]).dictionary_encode(),
            "nested": [{"a": 1}, None],
        }
    )
    pq.write_table(table, tmp_path / "items.parquet")
    items = ItemTable.read(str(tmp_path / "items.parquet"), tokenizer)
    assert caplog.records == []
    assert items.table["genres"].to_pylist() == [None, ["x", None, "x"], [], None, None]
    assert items.mask("kind = 'a'").tolist() == [False, True, False, False, False]
    # Times with a zone are compared in UTC.
    assert items.mask("seen = '2020-01-01 00:00:00'").sum() == 1
    with pytest.raises(ValueError, match="does not fit the columns"):
        items.mask("nested = 1")


def test_a_copy_in_another_process_has_the_same_rows(tokenizer, tmp_path):
    items = ItemTable.read(write(tmp_path / "items.csv", CSV), tokenizer)
    copy = pickle.loads(pickle.dumps(items))
    assert copy.table == items.table
    assert copy.mask("price > 1").tolist() == items.mask("price > 1").tolist()


def test_values_are_numbered_and_lists_have_each_value_once():
    columns = {
        "item_id": list("abcd"),
        "brand": ["x", None, "y", "x"],
        "price": [1.5, 2.0, None, 1.5],
        "genres": pa.array([["x", "y", "x"], None, [], ["y", None]], pa.large_list(pa.string())),
        "empty": pa.array([None] * 4, pa.string()),
        "nested": [[["x"]], None, None, None],
    }
    items = ItemTable(pa.table(columns), "items.parquet")
    assert items.values_of("brand").tolist() == [[1], [0], [2], [1]]
    assert items.values_of("price").tolist() == [[1], [2], [0], [1]]
    assert items.values_of("genres").tolist() == [[1, 2], [0, 0], [0, 0], [2, 0]]
    assert items.values_of("empty").tolist() == [[0]] * 4
    assert items.values_of("genres").dtype == np.int64
    with pytest.raises(ValueError, match=r"items\.parquet has no column 'genre'; did you mean genres\?"):
        items.values_of("genre")
    with pytest.raises(ValueError, match=r"column 'nested' of items\.parquet is list<.*; expected text, numbers"):
        items.values_of("nested")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("twice.csv", "item_id,a\n10,1\n11,1\n10,2\n", r"twice\.csv, rows 0 and 2 .*one row per item; got '10' twice"),
        ("null.csv", "item_id,a\n10,1\n,2\n", r"null\.csv, row 1 \(the first is 0\): expected an item_id; got null"),
        ("other.csv", "id,a\n10,1\n", r"other\.csv has the columns id, a; expected item_id and others"),
        ("strange.csv", "item_id\nx\ny\n", r"the catalogue has none of the 2 items of .*strange\.csv \('x', 'y'\)"),
        ("header.csv", "item_id,a\n", "the catalogue has none of the 0 items of"),
        ("empty.csv", "", r"empty\.csv is empty"),
        ("case.csv", "item_id,a,A\n10,1,2\n", "differ in upper and lower case only"),
        ("same.csv", "item_id,a,a\n10,1,2\n", "the column 'a' twice"),
        ("damaged.parquet", "PAR1 and nothing else", r"cannot read .*damaged\.parquet as Parquet"),
        ("ragged.csv", "item_id,a\n10,1\n11,2,3\n", r"ragged\.csv"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tokenizer, tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        ItemTable.read(write(tmp_path / name, text), tokenizer)


def test_a_file_that_is_not_there_and_ids_of_another_type_are_errors(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*expected an item table"):
        ItemTable.read(tmp_path / "nothing.parquet", tokenizer)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ItemTable.read(tmp_path, tokenizer)
    pq.write_table(pa.table({"item_id": [1.5]}), tmp_path / "floats.parquet")
    with pytest.raises(ValueError, match=r"ids must be text or whole numbers; column 'item_id' \(.*floats\.parquet\)"):
        ItemTable.read(tmp_path / "floats.parquet", tokenizer)


def test_a_number_that_is_none_is_missing(tokenizer, tmp_path):
    prices = pa.array([1.0, float("nan"), None, 5.0])
    pq.write_table(pa.table({"item_id": ["10", "11", "007", "a b"], "price": prices}), tmp_path / "items.parquet")
    items = ItemTable.read(tmp_path / "items.parquet", tokenizer)
    assert items.mask("price > 2").tolist() == [False, False, False, False, True]
    assert items.mask("NOT price < 2").tolist() == [False, False, False, False, True]
    assert items.mask("price IS NULL").tolist() == [True, False, True, True, False]
    assert items.row(5) == {"price": None}
