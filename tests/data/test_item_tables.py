"""Item tables and item features of `prepare`."""

import json
import logging

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec_hf import Bert4RecTokenizer, prepare
from bert4rec_hf.data.item_tables import feature_columns, fit_features, read_item_table

EVENTS = "user_id,item_id,timestamp\n" + "".join(
    f"u{user},{user % 5 + time},{time}\n" for user in range(6) for time in range(4)
)


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log.csv").write_text(EVENTS)
    return tmp_path / "log.csv"


def write(path, text):
    path.write_text(text)
    return path


def kinds(table, *wanted):
    return {column["name"]: column["kind"] for column in feature_columns(table, wanted or table.column_names[1:], "t")}


def test_kinds_follow_from_the_values():
    table = pa.table(
        {
            "item_id": [str(number) for number in range(6)],
            "brand": ["a", "a", "b", "b", "b", None],
            "genres": ["x|y", "x", "y|z", "z|x", "x|y", None],
            "tags": [["a"], ["a", "b"], [], None, ["b"], ["a"]],
            "price": [1, 2, 3, 4, 5, 6],
            "look": [[0.5, 1.0]] * 6,
            "new": [True, False, None, True, True, False],
            "since": pa.array([0, 1, 2, 3, 4, 5], pa.timestamp("s")),
        }
    )
    assert kinds(table) == {
        "brand": "category",
        "genres": "categories",
        "tags": "categories",
        "price": "number",
        "look": "vector",
        "new": "boolean",
        "since": "number",
    }
    assert feature_columns(table, ["genres"], "t") == [{"name": "genres", "kind": "categories", "separator": "|"}]
    assert feature_columns(table, ["brand:categories:/"], "t") == [
        {"name": "brand", "kind": "categories", "separator": "/"}
    ]
    assert kinds(table, "price:category") == {"price": "category"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["bran"], "t.csv has no column 'bran'; did you mean brand"),
        (["item_id"], "t.csv has no column 'item_id'; it has brand, name"),
        (["brand:colour"], "expected a kind of category, categories, number, boolean, vector, text; got 'colour'"),
        (["brand", "brand:category"], "'brand' is named twice"),
        (["name"], "most items of t.csv have a value of their own; leave the column out, give name:text"),
    ],
)
def test_a_feature_that_cannot_be_is_an_error(wanted, message):
    table = pa.table({"item_id": list("abcdef"), "brand": ["x"] * 6, "name": list("uvwxyz")})
    with pytest.raises(ValueError, match=message):
        feature_columns(table, wanted, "t.csv")


def test_csv_values_have_their_types_and_ids_stay_text(tmp_path):
    path = write(tmp_path / "items.csv", "sku,price,flag,day\n007,1.5,true,2024-01-31\n7,,false,\n")
    table = read_item_table(path, "sku")
    assert table["item_id"].to_pylist() == ["007", "7"]
    assert table["price"].to_pylist() == [1.5, None]
    assert table["flag"].to_pylist() == [True, False]
    assert pa.types.is_timestamp(table.schema.field("day").type)
    with pytest.raises(ValueError, match="has a column item_id beside sku"):
        read_item_table(write(tmp_path / "both.csv", "sku,item_id\n1,2\n"), "sku")


@pytest.mark.parametrize(
    "name", ["num_ratings", "sales_count", "popularity", "total_sales", "views_count", "salesrank_rank"]
)
def test_a_column_that_counts_people_is_warned_of(name, caplog):
    table = pa.table({"item_id": ["a", "b", "c"], name: [3, 1, 2]})
    with caplog.at_level(logging.WARNING):
        fit_features(table, [{"name": name, "kind": "number"}], {"a": 1, "b": 1, "c": 1}, "t")
    assert f"item feature {name} looks like a count of what people did" in caplog.text


def test_a_column_whose_ranks_are_those_of_the_events_is_warned_of(caplog):
    items = [f"i{number}" for number in range(30)]
    table = pa.table({"item_id": items, "x": list(range(30)), "y": [number * 7 % 30 for number in range(30)]})
    counts = {item: 1 + number for number, item in enumerate(items)}
    with caplog.at_level(logging.WARNING):
        fit_features(table, [{"name": name, "kind": "number"} for name in "xy"], counts, "t")
    assert "item feature x looks like a count" in caplog.text
    assert "item feature y" not in caplog.text


