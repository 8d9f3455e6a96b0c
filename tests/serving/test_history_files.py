"""Files of histories and of item ids as companies have them, and what is wrong with some."""

import gzip
import json
import re

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folder_files import preparation_of

from bert4rec_hf.serving import history_files
from bert4rec_hf.serving.history_files import divide, read_frame, read_item_ids, read_part
from bert4rec_hf.serving.history_files import history_files as files_of

LISTS = [["10", "11"], [], ["12"]]
GOOD = '{"user_id": 1, "item_id": ["1"]}'


def write(path, **columns):
    try:
        pq.write_table(pa.table(columns), path)
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this PyArrow cannot write the type: {error}")
    return path


def write_lines(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def read(source):
    """The user ids and the requests of all parts of the files that a path names."""
    parts, user_type = divide(files_of(source))
    batches = [batch for part in parts for batch in read_part(part, user_type)]
    users = [user for batch in batches for user in batch.users.to_pylist()]
    return users, [request for batch in batches for request in batch.requests]


def as_text(lists):
    return [[str(item) for item in items] for items in lists]


def fixed(kind):
    return pa.list_(kind, 2)


TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
NUMBERS = (pa.int8(), pa.uint64(), pa.int64(), pa.dictionary(pa.int32(), pa.int64()))


@pytest.mark.parametrize("kind", [*TEXT, *NUMBERS], ids=str)
@pytest.mark.parametrize("container", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, fixed])
def test_every_list_type_of_arrow_is_a_list_of_item_ids(tmp_path, container, kind):
    lists = [["10", "11"], ["12", "13"]] if container is fixed else LISTS
    given = lists if kind in TEXT else [[int(item) for item in items] for items in lists]
    column = pa.array(given, container(kind))
    path = write(tmp_path / "in.parquet", user_id=list(range(len(lists))), item_id=column, exclude=column)
    users, requests = read(path)
    assert users == list(range(len(lists)))
    assert [as_text(request.values()) for request in requests] == [[items, items] for items in lists]


@pytest.mark.parametrize("kind", TEXT, ids=str)
def test_every_type_of_text_is_a_user_id_and_becomes_string(tmp_path, kind):
    path = write(tmp_path / "in.parquet", user_id=pa.array(["a", "b", "a"], kind), item_id=LISTS)
    assert divide([str(path)])[1] == pa.string()
    assert read(path)[0] == ["a", "b", "a"]


def test_user_ids_of_other_types_stay_as_they_are(tmp_path):
    for users in (
        pa.array([2**63, 1, 2], pa.uint64()),
        pa.array([b"a", b"b", b"c"]),
        pa.array([b"0" * 16] * 3, pa.uuid()),
    ):
        path = write(tmp_path / "in.parquet", user_id=users, item_id=LISTS)
        parts, kind = divide([str(path)])
        batch = next(read_part(parts[0], kind))
        assert kind == users.type
        assert batch.users.equals(users)


def test_exclude_and_candidates_belong_to_their_row_and_null_is_none(tmp_path):
    lists = {"exclude": [["11"], None, []], "candidates": [None, ["12", "13"], []]}
    path = write(tmp_path / "in.parquet", user_id=["a", "b", "c"], item_id=LISTS, **lists)
    expected = [
        {"history": ["10", "11"], "exclude": ["11"]}, {"history": [], "candidates": ["12", "13"]},
        {"history": ["12"], "exclude": [], "candidates": []},
    ]  # fmt: skip
    assert read(path)[1] == expected
    rows = [{"user_id": user, "item_id": items} for user, items in zip("abc", LISTS, strict=True)]
    for row, exclude, candidates in zip(rows, *lists.values(), strict=True):
        row |= {"exclude": exclude, "candidates": candidates}
    assert read(write_lines(tmp_path / "in.jsonl", *rows))[1] == expected
    # A column without any list has the type null.
    path = write(tmp_path / "in.parquet", user_id=["a", "b", "c"], item_id=LISTS, exclude=pa.nulls(3))
    assert read(path)[1] == [{"history": items} for items in LISTS]


