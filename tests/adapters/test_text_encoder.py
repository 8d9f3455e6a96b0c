"""Features of the kind text, with a real sentence-transformers model, whose weights the wheel of wordllama has."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import pipeline

from bert4rec_hf import Bert4RecTokenizer, Bert4RecTrainingArguments, prepare, train_prepared
from bert4rec_hf.runs.update_items import update_items

sentence_transformers = pytest.importorskip("sentence_transformers", reason="make test-adapters has it")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    package = Path(importlib.util.find_spec("wordllama").submodule_search_locations[0])
    tokenizer = Tokenizer.from_file(str(package / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    (weights,) = load_file(str(package / "weights" / "l2_supercat_256.safetensors")).values()
    folder = tmp_path_factory.mktemp("encoder") / "wordllama"
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    module = StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))
    sentence_transformers.SentenceTransformer(modules=[module]).save(str(folder))
    return folder


def test_titles_make_vectors_of_new_items(encoder, tmp_path):
    fruit, tools = ["apple", "pear", "plum", "cherry"], ["hammer", "saw", "drill", "wrench"]
    random = np.random.default_rng(0)
    rows = []
    for user in range(80):
        words = (fruit, tools)[user % 2]
        rows += [(f"u{user}", words[random.integers(4)], time) for time in range(8)]
    users, items, times = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), tmp_path / "log.parquet")
    titles = {name: f"a fresh {name}" for name in fruit} | {name: f"a steel {name}" for name in tools}
    pq.write_table(
        pa.table({"item_id": [*titles, "new"], "title": [*titles.values(), "a fresh peach"]}),
        tmp_path / "items.parquet",
    )
    prepare(
        tmp_path / "log.parquet",
        tmp_path / "data",
        items=tmp_path / "items.parquet",
        item_features=["title:text"],
        text_encoder=str(encoder),
        filter_seen_items=False,
    )
    arguments = Bert4RecTrainingArguments(str(tmp_path / "model"), num_train_epochs=5, use_cpu=True, disable_tqdm=True)
    train_prepared(tmp_path / "data", arguments, hidden_size=32, intermediate_size=64)
    (column,) = Bert4RecTokenizer.from_pretrained(tmp_path / "model").item_features.columns
    assert (column["source"], column["encoder"], column["width"]) == ("title", "wordllama", 256)
    for path in (tmp_path / "model").glob("*.json"):
        assert str(tmp_path) not in path.read_text()  # no path of this machine

    pq.write_table(pa.table({"item_id": ["late"], "title": ["a steel screwdriver"]}), tmp_path / "late.parquet")
    update_items(tmp_path / "model", tmp_path / "late.parquet", text_encoder=str(encoder))
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "model"))
    for history, expected in ((fruit, "new"), (tools, "late")):
        found = recommend({"history": history, "candidates": ["new", "late"]}, top_k=1)
        assert found[0]["item_id"] == expected
    record = json.loads((tmp_path / "model" / "new_items.json").read_text())
    assert record["num_new_items"] == 1