@pytest.mark.parametrize("name", ["brand", "order", "reviewed_by", "view", "ranking_group", "salesman"])
def test_other_names_are_not(name, caplog):
    table = pa.table({"item_id": ["a", "b", "c"], name: ["x", "x", "y"]})
    with caplog.at_level(logging.WARNING):
        fit_features(table, [{"name": name, "kind": "category"}], {"a": 1, "b": 1, "c": 1}, "t")
    assert caplog.text == ""


def test_prepare_keeps_the_table_and_fits_on_items_that_train(log, tmp_path):
    items = write(tmp_path / "items.csv", "item_id,brand,title\n0,a,Zero\n1,a,One\n2,b,Two\n3,b,Three\nnew,b,New\n")
    prepared = prepare(log, tmp_path / "data", items=items, item_features=["brand:category"])
    assert prepared["columns"]["item_features"] == ["brand:category"]
    assert pq.read_table(tmp_path / "data" / "items.parquet")["item_id"].to_pylist() == ["0", "1", "2", "3", "new"]
    tokenizer = Bert4RecTokenizer.from_pretrained(tmp_path / "data")
    assert tokenizer.item_features.columns == [{"name": "brand", "kind": "category", "values": ["a", "b"]}]
    assert tokenizer.title("2") == "Two"
    assert "new" not in tokenizer.items  # it joins the catalogue after training
    # A later call without features leaves nothing of them behind.
    prepare(log, tmp_path / "data")
    assert not (tmp_path / "data" / "items.parquet").exists()
    assert Bert4RecTokenizer.from_pretrained(tmp_path / "data").item_features is None
    assert json.loads((tmp_path / "data" / "preparation.json").read_text())["columns"]["item_features"] == []


def test_wrong_tables_are_errors_and_write_nothing(log, tmp_path):
    with pytest.raises(
        ValueError, match=r"item_features need an item table; got brand without one: name it with --items"
    ):
        prepare(log, tmp_path / "data", item_features=["brand"])
    other = write(tmp_path / "other.csv", "item_id,brand\nx,a\ny,a\n")
    with pytest.raises(ValueError, match=r"other.csv has none of the items of the log: its ids look like 'x', 'y'"):
        prepare(log, tmp_path / "data", items=other, item_features=["brand"])
    twice = write(tmp_path / "twice.csv", "item_id,brand\n1,a\n1,b\n")
    with pytest.raises(ValueError, match=r"rows 0 and 1 .* expected one row per item; got '1' twice"):
        prepare(log, tmp_path / "data", items=twice, item_features=["brand"])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.csv; expected an item table"):
        prepare(log, tmp_path / "data", items=tmp_path / "none.csv", item_features=["brand"])
    with pytest.raises(
        TypeError, match=r"item_features must be a list of columns; got 'brand': did you mean \['brand'\]"
    ):
        prepare(log, tmp_path / "data", items=twice, item_features="brand")
    text = write(tmp_path / "text.csv", "item_id,title\n1,a film\n2,a book\n")
    with pytest.raises(ValueError, match="item feature title:text needs an encoder: name one with --text_encoder"):
        prepare(log, tmp_path / "data", items=text, item_features=["title:text"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(2)])
def test_bytes_that_are_no_text_are_left_out(tmp_path, caplog, kind):
    columns = {
        "item_id": ["a", "b"],
        "picture": pa.array([b"\xff\x00", b"xy"], kind),
        "brand": pa.array([b"k1", "é".encode()], kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    table = read_item_table(tmp_path / "items.parquet")
    assert table.to_pydict() == {"item_id": ["a", "b"], "brand": ["k1", "é"]}
    assert "the column picture has bytes that are no text, and is left out" in caplog.text


def test_a_column_without_a_name_is_left_out_and_a_name_that_cannot_be_is_refused(tmp_path, caplog):
    pd.DataFrame({"item_id": ["i1", "i2"], "year": [1990, 1991]}).to_csv(tmp_path / "items.csv")
    assert read_item_table(tmp_path / "items.csv").to_pydict() == {"item_id": ["i1", "i2"], "year": [1990, 1991]}
    assert "a column has no name, such as the index that pandas writes, and is left out" in caplog.text
    pq.write_table(pa.table({"item_id": ["i1"], "": [1], "year": [1990]}), tmp_path / "items.parquet")
    assert read_item_table(tmp_path / "items.parquet").column_names == ["item_id", "year"]
    for path in (tmp_path / "items.jsonl", tmp_path / "items.parquet"):
        (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "i1", "a\0b": "x"}))
        pq.write_table(pa.table({"item_id": ["i1"], "a\0b": ["x"]}), tmp_path / "items.parquet")
        with pytest.raises(ValueError, match=r"has a column named 'a\\x00b', which DuckDB does not allow; rename it"):
            read_item_table(path)