def test_the_history_may_be_called_as_in_a_request_to_the_pipeline(tmp_path):
    assert read(write(tmp_path / "in.parquet", user_id=[1], history=[["10"]])) == ([1], [{"history": ["10"]}])
    with pytest.raises(ValueError, match=r"in\.parquet has the columns item_id and history, which mean the same"):
        read(write(tmp_path / "in.parquet", user_id=[1], item_id=[["10"]], history=[["10"]]))


def test_json_lines_are_histories_also_gzipped_with_blank_lines_and_other_line_ends(tmp_path):
    lines = [
        '{"user_id": "007", "item_id": [10, "011"]}',
        "",
        '  {"item_id": [], "user_id": "ü\u2028", "exclude": ["7"]}',
    ]
    expected = (["007", "ü\u2028"], [{"history": [10, "011"]}, {"history": [], "exclude": ["7"]}])
    for content in (
        "\n".join(lines),
        "\n".join(lines) + "\n",
        "\r\n".join(lines) + "\r\n",
        "\ufeff" + "\n".join(lines),
    ):
        (tmp_path / "in.jsonl").write_bytes(content.encode("utf-8"))
        (tmp_path / "in.gz").write_bytes(gzip.compress(content.encode("utf-8")))
        assert read(tmp_path / "in.jsonl") == read(tmp_path / "in.gz") == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"user_id": 1, "item_id": ["1"'], "line 2: expected a JSON object, as in"),
        ([GOOD, "[1]"], r"neither a Parquet file nor JSON lines.*line 2 is '\[1\]'"),
        (["user_id,item_id", "1,2"], "neither a Parquet file nor JSON lines.*line 1 is 'user_id,item_id'; bert4rec"),
        (['{"user_id": 1, "user_id": 2, "item_id": []}'], "line 1: expected.*a key occurs twice among user_id"),
        (['{"user_id": 1}'], "line 1 has no column item_id; expected user_id and item_id, got .'user_id'.$"),
        (['{"item_id": []}'], "line 1 has no column user_id"),
        ([GOOD, '{"user_id": 1, "item_id": [], "exclud": []}'], "line 2: unknown key 'exclud'"),
        (['{"user_id": 1, "item_id": null}'], "column item_id, line 1: expected a list of item ids.*; got null"),
        (['{"user_id": 1, "item_id": {}}'], "column item_id, line 1: expected a list of item ids; got {} of type dict"),
        (['{"user_id": 1, "item_id": "10"}'], "column item_id, line 1: expected a list.*; got '10' of type str"),
        (['{"user_id": 1, "item_id": [1.0]}'], "line 1: expected .*; got a list with 1.0 of type float"),
        (['{"user_id": 1, "item_id": [true]}'], "line 1: expected .*; got a list with True of type bool"),
        (['{"user_id": 1, "item_id": [null]}'], "line 1: expected .*; got a list with a null"),
        (['{"user_id": 1, "item_id": [["1"]]}'], r"line 1: expected .*; got a list with \['1'\] of type list"),
        (['{"user_id": 1, "item_id": [{"id": 1}]}'], "line 1: expected .*; got a list with {'id': 1} of type dict"),
        ([GOOD, '{"user_id": "2", "item_id": []}'], "line 2: expected a user_id of type int64"),
        (['{"user_id": null, "item_id": []}'], "line 1: user_id must be text or an integer of 64 bits; got None"),
        (['{"user_id": true, "item_id": []}'], "line 1: user_id must be text or an integer of 64 bits; got True"),
        (['{"user_id": 1.5, "item_id": []}'], "line 1: user_id must be text or an integer of 64 bits; got 1.5"),
        (['{"user_id": 9223372036854775808, "item_id": []}'], "line 1: user_id must be text or an integer of 64 bits"),
        ([], "is empty; expected histories"), (["", " "], "is empty; expected histories"),
    ],
)  # fmt: skip
def test_wrong_json_lines_are_an_error_that_names_file_and_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=rf"in\.jsonl.*{message}"):
        read(write_lines(tmp_path / "in.jsonl", *lines))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00\x01", b"PAR1 and no more", gzip.compress(b"{}", mtime=0)[:-9], b"\x1f\x8b1"]
)
def test_a_file_of_another_format_or_a_damaged_one_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"in\.parquet (is neither|is empty)|cannot read the Parquet file .*in\.parquet"
    ):
        read(tmp_path / "in.parquet")


