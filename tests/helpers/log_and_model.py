"""A small log, a model for it, and the answers of a model, for tests that wrap or shard its weights."""

from pathlib import Path

import torch
from chain_runs import write_chain

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    prepare,
    ranking_rows,
    read_prepared,
    training_rows,
)

NUM_ITEMS, HIDDEN_SIZE = 21, 32


def write_log_and_model(folder: Path) -> tuple[Path, Path, Bert4RecForMaskedItemPrediction]:
    """A prepared log, the folder of a model for it with counted scores, and that model."""
    data, start = folder / "data", folder / "start"
    write_chain(folder / "log.csv", num_users=101, num_items=NUM_ITEMS, length=12, follow=0.9)
    prepare(folder / "log.csv", data)
    tokenizer = Bert4RecTokenizer.from_pretrained(data)
    torch.manual_seed(0)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN_SIZE, max_position_embeddings=50, num_transitions=4,
        initializer_range=0.2,  # scores differ by far more than the tolerances
    )  # fmt: skip
    model = Bert4RecForMaskedItemPrediction(config)
    successors = torch.stack([torch.randperm(NUM_ITEMS)[:4] + 3 for _ in range(NUM_ITEMS)])
    model.history_scores.successor_ids[3:] = successors
    model.history_scores.successor_scores[3:] = torch.rand(NUM_ITEMS, 4)
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    return data, start, model


def trainer_inputs(data: Path) -> dict:
    histories, tokenizer, _ = read_prepared(data)
    return {
        "train_dataset": training_rows(histories),
        "eval_dataset": ranking_rows(histories, tokenizer, "validation", filter_seen_items=False),
        "processing_class": tokenizer,
    }


def histories_in_tokens(model: Bert4RecForMaskedItemPrediction) -> torch.Tensor:
    numbers = torch.arange(8 * 5).reshape(8, 5) % (model.config.vocab_size - 3) + 3
    return torch.cat((numbers, torch.ones(8, 1, dtype=torch.long)), dim=1)


@torch.no_grad()
def answers(model: Bert4RecForMaskedItemPrediction) -> dict[str, torch.Tensor]:
    """The answers of a model for some histories. Item vectors are read before the first forward pass."""
    histories = histories_in_tokens(model)
    item_vectors = model.item_vectors()
    scores, item_ids = model.recommend(histories, top_k=10)
    return {
        "item_vectors": item_vectors,
        "user_vectors": model.user_vectors(histories),
        "logits": model(input_ids=histories).logits[:, -1],
        "scores": scores,
        "item_ids": item_ids,
        "ranks": model.rank(histories, torch.arange(3, 3 + len(histories))),
    }
