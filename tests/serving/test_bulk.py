"""From a Parquet file of histories to a Parquet file of recommendations."""

import json
import pickle

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import pipeline

import bert4rec_hf.serving.bulk
import bert4rec_hf.serving.history_files
from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.serving.bulk import recommend_batches, recommend_file

ITEMS = ["007", "a b", "[MASK]", *map(str, range(10, 27))]
HISTORIES = [["10", "007"], [], ["a b"], ["11", "12", "[MASK]", "10"], ["15"], ["13"], ["unknown", "14"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, model_max_length=8)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        max_position_embeddings=8,
        initializer_range=0.5,
        filter_seen_items=True,
    )
    Bert4RecForMaskedItemPrediction(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("sequential-recommendation", model=folder, device="cpu", top_k=4)


def write(path, users, histories, item_type=None):
    items = pa.array(histories, item_type or pa.list_(pa.string()))
    pq.write_table(pa.table({"user_id": users, "item_id": items, "train_end": [1] * len(users)}), path)
    return path


def answers_by_user(path):
    answers = {}
    for row in pq.read_table(path).to_pylist():
        answers.setdefault(row["user_id"], []).append(row)
    return answers


def assert_same(rows, answer):
    assert [row["item_id"] for row in rows] == [entry["item_id"] for entry in answer]
    assert [row["rank"] for row in rows] == list(range(1, len(answer) + 1))
    assert [row["score"] for row in rows] == pytest.approx([entry["score"] for entry in answer], abs=1e-5)


def test_every_history_gets_the_pipelines_answer_in_the_order_of_the_input(pipe, tmp_path):
    users = [f"user {number}" for number in (3, 1, 2, 7, 6, 5, 4)]
    source = write(tmp_path / "in.parquet", users, HISTORIES)
    assert recommend_file(pipe, source, tmp_path / "out.parquet", batch_size=3) == len(HISTORIES)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.equals(
        pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])
    )
    answers = answers_by_user(tmp_path / "out.parquet")
    assert list(answers) == users
    assert len(table) == 4 * len(users)
    for user, history in zip(users, HISTORIES, strict=True):
        assert_same(answers[user], pipe(history))


