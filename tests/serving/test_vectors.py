"""`bert4rec export-vectors`: what a vector database needs for the pipeline's answers."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_runs import fail, succeed
from log_and_model import write_log_and_model
from transformers import pipeline

from bert4rec_hf.model.history_scores import NUM_NEWEST_ITEMS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A prepared folder, a model folder and its export."""
    folder = tmp_path_factory.mktemp("vectors")
    data, model, _ = write_log_and_model(folder)
    output = succeed("export-vectors", model, "--output", folder / "vectors", "--histories", data)
    assert output == [
        f"wrote {folder / 'vectors'}: items.parquet (21 rows), successors.parquet (22 rows), users.parquet (101 rows)"
    ]
    return data, model, folder / "vectors"


def test_products_and_successors_are_the_scores_of_the_pipeline(folders):
    data, model, output = folders
    recommend = pipeline("sequential-recommendation", model=str(model))
    items = pq.read_table(output / "items.parquet").to_pydict()
    users = pq.read_table(output / "users.parquet").to_pydict()
    table = {row["item_id"]: row for row in pq.read_table(output / "successors.parquet").to_pylist()}
    histories = pq.read_table(data / "histories.parquet", columns=["user_id", "item_id"]).to_pydict()
    assert users["user_id"] == histories["user_id"]
    assert items["item_id"] == recommend.tokenizer.items
    assert set(table) == {None, *items["item_id"]}
    scores = np.array(users["vector"]) @ np.array(items["vector"]).T
    weight = recommend.model.config.transition_weight
    for row, history in zip(scores, histories["item_id"], strict=True):
        total = dict(zip(items["item_id"], row, strict=True))
        newest = history[: -NUM_NEWEST_ITEMS - 1 : -1]
        shares = 0.5 ** np.arange(len(newest))
        for item, share in zip(newest, shares / shares.sum(), strict=True):
            for successor, value in zip(table[item]["successors"], table[item]["transition"], strict=True):
                total[successor] += weight * share * value
        expected = {entry["item_id"]: entry["score"] for entry in recommend(history, top_k=21, filter_seen_items=False)}
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_ten_hits_and_the_successors_have_the_best_ten(folders):
    data, model, output = folders
    recommend = pipeline("sequential-recommendation", model=str(model), top_k=5, filter_seen_items=False)
    items = pq.read_table(output / "items.parquet").to_pydict()
    users = pq.read_table(output / "users.parquet").to_pydict()
    successors = {row["item_id"]: row["successors"] for row in pq.read_table(output / "successors.parquet").to_pylist()}
    histories = pq.read_table(data / "histories.parquet", columns=["item_id"])["item_id"].to_pylist()
    found = np.argsort(-np.array(users["vector"]) @ np.array(items["vector"]).T, axis=1)[:, :5]
    for history, hits in zip(histories, found, strict=True):
        union = {items["item_id"][hit] for hit in hits}.union(*(successors[item] for item in history[-8:]), history)
        answer = recommend({"history": history, "candidates": sorted(union)})
        assert [entry["item_id"] for entry in answer] == [entry["item_id"] for entry in recommend(history)]


def test_an_earlier_export_is_replaced_and_nothing_else(folders, tmp_path):
    _, model, _ = folders
    assert "users.parquet" not in succeed("export-vectors", model, "--output", tmp_path / "out")[0]
    succeed("export-vectors", model, "--output", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    message = fail("export-vectors", model, "--output", tmp_path / "out")
    assert "holds notes.txt, which is no file of an export" in message
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert "--batch_size must be at least 1" in fail("export-vectors", model, "--output", "x", "--batch_size", "0")
    (tmp_path / "bad.jsonl").write_text('{"user_id": "a", "item_id": [null]}\n')
    fail("export-vectors", model, "--output", tmp_path / "new", "--histories", tmp_path / "bad.jsonl")
    assert not (tmp_path / "new").exists()
