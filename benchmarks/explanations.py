"""Tests explanations by deletion: without the items that an explanation names, the recommendation must lose most.

    python benchmarks/explanations.py MODEL DATA [--seeds 1 2 3] [--requests 200]

MODEL is a model folder and DATA the prepared folder that it was trained on. For each test user, `explain` names up to
three items of the history behind the first recommendation. They are deleted from the history, and the score of the
recommendation is computed anew. As many other items are deleted for comparison: random ones, once for each seed; the
newest; and those that are most similar to the recommendation (`similar_items`). All are distinct items among the newest
50 of the history, and all occurrences are deleted.

The score is the served one, the network's plus the counted scores of the shortened history, minus its mean over the
candidates, which stay those of the whole history. It is computed from all scores of the catalogue, by other code than
that of `explain`, which leaves out one item at a time and keeps the places of counted scores. So the test covers what
several items do together. The script also times requests with and without an explanation, one after the other, and
writes a section of results/explanations.md.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from quality import log_name
from tables import machine, write_section
from torch import nn
from transformers import pipeline

from bert4rec_hf import Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, ranking_rows, read_prepared
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID
from bert4rec_hf.model.explanation import NUM_EXPLAINED_ITEMS
from bert4rec_hf.model.history_scores import add_to_scores
from bert4rec_hf.model.pipeline import SOURCES_SHOWN

TABLE = Path(__file__).resolve().parent / "results" / "explanations.md"
HEADER = """# Explanations

Written by `benchmarks/explanations.py`, which says what is measured. Each row deletes as many items of a test user's
history as the explanation of the first recommendation names. "drop" is the mean loss of the recommendation's centred
score, in logits. "named minus these" is the mean of the paired differences ± a standard error, and t their ratio. The
last column is the share of users whose first recommendation is another one afterwards.
"""


def all_scores(
    model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, histories: Sequence[Sequence[int]]
) -> torch.Tensor:
    """(histories, vocabulary) the served scores."""
    length = model.config.max_position_embeddings
    inputs = [torch.tensor(tokenizer.append_mask(history, length)) for history in histories]
    states = model.mask_states(nn.utils.rnn.pad_sequence(inputs, batch_first=True))
    scores = model._scores(states, range(model.config.vocab_size)).squeeze(1)
    uncut = [torch.tensor(history, dtype=torch.long) for history in histories]
    return add_to_scores(scores, model.history_scores(nn.utils.rnn.pad_sequence(uncut, batch_first=True)))


@torch.no_grad()
def deletions(
    model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, row: dict[str, list[int]], seeds: list[int]
) -> dict[str, tuple[float, bool]] | None:
    """For each way of deleting items: the drop of the centred score, and whether another item comes first.

    None: there is nothing to compare, since no item is named or too few others are in the history.
    """
    history, excluded = row["history_ids"], torch.tensor([row["exclude_ids"]], dtype=torch.long)
    uncut = torch.tensor([history])
    _, best = model.recommend(torch.tensor([row["input_ids"]]), history_ids=uncut, exclude_ids=excluded, top_k=1)
    sources, contributions = model.explain(tokenizer, uncut, best, exclude_ids=excluded)
    values, places = contributions[0, 0].topk(min(SOURCES_SHOWN, sources.shape[1]))
    named = sources[0, places[values > 0]].tolist()
    examined = list(dict.fromkeys(reversed(history[-NUM_EXPLAINED_ITEMS:])))  # newest first
    others = [item for item in examined if item not in named]
    if not named or len(others) < len(named):
        return None
    similarity = model.similar_items(torch.tensor(examined), candidate_ids=best[0], top_k=1)[0].squeeze(1)
    deleted = {"named": named}
    for seed in seeds:
        random = np.random.default_rng((seed, *history))
        deleted[f"random, seed {seed}"] = random.choice(others, len(named), replace=False).tolist()
    deleted["newest"] = examined[: len(named)]
    deleted["most similar"] = [examined[place] for place in similarity.topk(len(named)).indices.tolist()]
    left = [[item for item in history if item not in items] for items in deleted.values()]
    scores = all_scores(model, tokenizer, [history, *left])
    allowed = torch.ones(scores.shape[1], dtype=torch.bool)
    allowed[:FIRST_ITEM_ID] = False
    allowed[excluded[0]] = False
    scores = scores[:, allowed]
    centred = scores - scores.mean(dim=1, keepdim=True)
    place = int(allowed[: int(best)].sum())
    assert int(centred[0].argmax()) == place  # the recommendation is first in these scores, too
    drops, firsts = (centred[0, place] - centred[1:, place]).tolist(), (centred[1:].argmax(dim=1) != place).tolist()
    return dict(zip(deleted, zip(drops, firsts, strict=True), strict=True))


def times(model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, rows: list[list[int]]) -> str:
    """The milliseconds of a request with and without an explanation, and their ratio."""
    pipe = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu")
    requests = [tokenizer.token_ids_to_item_ids(row) for row in rows]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for request in [*requests[:3], *requests]:
        for explains, found in seconds.items():
            start = time.perf_counter()
            pipe(request, explain=explains)
            found.append(time.perf_counter() - start)
    plain, explained = (1000 * median(found[3:]) for found in seconds.values())
    return (
        f"A request for ten items takes {plain:.1f} ms, and {explained:.1f} ms with explanations, "
        f"{explained / plain:.1f} times as long (medians of {len(requests)} test users)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args()
    model, (histories, tokenizer, preparation) = load_model(options.model).eval(), read_prepared(options.data)
    length, policy = model.config.max_position_embeddings, preparation["filter_seen_items"]
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=policy, max_length=length)
    found = [deletions(model, tokenizer, row, options.seeds) for row in rows if row["history_ids"]]
    compared = [entry for entry in found if entry is not None]
    folders = [Path(folder).resolve() for folder in (options.model, options.data)]
    lines = [
        f"`benchmarks/explanations.py {' '.join(f'{folder.parent.name}/{folder.name}' for folder in folders)}`, "
        f"{len(compared):,} of {len(rows):,} test users, {machine(torch.get_num_threads())}. Users are left out if no "
        "item is named, or if the history has too few others.",
        "",
        "| deleted | drop | named minus these | t | another first |",
        "|---|---|---|---|---|",
    ]
    for name in compared[0]:
        drops = np.array([[entry["named"][0], entry[name][0]] for entry in compared])
        difference = drops[:, 0] - drops[:, 1]
        error = difference.std(ddof=1) / len(difference) ** 0.5
        cells = ["", ""] if name == "named" else [
            f"{difference.mean():+.3f} ± {error:.3f}", f"{difference.mean() / error:.1f}",
        ]  # fmt: skip
        changed = np.mean([entry[name][1] for entry in compared])
        lines.append(f"| {' | '.join([name, f'{drops[:, 1].mean():+.3f}', *cells, f'{changed:.1%}'])} |")
    chosen = np.random.default_rng(0).permutation(len(rows))[: options.requests]
    lines += ["", times(model, tokenizer, [rows[int(place)]["history_ids"] for place in chosen])]
    write_section(TABLE, HEADER, log_name(options.data), lines)


if __name__ == "__main__":
    main()