def test_integer_user_ids_stay_integers(pipe, tmp_path):
    users = pa.array([2**60 + 1, 5], pa.int64())
    source = write(tmp_path / "in.parquet", users, [["10"], ["11"]])
    recommend_file(pipe, source, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("user_id").type == pa.int64()
    assert table["user_id"].unique().to_pylist() == [2**60 + 1, 5]


def test_integer_and_large_lists_of_items_are_histories_too(pipe, tmp_path):
    for item_type in (pa.list_(pa.int64()), pa.large_list(pa.int32())):
        source = write(tmp_path / "in.parquet", ["a"], [[10, 11]], item_type)
        recommend_file(pipe, source, tmp_path / "out.parquet")
        assert_same(answers_by_user(tmp_path / "out.parquet")["a"], pipe(["10", "11"]))


def test_a_user_who_has_had_everything_has_no_row_and_the_others_keep_theirs(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a", "all", "b"], [["10"], ITEMS, ["11"]])
    assert recommend_file(pipe, source, tmp_path / "out.parquet", batch_size=2) == 3
    answers = answers_by_user(tmp_path / "out.parquet")
    assert list(answers) == ["a", "b"]
    assert_same(answers["b"], pipe(["11"]))


def test_a_file_without_histories_gives_a_file_without_rows(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", pa.array([], pa.string()), [])
    assert recommend_file(pipe, source, tmp_path / "out.parquet") == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.num_rows == 0
    assert table.column_names == ["user_id", "item_id", "rank", "score"]


def test_several_reads_and_writes_give_one_whole_file(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(bert4rec_hf.serving.history_files, "ROWS_PER_BATCH", 5)
    users = list(range(23))
    source = write(tmp_path / "in.parquet", users, [[ITEMS[user % len(ITEMS)]] for user in users])
    recommend_file(pipe, source, tmp_path / "out.parquet", batch_size=2)
    answers = answers_by_user(tmp_path / "out.parquet")
    assert list(answers) == users
    for user in users:
        assert_same(answers[user], pipe([ITEMS[user % len(ITEMS)]]))
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 1


def test_the_files_of_a_pattern_are_read_in_order(pipe, tmp_path):
    for number, (users, histories) in enumerate(((["b"], [["10"]]), (["a", "c"], [["11"], ["12"]]))):
        write(tmp_path / f"histories-{number}.parquet", users, histories)
    pattern = tmp_path / "histories-*.parquet"
    assert recommend_file(pipe, pattern, tmp_path / "out.parquet") == 3
    assert list(answers_by_user(tmp_path / "out.parquet")) == ["b", "a", "c"]
    with pytest.raises(ValueError, match=r"histories-1\.parquet holds the histories themselves"):
        recommend_file(pipe, pattern, tmp_path / "histories-1.parquet")
    write(tmp_path / "histories-1.parquet", pa.array([1, 2]), [["11"], ["12"]])
    with pytest.raises(ValueError, match="expected one type of user_id in all files"):
        recommend_file(pipe, pattern, tmp_path / "out.parquet")


def test_the_reader_runs_a_bounded_number_of_histories_ahead_of_the_answers(pipe, tmp_path, monkeypatch):
    # Without a bound, memory would grow with the file.
    read, answered, most_ahead = 0, 0, 0

    class CountedFile(pq.ParquetFile):
        def iter_batches(self, *args, **kwargs):
            nonlocal read
            for batch in super().iter_batches(*args, **kwargs):
                read += len(batch)
                yield batch

    def watched(rows, **options):
        nonlocal answered, most_ahead
        for answer in pipe(rows, **options):
            most_ahead = max(most_ahead, read - answered)
            answered += 1
            yield answer

    watched.tokenizer = pipe.tokenizer
    source = write(tmp_path / "in.parquet", list(range(200)), [["10"]] * 200)
    monkeypatch.setattr(bert4rec_hf.serving.history_files, "ROWS_PER_BATCH", 16)
    monkeypatch.setattr(bert4rec_hf.serving.history_files.pq, "ParquetFile", CountedFile)
    recommend_file(watched, source, tmp_path / "out.parquet", batch_size=8)
    assert (read, answered) == (200, 200)
    assert 8 <= most_ahead <= 16


def test_a_failure_leaves_an_earlier_output_as_it_was_and_nothing_beside_it(pipe, tmp_path, monkeypatch):
    source = write(tmp_path / "in.parquet", ["a", "b", "c"], [["10"], ["11"], ["12"]])
    recommend_file(pipe, write(tmp_path / "other.parquet", ["z"], [["13"]]), tmp_path / "out.parquet")
    before = (tmp_path / "out.parquet").read_bytes()
    preprocess = pipe.preprocess

    def fails_at_the_last(inputs, **options):  # when rows have been written and others are being processed
        if inputs.history["history"] == ["12"]:
            raise RuntimeError("no memory is left")
        return preprocess(inputs, **options)

    monkeypatch.setattr(pipe, "preprocess", fails_at_the_last)
    with pytest.raises(RuntimeError, match="no memory is left"):
        recommend_file(pipe, source, tmp_path / "out.parquet", batch_size=1)
    assert (tmp_path / "out.parquet").read_bytes() == before
    with pytest.raises(RuntimeError, match="no memory is left"):
        recommend_file(pipe, source, tmp_path / "new.parquet", batch_size=1)
    assert {path.name for path in tmp_path.iterdir()} == {"in.parquet", "other.parquet", "out.parquet"}


def test_an_earlier_output_is_replaced_and_the_folder_of_a_new_one_made(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a"], [["10"]])
    recommend_file(pipe, write(tmp_path / "other.parquet", ["z"], [["13"]]), tmp_path / "out.parquet")
    for output in (tmp_path / "out.parquet", tmp_path / "new" / "out.parquet"):
        recommend_file(pipe, source, output)
        assert list(answers_by_user(output)) == ["a"]


def test_neither_the_histories_nor_a_file_of_others_is_replaced(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a"], [["10"]])
    other = write(tmp_path / "other.parquet", ["b"], [["11"]])
    (tmp_path / "link.parquet").symlink_to(source)
    (tmp_path / "notes.txt").write_text("of yesterday")
    (tmp_path / "empty").touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for output in (source, tmp_path / "link.parquet"):
        with pytest.raises(ValueError, match=r"parquet holds the histories themselves; choose another --output"):
            recommend_file(pipe, source, output)
    for output in (other, tmp_path / "notes.txt", tmp_path / "empty"):
        with pytest.raises(ValueError, match=rf"{output.name} exists and is no Parquet file of user_id, item_id, rank"):
            recommend_file(pipe, source, output)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_batch_size_below_1_is_an_error(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a"], [["10"]])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1; got 0"):
        recommend_file(pipe, source, tmp_path / "out.parquet", batch_size=0)


@pytest.mark.parametrize("missing", ["user_id", "item_id"])
def test_a_missing_column_is_an_error_that_names_it_and_those_that_are_there(pipe, tmp_path, missing):
    write(tmp_path / "all.parquet", ["a"], [["10"]])
    pq.write_table(pq.read_table(tmp_path / "all.parquet").drop_columns([missing]), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=rf"in\.parquet has no column {missing}.*'train_end'"):
        recommend_file(pipe, tmp_path / "in.parquet", tmp_path / "out.parquet")


def test_a_log_in_the_place_of_histories_is_an_error_that_says_how_to_make_them(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a", "b"], ["10", "11"], pa.string())
    with pytest.raises(
        ValueError, match=r"in\.parquet, column item_id, row 0 .*got '10' of type str: bert4rec prepare"
    ):
        recommend_file(pipe, source, tmp_path / "out.parquet")


def test_a_file_that_is_no_parquet_is_an_error(pipe, tmp_path):
    (tmp_path / "in.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(
        ValueError, match=r"in\.csv is neither a Parquet file nor JSON lines, .*line 1 is 'user_id,item_id'"
    ):
        recommend_file(pipe, tmp_path / "in.csv", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_histories_of_another_catalogue_are_an_error_and_two_runs_do_not_meet(pipe, tmp_path):
    strange = write(tmp_path / "strange.parquet", ["a", "b"], [[], ["nobody", "knows"]])
    with pytest.raises(
        ValueError,
        match=r"none of the items of the first 2 histories of .*such as 'nobody'; the ids of the catalogue look",
    ):
        recommend_file(pipe, strange, tmp_path / "out.parquet")
    source = write(tmp_path / "in.parquet", ["a"], [["10"]])
    link = tmp_path / "link.parquet"
    link.symlink_to(tmp_path / "out.parquet")

    class Meeting:
        """Recommendations during which another run writes to the same output."""

        tokenizer = pipe.tokenizer

        def __call__(self, rows, **options):
            recommend_file(pipe, source, tmp_path / "out.parquet")
            return pipe(rows, **options)

    recommend_file(Meeting(), source, link)
    assert link.is_symlink()
    assert pq.read_table(tmp_path / "out.parquet")["user_id"].to_pylist() == ["a"] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.parquet", "link.parquet", "out.parquet", "strange.parquet",
    ]  # fmt: skip


def test_a_column_that_is_there_twice_is_an_error(pipe, tmp_path):
    table = pa.table([["a"], [["10"]], [["11"]]], names=["user_id", "item_id", "item_id"])
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(ValueError, match="has the column 'item_id' twice"):
        recommend_file(pipe, tmp_path / "in.parquet", tmp_path / "out.parquet")


def request_file(path, rows):
    """A file of the rows' requests. Its users are numbers from 0."""
    columns = {
        name: pa.array([row.get(name) for row in rows], pa.list_(pa.string())) for name in ("exclude", "candidates")
    }
    histories = pa.array([row["history"] for row in rows], pa.list_(pa.string()))
    pq.write_table(pa.table({"user_id": list(range(len(rows))), "item_id": histories} | columns), path)
    return path


def test_the_exclusions_and_candidates_of_a_row_hold_for_it_as_in_the_pipeline(pipe, tmp_path):
    best = [entry["item_id"] for entry in pipe(["10"])]
    rows = [
        {"history": ["10"]}, {"history": ["10"], "exclude": best[:1]}, {"history": ["10"], "candidates": best[2:]},
        {"history": ["10"], "exclude": best[2:3], "candidates": best[1:]}, {"history": ["10"], "exclude": []},
        {"history": ["10"], "exclude": ["unknown"]}, {"history": ["10"], "candidates": ["unknown", best[3]]},
    ]  # fmt: skip
    source = request_file(tmp_path / "in.parquet", rows)
    recommend_file(pipe, source, tmp_path / "out.parquet", batch_size=3)
    answers = answers_by_user(tmp_path / "out.parquet")
    for user, row in enumerate(rows):
        assert_same(answers[user], pipe(row))
    found = [[row["item_id"] for row in answers[user]] for user in range(len(rows))]
    assert (found[0], found[1][:3], found[2], found[3]) == (best, best[1:], best[2:], [best[1], best[3]])


def test_the_exclusions_of_the_call_hold_for_every_row_beside_those_of_the_row(folder, pipe, tmp_path):
    best = [entry["item_id"] for entry in pipe(["10"])]
    rows = [{"history": ["10"]}, {"history": ["10"], "exclude": best[1:2]}, {"history": ["10"], "candidates": best[:3]}]
    source = request_file(tmp_path / "in.parquet", rows)
    limited = pipeline("sequential-recommendation", model=folder, device="cpu", exclude=best[:1], candidates=best)
    recommend_file(limited, source, tmp_path / "out.parquet")
    answers = answers_by_user(tmp_path / "out.parquet")
    assert [[row["item_id"] for row in answers[user]] for user in range(3)] == [best[1:], best[2:], best[1:3]]


def test_what_the_catalogue_lacks_is_left_out_with_one_warning_for_all_files(pipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bert4rec_hf.serving.history_files, "ROWS_PER_BATCH", 2)
    rows = [
        {"history": ["10", "x"]}, {"history": ["y"]}, {"history": ["11"], "candidates": ["z", "12"]},
        {"history": ["x"]}, {"history": ["10"], "candidates": ["z", "w"]}, {"history": ["10"], "candidates": []},
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    for number in range(2):
        request_file(tmp_path / "in" / f"{number}.parquet", rows)
    for output in ("out.parquet", "out"):
        caplog.clear()
        recommend_file(pipe, tmp_path / "in", tmp_path / output)
        assert [record.getMessage() for record in caplog.records] == [
            "left out 12 items that the catalogue lacks, such as 'x', 'y', 'z'",
            "4 histories get no recommendations, since the catalogue has none of their candidates",
        ]
    assert set(answers_by_user(tmp_path / "out.parquet")) == {0, 1, 2, 3}


def test_candidates_of_another_catalogue_are_an_error(pipe, tmp_path):
    rows = [{"history": ["10", "x"]}, {"history": ["10"], "candidates": ["z", "w"]}]
    source = request_file(tmp_path / "in.parquet", rows)
    with pytest.raises(
        ValueError, match=r"none of the candidates of the first 2 histories of .*such as 'z'; the ids of"
    ):
        recommend_file(pipe, source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def write_parts(folder):
    """Three files of histories with 5, 0 and 8 users."""
    folder.mkdir()
    users = [f"user {number}" for number in range(13)]
    for part, (start, end) in enumerate([(0, 5), (5, 5), (5, 13)]):
        items = [[ITEMS[number % len(ITEMS)]] for number in range(start, end)]
        write(folder / f"{part}.parquet", pa.array(users[start:end], pa.string()), items, pa.list_(pa.string()))
    return users


def test_a_folder_of_parts_gives_one_file_or_a_folder_of_parts_with_the_same_rows(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(bert4rec_hf.serving.history_files, "ROWS_PER_PART", 6)
    users = write_parts(tmp_path / "in")
    expected = None
    for source in (tmp_path / "in", f"{tmp_path}/in/*.parquet"):
        assert recommend_file(pipe, source, tmp_path / "out.parquet") == 13
        assert recommend_file(pipe, source, tmp_path / "out") == 13
        # A file of 8 rows is two parts.
        names = [f"part-0000{part}-of-00004.parquet" for part in range(4)]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
        parts = [pq.read_table(tmp_path / "out" / name) for name in names]
        assert [len(part) for part in parts] == [20, 0, 24, 8]
        table = pq.read_table(tmp_path / "out.parquet")
        assert pa.concat_tables(parts).equals(table)
        assert expected is None or expected.equals(table)
        expected = table
    answers = answers_by_user(tmp_path / "out.parquet")
    assert list(answers) == users
    for number, user in enumerate(users):
        assert_same(answers[user], pipe([ITEMS[number % len(ITEMS)]]))


def test_json_lines_give_what_parquet_gives(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a", "b"], [["10", "007"], []])
    rows = [{"user_id": user, "item_id": items} for user, items in (("a", ["10", "007"]), ("b", []))]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recommend_file(pipe, source, tmp_path / "1.parquet")
    assert recommend_file(pipe, tmp_path / "in.jsonl", tmp_path / "2.parquet") == 2
    assert pq.read_table(tmp_path / "1.parquet").equals(pq.read_table(tmp_path / "2.parquet"))
    (tmp_path / "in.jsonl").write_text('{"user_id": 1, "item_id": ["10"]}\n')
    recommend_file(pipe, tmp_path / "in.jsonl", tmp_path / "3.parquet")
    assert pq.read_table(tmp_path / "3.parquet")["user_id"].to_pylist() == [1] * 4


def test_an_earlier_folder_is_replaced_with_all_its_parts_and_one_with_other_files_is_not(pipe, tmp_path):
    write_parts(tmp_path / "in")
    source = write(tmp_path / "in.parquet", ["a"], [["10"]])
    (tmp_path / "out").mkdir()  # an empty folder is filled
    recommend_file(pipe, tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3
    recommend_file(pipe, source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-00000-of-00001.parquet"]
    earlier = (tmp_path / "out" / "part-00000-of-00001.parquet").read_bytes()
    for name, content in (("notes.txt", b"of yesterday"), ("part-00001-of-00002.parquet", source.read_bytes())):
        (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"out holds {name}, which is no Parquet file of .* choose another --output"
        ):
            recommend_file(pipe, source, tmp_path / "out")
        assert (tmp_path / "out" / name).read_bytes() == content
        (tmp_path / "out" / name).unlink()
    assert (tmp_path / "out" / "part-00000-of-00001.parquet").read_bytes() == earlier
    assert {path.name for path in tmp_path.iterdir()} == {"in", "in.parquet", "out"}


@pytest.mark.parametrize(
    "error", [RuntimeError("no memory is left"), KeyboardInterrupt()], ids=["failure", "interrupt"]
)
def test_a_run_that_ends_early_leaves_no_part_and_an_earlier_folder_as_it_was(pipe, tmp_path, monkeypatch, error):
    write_parts(tmp_path / "in")
    recommend_file(pipe, write(tmp_path / "in.parquet", ["a"], [["10"]]), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    answer = bert4rec_hf.serving.bulk._Run.answer

    def fails_at_the_last(run, batch):
        if "user 12" in batch.users.to_pylist():
            raise error
        return answer(run, batch)

    monkeypatch.setattr(bert4rec_hf.serving.bulk._Run, "answer", fails_at_the_last)
    for output in ("out", "new", "empty", "new.parquet"):
        with pytest.raises(type(error)):
            recommend_file(pipe, tmp_path / "in", tmp_path / output)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "in.parquet", "out", "empty"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-00000-of-00001.parquet"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_wrong_column_in_the_last_file_is_found_before_the_first_is_read(pipe, tmp_path):
    write_parts(tmp_path / "in")
    pq.write_table(pa.table({"user_id": ["z"], "item_id": [["10"]], "exclud": [["11"]]}), tmp_path / "in" / "9.parquet")
    with pytest.raises(ValueError, match=r"9\.parquet: unknown key 'exclud' beside a history: did you mean exclude\?"):
        recommend_file(None, tmp_path / "in", tmp_path / "out")  # without a pipeline, a file that is read would fail
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_an_output_among_the_histories_is_an_error(pipe, tmp_path):
    write_parts(tmp_path / "in")
    for output in (tmp_path / "in", tmp_path, tmp_path / "in" / "0.parquet"):
        with pytest.raises(ValueError, match="holds the histories themselves"):
            recommend_file(pipe, tmp_path / "in", output)
    for output in (tmp_path / "in" / "out", tmp_path / "in" / "out.parquet"):
        with pytest.raises(
            ValueError, match=r"is in the folder of the histories, .*in; choose an --output outside of it"
        ):
            recommend_file(pipe, tmp_path / "in", output)
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"0.parquet", "1.parquet", "2.parquet"}


def test_users_with_unknown_items_alone_are_no_error_where_others_follow(pipe, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "0.parquet", ["new"], [["unknown"]])
    write(tmp_path / "in" / "1.parquet", ["old"], [["10"]])
    assert recommend_file(pipe, tmp_path / "in", tmp_path / "out.parquet") == 2
    assert_same(answers_by_user(tmp_path / "out.parquet")["new"], pipe([]))


def frames():
    yield pandas.DataFrame({"user_id": ["a", "b"], "item_id": [np.array(["10", "007"], object), np.array([], object)]})
    yield pandas.DataFrame({"user_id": [], "item_id": []})
    yield pandas.DataFrame({"user_id": ["c", "d"], "item_id": [["11"], ["x"]], "exclude": [["12"], None]})


def test_a_function_for_spark_answers_data_frames_as_the_pipeline_answers(folder, pipe, monkeypatch, caplog):
    answer = recommend_batches(folder, top_k=4, exclude=(item for item in ["13"]))
    answer = pickle.loads(pickle.dumps(answer))
    found = list(answer(frames()))
    assert [list(frame.columns) for frame in found] == [["user_id", "item_id", "rank", "score"]] * 3
    assert [len(frame) for frame in found] == [8, 0, 8]
    assert [str(frame[name].dtype) for frame in found for name in ("rank", "score")] == ["int32", "float32"] * 3
    rows = pandas.concat(found).to_dict("records")
    requests = {"a": ["10", "007"], "b": [], "c": {"history": ["11"], "exclude": ["12"]}, "d": []}
    for user, request in requests.items():
        assert_same([row for row in rows if row["user_id"] == user], pipe(request, exclude=["13"]))
    assert [record.getMessage() for record in caplog.records] == [
        "left out 1 items that the catalogue lacks, such as 'x'"
    ]


def test_a_worker_of_spark_loads_the_model_once_and_computes_with_one_thread(folder, monkeypatch):
    loaded, threads = [], []
    load_model, recommend = bert4rec_hf.serving.bulk.load_model, Bert4RecForMaskedItemPrediction.recommend
    monkeypatch.setattr(bert4rec_hf.serving.bulk, "load_model", lambda model: loaded.append(model) or load_model(model))
    monkeypatch.setattr(
        Bert4RecForMaskedItemPrediction,
        "recommend",
        lambda *args, **kwargs: threads.append(torch.get_num_threads()) or recommend(*args, **kwargs),
    )
    bert4rec_hf.serving.bulk._load.cache_clear()
    torch.set_num_threads(2)
    try:
        # Spark makes the function anew for each partition. Nothing is loaded for a partition without rows.
        content = pickle.dumps(recommend_batches(folder, top_k=3))
        assert list(pickle.loads(content)(iter([]))) == []
        assert loaded == []
        for _ in range(2):
            list(pickle.loads(content)(frames()))
        assert loaded == [str(folder)]
        assert set(threads) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_wrong_argument_of_a_function_for_spark_is_an_error_before_spark_starts(folder):
    for options, message in (
        ({"top_k": 0}, "top_k must be a whole number of at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"exclude": "101"}, r"exclude must be a list of item ids; got the string '101': did you mean \['101'\]"),
        ({"candidates": 5}, "candidates must be a list of item ids; got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            recommend_batches(folder, **options)
