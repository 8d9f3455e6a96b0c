"""Measures the effect of transitions and repeats on a trained model, by their weights: NDCG@10 and HR@10 of a part.

    python benchmarks/transitions.py MODEL DATA [--part validation] [--weights 0 0.25 0.5 1 1.5 2] [--number 64]
                                     [--repeat_weights 0 0.5 1 1.5 2] [--output FOLDER]

MODEL is a model folder and DATA the prepared folder that it was trained on. The transitions of the model are replaced.
Neither transitions nor `repeat_weight` are learnt, so the network would be the same with other weights, except that
training might have chosen another checkpoint. Without weights, the default weight is measured; `--number 0` measures no
transitions. The script prints a row for each weight, with the CPU seconds of creating and ranking the rows. With an
output and one weight of each kind, it keeps the ranks for benchmarks/compare.py.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from quality import write_ranks
from torch.utils.data import DataLoader

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, keep_transitions
from bert4rec_hf.data.data_collator import DataCollatorForMaskedItemPrediction
from bert4rec_hf.data.histories import Histories, read_prepared
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.defaults import default_transition_weight
from bert4rec_hf.evaluation.metrics import ranking_metrics


def ranks_of(
    model: Bert4RecForMaskedItemPrediction, histories: Histories, tokenizer: Bert4RecTokenizer, part: str
) -> tuple[list[str], np.ndarray]:
    """The users with a target in a part, and the ranks that `evaluate_prepared` computes."""
    policy, length = model.config.filter_seen_items, model.config.max_position_embeddings
    rows = ranking_rows(histories, tokenizer, part, filter_seen_items=policy, max_length=length)
    columns = rows.select_columns(["input_ids", "labels", "history_ids", "exclude_ids"])
    ranks = [
        model.rank(
            batch["input_ids"],
            batch["labels"].amax(dim=1),
            batch["attention_mask"],
            history_ids=batch["history_ids"],
            exclude_ids=batch["exclude_ids"],
        )
        for batch in DataLoader(columns, 64, collate_fn=DataCollatorForMaskedItemPrediction(tokenizer))
    ]
    return rows["user_id"][:], torch.cat(ranks).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--part", default="validation", choices=["validation", "test"])
    parser.add_argument("--weights", type=float, nargs="+")
    parser.add_argument("--number", type=int, default=64, help="transitions per item")
    parser.add_argument("--repeat_weights", type=float, nargs="+", help="default: the weight of the model")
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.output and max(len(weights or []) for weights in (options.weights, options.repeat_weights)) > 1:
        parser.error("--output needs one weight of each kind")
    config = Bert4RecConfig.from_pretrained(options.model, num_transitions=options.number)
    model = Bert4RecForMaskedItemPrediction.from_pretrained(options.model, config=config).eval()
    histories, tokenizer, _ = read_prepared(options.data, Bert4RecTokenizer.from_pretrained(options.model))
    num_events, num_items = int(histories.is_training().sum()), tokenizer.num_items
    print(f"{options.model}: {num_events / num_items:.1f} training events an item; {options.part}")
    weights = options.weights or [default_transition_weight(num_events, num_items)]
    for weight, repeat_weight in itertools.product(weights, options.repeat_weights or [config.repeat_weight]):
        if options.number:
            # An item without successors in DATA would otherwise keep the transitions of the model.
            model.history_scores.successor_ids.zero_()
            keep_transitions(model, histories, num_items, weight=weight)
        model.config.repeat_weight = repeat_weight
        start = time.process_time()
        user_ids, ranks = ranks_of(model, histories, tokenizer, options.part)
        seconds, metrics = time.process_time() - start, ranking_metrics(ranks)
        print(
            f"{options.number} of weight {weight:.3g}, repeats of {repeat_weight:.3g}: NDCG@10 "
            f"{metrics['NDCG@10']:.4f}, HR@10 {metrics['HR@10']:.4f}, {seconds:.1f} CPU seconds",
            flush=True,
        )
        if options.output:
            Path(options.output).mkdir(parents=True, exist_ok=True)
            write_ranks(Path(options.output), user_ids, ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
