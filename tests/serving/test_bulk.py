"""From a Parquet file of histories to a Parquet file of recommendations."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import pipeline

import bert4rec_hf.serving.bulk
from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.serving.bulk import recommend_file

ITEMS = ["007", "a b", "[MASK]", *map(str, range(10, 27))]
HISTORIES = [["10", "007"], [], ["a b"], ["11", "12", "[MASK]", "10"], None, ["13"], ["unknown", "14"]]


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
        assert_same(answers[user], pipe(history or []))


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


def test_nulls_in_a_history_and_in_place_of_one_are_left_out(pipe, tmp_path):
    rows = {"user_id": ["a", "b"], "item_id": [["10", None, "13"], None]}
    pq.write_table(pa.table(rows), tmp_path / "histories.parquet")
    assert recommend_file(pipe, tmp_path / "histories.parquet", tmp_path / "out.parquet") == 2
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    for user, history in (("a", ["10", "13"]), ("b", [])):
        expected = [entry["item_id"] for entry in pipe(history)]
        assert [row["item_id"] for row in found if row["user_id"] == user] == expected


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
    monkeypatch.setattr(bert4rec_hf.serving.bulk, "ROWS_PER_BATCH", 5)
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

    def watched(rows, batch_size):
        nonlocal answered, most_ahead
        for answer in pipe(rows, batch_size=batch_size):
            most_ahead = max(most_ahead, read - answered)
            answered += 1
            yield answer

    watched.tokenizer = pipe.tokenizer
    source = write(tmp_path / "in.parquet", list(range(200)), [["10"]] * 200)
    monkeypatch.setattr(bert4rec_hf.serving.bulk, "ROWS_PER_BATCH", 16)
    monkeypatch.setattr(bert4rec_hf.serving.bulk.pq, "ParquetFile", CountedFile)
    recommend_file(watched, source, tmp_path / "out.parquet", batch_size=8)
    assert (read, answered) == (200, 200)
    assert 8 <= most_ahead <= 16


def test_a_failure_leaves_an_earlier_output_as_it_was_and_nothing_beside_it(pipe, tmp_path, monkeypatch):
    source = write(tmp_path / "in.parquet", ["a", "b", "c"], [["10"], ["11"], ["12"]])
    recommend_file(pipe, write(tmp_path / "other.parquet", ["z"], [["13"]]), tmp_path / "out.parquet")
    before = (tmp_path / "out.parquet").read_bytes()
    preprocess = pipe.preprocess

    def fails_at_the_last(inputs, **options):  # when rows have been written and others are being processed
        if list(inputs.history) == ["12"]:
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
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        recommend_file(pipe, source, tmp_path / "out.parquet", batch_size=0)


@pytest.mark.parametrize("missing", ["user_id", "item_id"])
def test_a_missing_column_is_an_error_that_names_it_and_those_that_are_there(pipe, tmp_path, missing):
    write(tmp_path / "all.parquet", ["a"], [["10"]])
    pq.write_table(pq.read_table(tmp_path / "all.parquet").drop_columns([missing]), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=rf"in\.parquet has no column {missing}.*'train_end'"):
        recommend_file(pipe, tmp_path / "in.parquet", tmp_path / "out.parquet")


def test_a_log_in_the_place_of_histories_is_an_error_that_says_how_to_make_them(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a", "b"], ["10", "11"], pa.string())
    with pytest.raises(ValueError, match=r"must be a list, one history per row; got string.*bert4rec prepare"):
        recommend_file(pipe, source, tmp_path / "out.parquet")


def test_a_file_that_is_no_parquet_is_an_error(pipe, tmp_path):
    (tmp_path / "in.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(ValueError, match=r"in\.csv is not a Parquet file"):
        recommend_file(pipe, tmp_path / "in.csv", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_a_folder_as_output_is_an_error_that_suggests_a_file(pipe, tmp_path):
    source = write(tmp_path / "in.parquet", ["a"], [["10"]])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"is a folder; name a file, for example .*recommendations\.parquet"):
        recommend_file(pipe, source, tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []


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

        def __call__(self, rows, batch_size):
            recommend_file(pipe, source, tmp_path / "out.parquet")
            return pipe(rows, batch_size=batch_size)

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
