"""Compares ways of finding similar items, by the rank of each user's next item among the items similar to the last.

    python benchmarks/similar_items.py MODEL DATA

MODEL is a model folder and DATA the prepared folder that it was trained on. For each user, the catalogue is ordered by
the similarity to the last item before the target, and the target is ranked in it. Seen items are left out if the data
says so. A way is chosen on the validation targets; the test targets, whose last item is the validation target, confirm
it. Ties count against the target. "next" has the items that the whole model recommends after a history of that item
alone: it knows what follows, and is no similarity.

A similarity is used beyond this protocol, on the pages of all items. So two columns describe the ten most similar items
of every item: the share of the catalogue that is among them (coverage), and the mean share of items that are less
popular than they are (popularity). The script writes a section of results/similar_items.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from quality import log_name
from tables import machine, write_section
from torch import nn

from bert4rec_hf import Bert4RecForMaskedItemPrediction, read_prepared
from bert4rec_hf.data.counting import item_counts
from bert4rec_hf.data.histories import Histories
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, UNK_TOKEN_ID

TABLE = Path(__file__).resolve().parent / "results" / "similar_items.md"
HEADER = """# Similar items

Written by `benchmarks/similar_items.py`, which says what is measured. Each row is a way of scoring the similarity of an
item to the last item of a user; `similar_items` of the model is the row in bold. Differences are those of NDCG@10 from
that row, user by user, ± a standard error. "of the item" divides successor scores by the highest of the item,
"of all" by the highest of the catalogue; "both ways" adds the scores of the two directions. "next" is no similarity: it
has the recommendations for a history of the last item alone. "coverage" is the share of the catalogue among the ten
most similar items of all items, and "popularity" the mean share of items that are less popular than these.
"""
OURS = "cosine of centred vectors + successors, of all"
BATCH_SIZE, TOP_K = 256, 10
Scores = Callable[[torch.Tensor], torch.Tensor]


def ways(model: Bert4RecForMaskedItemPrediction) -> dict[str, Scores]:
    """For each way, a function from (batch,) token ids to (batch, vocabulary) scores."""
    vocab_size, counted = model.config.vocab_size, model.history_scores
    vectors = nn.functional.pad(model.item_vectors()[:, :-1], (0, 0, FIRST_ITEM_ID, 0))
    centred = vectors - vectors[FIRST_ITEM_ID:].mean(dim=0)
    lengths = centred.norm(dim=1, keepdim=True)
    successor_ids, successor_scores = counted.successor_ids.long().clone(), counted.successor_scores.clone()
    successor_ids[:FIRST_ITEM_ID] = 0  # the row of [PAD] holds popular items
    # For each item, the places of the flat tables at which it is a successor.
    numbers = successor_ids.flatten().bincount(minlength=vocab_size).tolist()
    places_of = successor_ids.flatten().argsort(stable=True).split(numbers)

    def cosine(table: torch.Tensor) -> Scores:
        directions = nn.functional.normalize(table, dim=1)
        return lambda items: directions[items] @ directions.T

    def forwards(items: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(items), vocab_size).scatter_add_(1, successor_ids[items], successor_scores[items])

    def both_ways(items: torch.Tensor) -> torch.Tensor:
        scores = forwards(items)
        for row, item in zip(scores, items.tolist(), strict=True):
            row[places_of[item] // successor_ids.shape[1]] += successor_scores.flatten()[places_of[item]]
        return scores

    def of_item(scores: Scores) -> Scores:
        return lambda items: (found := scores(items)) / found.amax(dim=1, keepdim=True).clamp(min=1e-12)

    def of_all(scores: Scores) -> Scores:
        batches = torch.arange(FIRST_ITEM_ID, vocab_size).split(BATCH_SIZE)
        highest = max(scores(items)[:, FIRST_ITEM_ID:].amax() for items in batches)
        return lambda items: scores(items) / highest

    def added(*parts: Scores) -> Scores:
        return lambda items: sum(part(items) for part in parts)

    def product(items: torch.Tensor) -> torch.Tensor:
        return centred[items] @ centred.T / lengths[items].clamp(min=1e-12) ** 2

    def following(items: torch.Tensor) -> torch.Tensor:
        histories = torch.stack((items, torch.full_like(items, MASK_TOKEN_ID)), dim=1)
        scores = model._scores(model.mask_states(histories), range(vocab_size)).squeeze(1)
        return scores + model.config.transition_weight * forwards(items)

    raw, of_centred = cosine(vectors), cosine(centred)
    return {
        "cosine of vectors": raw,
        "cosine of centred vectors": of_centred,
        "successors": forwards,
        "successors both ways": both_ways,
        "cosine of vectors + successors, of all": added(raw, of_all(forwards)),
        "cosine of centred vectors + successors, of the item": added(of_centred, of_item(forwards)),
        OURS: added(of_centred, of_all(forwards)),
        "cosine of centred vectors + successors both ways, of the item": added(of_centred, of_item(both_ways)),
        "cosine of centred vectors + successors both ways, of all": added(of_centred, of_all(both_ways)),
        "product of centred vectors, of the item": product,
        "product of centred vectors, of the item + successors, of all": added(product, of_all(forwards)),
        "next": following,
    }


def gains(scores_of: Scores, histories: Histories, part: str, filter_seen_items: bool) -> tuple[np.ndarray, np.ndarray]:
    """(users,) whether the target of each user is among the first ten, and its gain, as in NDCG@10."""
    users = np.flatnonzero(histories.target_positions[part] >= 0)
    starts, positions = histories.offsets[users], histories.target_positions[part][users]
    item_ids = torch.from_numpy(histories.item_ids).long()
    targets, last = item_ids[starts + positions], item_ids[starts + positions - 1]
    ranks = torch.zeros(len(users))
    for batch in torch.arange(len(users)).split(BATCH_SIZE):
        scores = scores_of(last[batch])
        scores[:, :FIRST_ITEM_ID] = -torch.inf
        for row, user in zip(scores, batch.tolist(), strict=True):
            first = starts[user] + (0 if filter_seen_items else positions[user] - 1)
            row[item_ids[first : starts[user] + positions[user]]] = -torch.inf
        of_target = scores.gather(1, targets[batch].unsqueeze(1))
        ranks[batch] = (scores >= of_target).sum(dim=1).float().masked_fill(of_target.squeeze(1).isneginf(), torch.inf)
    ranks = ranks.masked_fill((last == UNK_TOKEN_ID) | (targets == UNK_TOKEN_ID), torch.inf)
    hits = ranks <= TOP_K
    return hits.double().numpy(), (hits / (ranks + 1).log2()).double().numpy()


def lists(scores_of: Scores, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(items, 10) the scores and token ids of the most similar items of every item."""
    found = []
    for items in torch.arange(FIRST_ITEM_ID, vocab_size).split(BATCH_SIZE):
        scores = scores_of(items)
        scores[:, :FIRST_ITEM_ID] = -torch.inf
        found.append(scores.scatter_(1, items.unsqueeze(1), -torch.inf).topk(TOP_K))
    scores, item_ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, item_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    options = parser.parse_args()
    model, (histories, tokenizer, preparation) = load_model(options.model).eval(), read_prepared(options.data)
    counts = torch.from_numpy(item_counts(histories, tokenizer.num_items))
    less_popular = torch.searchsorted(counts[FIRST_ITEM_ID:].sort().values, counts) / tokenizer.num_items
    folders = [Path(folder).resolve() for folder in (options.model, options.data)]
    lines = [
        f"`benchmarks/similar_items.py {' '.join(f'{folder.parent.name}/{folder.name}' for folder in folders)}`, "
        f"{histories.num_targets('validation'):,} users, {tokenizer.num_items:,} items, "
        f"{machine(torch.get_num_threads())}",
        "",
        "| similarity | validation HR@10 | NDCG@10 | difference | test HR@10 | NDCG@10 | difference | coverage | "
        "popularity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found, described = {}, {}
    with torch.no_grad():
        for name, scores_of in ways(model).items():
            policy = preparation["filter_seen_items"]
            found[name] = {part: gains(scores_of, histories, part, policy) for part in ("validation", "test")}
            scores, item_ids = lists(scores_of, model.config.vocab_size)
            described[name] = (
                f"{len(item_ids.unique()) / tokenizer.num_items:.2f} | {less_popular[item_ids].mean():.2f}"
            )
            if name == OURS:
                batches = torch.arange(FIRST_ITEM_ID, model.config.vocab_size).split(BATCH_SIZE)
                ours = torch.cat([model.similar_items(items, top_k=TOP_K)[0] for items in batches])
                torch.testing.assert_close(ours, scores)  # the package computes what is measured here
    for name, of_part in found.items():
        cells = [f"**{name}**" if name == OURS else name]
        for part, (hits, ndcg) in of_part.items():
            difference = ndcg - found[OURS][part][1]
            error = difference.std(ddof=1) / len(difference) ** 0.5
            cells += [f"{hits.mean():.4f}", f"{ndcg.mean():.4f}"]
            cells.append("" if name == OURS else f"{difference.mean():+.4f} ± {error:.4f}")
        lines.append(f"| {' | '.join([*cells, described[name]])} |")
    write_section(TABLE, HEADER, log_name(options.data), lines)


if __name__ == "__main__":
    main()