def test_json_lines_hold_what_parquet_holds(tmp_path):
    rows = [
        {"item_id": "i1", "year": 1990, "on_sale": True, "tags": ["a", "b"], "codes": [1, 2], "vector": [0.5, 1]},
        {"item_id": "i2", "year": 1991, "on_sale": False, "tags": [], "codes": [3], "vector": [-1.5, 2]},
        {"item_id": "i3", "year": None, "on_sale": None, "tags": None, "codes": None, "vector": None},
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    found = read_item_table(tmp_path / "items.jsonl")
    assert found.to_pylist() == read_item_table(tmp_path / "items.parquet").to_pylist()
    kinds = {column["name"]: column["kind"] for column in feature_columns(found, found.column_names[1:], "the table")}
    assert kinds == {
        "year": "number", "on_sale": "boolean", "tags": "categories", "codes": "categories", "vector": "vector",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([["a"], "b"], "ARRAY and VARCHAR"),
        ([[["a"]], ["b"]], "lists of booleans, lists or objects"),
        ([[True], ["b"]], "lists of booleans, lists or objects"),
        ([{"a": 1}, None], "OBJECT"),
        ([True, "b"], "BOOLEAN and VARCHAR"),
        ([True, 1], "BOOLEAN and UBIGINT"),
    ],
)
def test_json_values_that_make_no_column_of_one_type_are_left_out(tmp_path, caplog, values, found):
    rows = [{"item_id": f"i{row}", "odd": value, "year": 1990} for row, value in enumerate(values)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_item_table(tmp_path / "items.jsonl").column_names == ["item_id", "year"]
    expected = f"column 'odd' of {tmp_path / 'items.jsonl'} has {found}; expected values of one type"
    assert expected in caplog.text
    ids = [{"item_id": value} for value in values]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ids)))
    with pytest.raises(ValueError, match=f"column 'item_id' of .* has {found}; expected values of one type"):
        read_item_table(tmp_path / "items.jsonl")


def test_whole_numbers_of_any_length_keep_their_digits_in_lists(tmp_path):
    for values, kind in (([1, 2**63 - 1], pa.int64()), ([2**63], pa.string()), ([10**22 + 1, 5], pa.string())):
        (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "i1", "codes": values}))
        found = read_item_table(tmp_path / "items.jsonl")["codes"]
        assert found.type.value_type == kind
        assert list(map(str, found.to_pylist()[0])) == list(map(str, values))
    (tmp_path / "items.jsonl").write_text('{"item_id": "i1", "x": [1, 2.5, null]}')
    assert read_item_table(tmp_path / "items.jsonl").to_pylist() == [{"item_id": "i1", "x": [1.0, 2.5, None]}]


def test_a_column_without_values_is_no_time(tmp_path):
    for name, text in (("items.csv", "item_id,price\ni1,\ni2,\n"), ("items.jsonl", '{"item_id": "i1", "price": null}')):
        (tmp_path / name).write_text(text)
        assert read_item_table(tmp_path / name).schema.field("price").type == pa.string()


def test_titles_are_text(log, tmp_path):
    for title in (["T"], True):
        rows = [{"item_id": str(item), "title": title} for item in range(9)]
        (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for options in ({"items": tmp_path / "items.jsonl"}, {"item_titles": tmp_path / "items.jsonl"}):
            with pytest.raises(ValueError, match=r"titles must be text; column 'title' of .*items.jsonl is "):
                prepare(log, tmp_path / "data", **options)
    (tmp_path / "items.jsonl").write_text('{"item_id": ["1"], "title": "T"}')
    with pytest.raises(
        ValueError, match=r"ids must be text or whole numbers; column 'item_id' of .*items.jsonl is array"
    ):
        prepare(log, tmp_path / "data", item_titles=tmp_path / "items.jsonl")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["__source_row__", "__file__"])
def test_names_that_the_package_uses_itself_are_refused(tmp_path, name):
    pq.write_table(pa.table({"item_id": ["i1"], name: [1]}), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=f"has a column {name}, a name that this package uses itself; rename it"):
        read_item_table(tmp_path / "items.parquet")