def test_a_page_that_is_damaged_is_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "in.parquet", user_id=list(range(5000)), item_id=[[str(item)] for item in range(5000)])
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the Parquet file .*in\.parquet"):
        read(path)


STRUCTS = pa.list_(pa.struct([("id", pa.string()), ("time", pa.int64())]))


@pytest.mark.parametrize("name", ["item_id", "exclude", "candidates"])
@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([[], [{"id": "10", "time": 1}]], STRUCTS, "row 1 .*got a list with {'id': '10', 'time': 1} of type dict"),
        ([["10"], ["11", None]], pa.list_(pa.string()), "row 1 .*got a list with a null"),
        ([[1], [None]], pa.large_list(pa.int64()), "row 1 .*got a list with a null"),
        ([[1.0], []], pa.list_(pa.float64()), "row 0 .*got a list with 1.0 of type float"),
        ([[True], []], pa.list_(pa.bool_()), "row 0 .*got a list with True of type bool"),
        ([[b"10"], []], pa.list_(pa.binary()), "row 0 .*got a list with b'10' of type bytes"),
        ([[], [["10"]]], pa.list_(pa.list_(pa.string())), r"row 1 .*got a list with \['10'\] of type list"),
        ([[("10", 1)], []], pa.map_(pa.string(), pa.int64()), r"row 0 .*got a list with \('10', 1\) of type tuple"),
        (["10", "11"], pa.string(), "row 0 .*got '10' of type str"),
        ([10, 11], pa.int64(), "row 0 .*got 10 of type int"),
        ([{"id": "10"}, None], pa.struct([("id", pa.string())]), "row 0 .*got {'id': '10'} of type dict"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_list_of_ids_is_an_error_that_names_file_column_and_row(
    tmp_path, name, values, kind, message
):
    columns = {"user_id": ["a", "b"], "item_id": [[], []]} | {name: pa.array(values, kind)}
    with pytest.raises(ValueError, match=rf"in\.parquet, column {name}, {message}"):
        read(write(tmp_path / "in.parquet", **columns))


@pytest.mark.parametrize("values", [[["10"], None, []], [None] * 3])
def test_a_null_in_the_place_of_a_history_is_an_error_and_an_empty_list_is_not(tmp_path, values):
    path = write(tmp_path / "in.parquet", user_id=[1, 2, 3], item_id=values)
    row = values.index(None)
    with pytest.raises(
        ValueError, match=rf"column item_id, row {row} .*which is empty for a user without a history; got null"
    ):
        read(path)


def test_the_number_of_a_row_is_that_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(history_files, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(history_files, "ROWS_PER_PART", 5)
    lists = [["10"]] * 23 + [["10", None]]
    pq.write_table(pa.table({"user_id": list(range(24)), "item_id": lists}), tmp_path / "in.parquet", row_group_size=7)
    with pytest.raises(ValueError, match=r"column item_id, row 23 \(the first is 0\)"):
        read(tmp_path / "in.parquet")
    rows = [{"user_id": user, "item_id": items} for user, items in enumerate(lists)]
    with pytest.raises(ValueError, match="column item_id, line 24: expected"):
        read(write_lines(tmp_path / "in.jsonl", *rows))


def test_a_missing_user_id_is_an_error_that_names_the_row(tmp_path):
    path = write(tmp_path / "in.parquet", user_id=["a", None], item_id=[[], []])
    with pytest.raises(ValueError, match=r"column user_id, row 1 \(the first is 0\): expected a user id; got null"):
        read(path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("exclud", "did you mean exclude?"), ("excludes", "did you mean exclude?"),
        ("blocked", "a history may have history"),
        ("candidate", "did you mean candidates?"),
        ("country", "a history may have history, item_id, exclude, candidates"),
        ("top_k", "top_k is for all histories"),
    ],
)  # fmt: skip
def test_an_unknown_column_is_an_error_that_names_the_nearest_known_one(tmp_path, name, hint):
    path = write(tmp_path / "in.parquet", user_id=[1], item_id=[["10"]], **{name: [["11"]]})
    with pytest.raises(ValueError, match=rf"in\.parquet: .*{re.escape(hint)}"):
        read(path)


def test_what_prepare_writes_is_no_unknown_column(tmp_path):
    columns = {
        "timestamp": [[1]],
        "train_end": [1],
        "validation_position": pa.nulls(1, pa.int32()),
        "test_position": [0],
    }
    given = {"user_id": ["a"], "item_id": [["10"]]} | columns | {"device": [["phone"]], "exclude": [[None]]}
    write(tmp_path / "histories.parquet", **given)
    with pytest.raises(ValueError, match="unknown key 'device'"):
        read(tmp_path / "histories.parquet")
    # Event columns may have any name. The file beside the histories says which they are.
    preparation = preparation_of(columns={"event_columns": ["device", "exclude"]})
    (tmp_path / "preparation.json").write_text(json.dumps(preparation))
    (tmp_path / "items.json").write_text("{}")
    assert read(tmp_path / "histories.parquet") == read(tmp_path) == (["a"], [{"history": ["10"]}])
    with pytest.raises(ValueError, match="unknown key 'device'"):
        read(write(tmp_path / "other.parquet", **given))


def test_the_files_of_a_folder_and_of_a_pattern_are_read_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "parts"
    for name in ("b/part-1.parquet", "a.parquet", "part-0.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, user_id=[name], item_id=[["10"]])
    write_lines(folder / "part-2.json", {"user_id": "part-2.json", "item_id": []})
    # Spark and macOS write such files.
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_temporary/0/part-0.parquet", ".DS_Store", "b/._part-1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00")
    assert read(folder)[0] == ["a.parquet", "b/part-1.parquet", "part-0.parquet", "part-2.json"]
    assert read(str(folder / "*.parquet"))[0] == ["a.parquet", "part-0.parquet"]
    assert read(f"{folder}/*")[0] == ["a.parquet", "part-0.parquet", "part-2.json"]
    assert read(f"{folder}/**/part*")[0] == ["b/part-1.parquet", "part-0.parquet", "part-2.json"]
    # A name with brackets is a file before it is a pattern.
    assert read(write(tmp_path / "[1].parquet", user_id=[1], item_id=[[]]))[0] == [1]


def test_where_there_is_no_file_the_error_says_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_SUCCESS").touch()
    for source in (tmp_path / "empty", tmp_path / "none.parquet", f"{tmp_path}/*.parquet"):
        with pytest.raises(
            FileNotFoundError, match=re.escape(f"there is no file {source}; expected histories: Parquet")
        ):
            files_of(source)


def test_files_with_different_types_of_user_ids_are_an_error_before_any_is_read(tmp_path):
    write(tmp_path / "1.parquet", user_id=pa.array(["a"], pa.large_string()), item_id=[["10"]])
    write(tmp_path / "2.parquet", user_id=["b"], item_id=[[10]])
    assert read(tmp_path)[0] == ["a", "b"]
    write_lines(tmp_path / "3.jsonl", {"user_id": 7, "item_id": []})
    with pytest.raises(
        ValueError, match=r"one type of user_id in all files; got string in .*1\.parquet and int64 in .*3\.js"
    ):
        divide(files_of(tmp_path))


def test_parts_have_every_row_once_whatever_the_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(history_files, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr(history_files, "ROWS_PER_PART", 10)
    for num_rows in (0, 1, 9, 10, 11, 20, 37):
        table = pa.table(
            {
                "user_id": pa.array(range(num_rows), pa.int64()),
                "item_id": pa.array([["10"]] * num_rows, pa.list_(pa.string())),
            }
        )
        for size in (1, 3, 7, 10, 40):
            pq.write_table(table, tmp_path / "in.parquet", row_group_size=size)
            parts, kind = divide([str(tmp_path / "in.parquet")])
            found = [[user for batch in read_part(part, kind) for user in batch.users.to_pylist()] for part in parts]
            assert found == [list(range(start, min(start + 10, num_rows))) for start in range(0, max(num_rows, 1), 10)]


def test_a_data_frame_is_read_as_a_file_is():
    lists = {"item_id": [np.array(["10", "11"], object), []], "exclude": [None, np.array([7, 8])]}
    frame = pandas.DataFrame({"user_id": ["a", "b"]} | lists)
    batch = read_frame(frame)
    assert batch.users.to_pylist() == ["a", "b"]
    assert batch.requests == [{"history": ["10", "11"]}, {"history": [], "exclude": [7, 8]}]
    empty = read_frame(frame.iloc[:0])
    assert (len(empty.users), empty.requests) == (0, [])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": [["10"]]}, "the data frame has no column user_id"),
        ({"user_id": ["a"], "items": [["10"]]}, "the data frame has no column item_id"),
        ({"user_id": ["a"], "item_id": [["10"]], "exclud": [["10"]]}, "the data frame: unknown key 'exclud'.*exclude"),
        ({"user_id": ["a"], "item_id": [None]}, "the data frame, column item_id, row 0 .*got null"),
        ({"user_id": ["a"], "item_id": [np.nan]}, "the data frame, column item_id, row 0 .*got null"),
        ({"user_id": ["a"], "item_id": ["10"]}, "column item_id, row 0 .*got '10' of type str"),
        ({"user_id": ["a"], "item_id": [{"10"}]}, "column item_id, row 0 .*got {'10'} of type set"),
        ({"user_id": ["a"], "item_id": [["10", None]]}, "column item_id, row 0 .*got a list with a null"),
        ({"user_id": ["a"], "item_id": [np.array([1.5])]}, "column item_id, row 0 .*got a list with 1.5 of type float"),
        ({"user_id": [None], "item_id": [["10"]]}, "column user_id, row 0 .*got null"),
        ({"user_id": ["a", 1], "item_id": [[], []]}, "the data frame: expected one type in the column user_id"),
    ],
)  # fmt: skip
def test_a_wrong_data_frame_is_an_error(columns, message):
    with pytest.raises(ValueError, match=message):
        read_frame(pandas.DataFrame(columns))


def test_item_ids_are_lines_of_text_or_a_column(tmp_path):
    expected = ["007", " a b", "1,2"]
    (tmp_path / "ids.txt").write_bytes("\ufeff007\r\n a b\n\n1,2".encode())
    assert read_item_ids(tmp_path / "ids.txt") == expected
    (tmp_path / "ids.csv").write_text('title,item_id\nx,007\ny," a b"\nz,"1,2"\n')
    assert read_item_ids(tmp_path / "ids.csv") == expected
    (tmp_path / "ids.tsv.gz").write_bytes(gzip.compress(b"item_id\ttitle\n007\tx\n a b\ty\n1,2\tz\n"))
    assert read_item_ids(tmp_path / "ids.tsv.gz") == expected
    write(tmp_path / "ids.parquet", item_id=expected, price=[1.0, 2.0, 3.0])
    assert read_item_ids(tmp_path / "ids.parquet") == expected
    write(tmp_path / "ids", item_id=pa.array([7, 2**63], pa.uint64()))
    assert read_item_ids(tmp_path / "ids") == ["7", str(2**63)]
    (tmp_path / "none").touch()
    assert read_item_ids(tmp_path / "none") == []


def test_a_wrong_file_of_item_ids_is_an_error_that_names_it(tmp_path):
    (tmp_path / "ids.csv").write_text("sku\n7\n")
    with pytest.raises(ValueError, match=r"ids\.csv has the columns sku; expected item ids: text with one id per line"):
        read_item_ids(tmp_path / "ids.csv")
    for column, message in (
        (["7", None], r"row 1 .*: item_id is empty"),
        ([7.0, 8.0], "must be text or integers, one id per row; got float64"),
        ([["7"], []], "must be text or integers, one id per row; got array"),
    ):
        with pytest.raises(ValueError, match=rf"ids\.parquet.*{message}"):
            read_item_ids(write(tmp_path / "ids.parquet", item_id=column))
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe7\x00")
    with pytest.raises(ValueError, match=r"ids\.txt is no UTF-8 text"):
        read_item_ids(tmp_path / "ids.txt")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*ids\.missing; expected item ids"):
        read_item_ids(tmp_path / "ids.missing")
