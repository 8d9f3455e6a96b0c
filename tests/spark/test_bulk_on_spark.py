"""Recommendations on a Spark cluster of two workers are those of the pipeline."""

import pytest
import torch
from transformers import pipeline

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.serving.bulk import recommend_batches

ITEMS = [str(item) for item in range(10, 60)]
SCHEMA = "user_id string, item_id string, rank int, score float"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, model_max_length=8)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "max_position_embeddings": 8, "initializer_range": 0.5}
    Bert4RecForMaskedItemPrediction(Bert4RecConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows():
    return [
        (f"user {user}", [ITEMS[user % 50]] if user % 5 else [], [ITEMS[3]] if user % 2 else None) for user in range(40)
    ]


def test_spark_gives_every_user_the_answer_of_the_pipeline(session, model):
    frame = session.createDataFrame(rows(), "user_id string, item_id array<string>, exclude array<string>")
    session.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "7")  # of 13 or 14 rows of a partition
    found = frame.repartition(3).mapInPandas(recommend_batches(model, top_k=3), SCHEMA).toPandas()
    recommend = pipeline("sequential-recommendation", model=model, device="cpu", top_k=3)
    assert len(found) == 3 * 40
    for user, history, exclude in rows():
        answer = found[found.user_id == user].sort_values("rank")
        expected = recommend({"history": history, "exclude": exclude})
        assert answer["item_id"].tolist() == [entry["item_id"] for entry in expected]
        assert answer["score"].tolist() == pytest.approx([entry["score"] for entry in expected], abs=1e-5)


def test_integer_ids_are_ids_in_spark_too(session, model):
    frame = session.createDataFrame([(2**60 + 1, [10, 11]), (5, [])], "user_id bigint, item_id array<bigint>")
    schema = SCHEMA.replace("user_id string", "user_id bigint")
    found = frame.mapInPandas(recommend_batches(model, top_k=1), schema).toPandas()
    assert sorted(found.user_id) == [5, 2**60 + 1]


def test_an_error_of_a_row_comes_back_from_spark(session, model):
    frame = session.createDataFrame(
        [("a", ["10"], ["11"])], "user_id string, item_id array<string>, exclud array<string>"
    )
    with pytest.raises(Exception, match="unknown key 'exclud' beside a history: did you mean exclude"):
        frame.mapInPandas(recommend_batches(model), SCHEMA).count()
