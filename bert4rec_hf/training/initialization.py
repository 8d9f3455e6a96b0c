"""Initialising a model from counts: item vectors from co-occurrence, vectors of new items, and transitions."""

from typing import Any

import numpy as np
import torch

from ..data.counting import conversion_scores, cooccurrence_vectors, item_counts, neighbours, transitions
from ..data.histories import AnyHistories
from ..defaults import default_transition_weight
from ..model.configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction


@torch.no_grad()
def start_from_cooccurrence(
    model: Bert4RecForMaskedItemPrediction,
    histories: AnyHistories,
    num_items: int,
    *,
    with_mean: bool = True,
    seed: int = 0,
) -> None:
    """Set the item vectors of a new model to `cooccurrence_vectors`, and let its first layer pass on their mean.

    Args:
        model: The model, which is changed in place. An item without neighbours keeps its vector.
        histories: Histories from `read_prepared`, or `StreamedHistories`.
        num_items: Number of items in the catalogue.
        with_mean: Whether the output projection of the first layer's attention is set to the inverse of its value
            projection, an orthogonal matrix from PyTorch's generator. Queries and keys of a new model are near 0, so
            the attention averages over the history. The [MASK] then starts with the mean of the history's item
            vectors, and the neighbours of these items get the highest scores before any training.
        seed: Seed of `cooccurrence_vectors`.
    """
    vectors = cooccurrence_vectors(histories, num_items, model.config.hidden_size, seed=seed)
    has_neighbours = vectors.any(dim=1)
    table = model.get_input_embeddings().weight
    places = FIRST_ITEM_ID + has_neighbours.nonzero().squeeze(1).to(table.device)
    table[places] = vectors[has_neighbours].to(table)
    if with_mean:
        attention: Any = model.model.layers[0].attention
        torch.nn.init.orthogonal_(attention.value.weight)
        attention.output.weight.copy_(attention.value.weight.T)


@torch.no_grad()
def start_new_items(
    model: Bert4RecForMaskedItemPrediction, histories: AnyHistories, num_items: int, num_new: int, *, seed: int = 0
) -> None:
    """Set the vectors and biases of items that a model has not been trained on, from the items that it has been.

    The vector of a new item is the mean of the vectors of its old neighbours, weighted by `neighbours`. Its bias is
    what a line through the biases of the old items, over ln(1 + number of events), gives for its number of events.

    Args:
        model: The model, which is changed in place. A new item without old neighbours keeps vector and bias.
        histories: Histories from `read_prepared`, or `StreamedHistories`.
        num_items: Number of items in the catalogue.
        num_new: Number of new items, which have the highest token ids.
        seed: Seed of `neighbours`.
    """
    num_old = num_items - num_new
    first, second, weight = neighbours(histories, num_items, seed=seed)
    joins = (first >= num_old) & (second < num_old)
    first, second, weight = first[joins] - num_old, second[joins], weight[joins]
    vectors, biases = model.get_input_embeddings().weight, model.item_bias.weight
    total = torch.zeros(num_new).index_add_(0, first, weight)
    mean = torch.zeros(num_new, vectors.shape[1])
    mean.index_add_(0, first, vectors.cpu()[FIRST_ITEM_ID + second] * weight.unsqueeze(1))
    has_neighbours = total > 0
    places = FIRST_ITEM_ID + num_old + has_neighbours.nonzero().squeeze(1).to(vectors.device)
    vectors[places] = (mean / total.unsqueeze(1))[has_neighbours].to(vectors)

    size = np.log1p(item_counts(histories, num_items))
    old = np.flatnonzero(size[: FIRST_ITEM_ID + num_old])
    if len(old) > 1:
        line = np.polynomial.Polynomial.fit(size[old], biases.float().cpu().numpy()[old], 1)
        biases[places] = torch.from_numpy(line(size[places.cpu().numpy()])).to(biases)


@torch.no_grad()
def keep_transitions(
    model: Bert4RecForMaskedItemPrediction,
    histories: AnyHistories,
    num_items: int,
    *,
    weight: float | None = None,
    seed: int = 0,
) -> None:
    """Count transitions and store them in a model: the `config.num_transitions` strongest successors of each item.

    `HistoryScores` adds them to the scores wherever items are ranked. The training loss does not include them: it
    predicts the same pairs that were counted, so the transitions would look more reliable than they are.

    Args:
        model: The model, which is changed in place. Its `num_transitions` must be above 0. An item without successors
            in these histories keeps the transitions that it has.
        histories: Histories from `read_prepared`, or `StreamedHistories`.
        num_items: Number of items in the catalogue.
        weight: New value of `config.transition_weight`. None: `default_transition_weight`.
        seed: Seed of `transitions`.

    Raises:
        ValueError: If `num_transitions` of the model is 0.
    """
    if not model.config.num_transitions:
        raise ValueError(
            "the model has no room for transitions; got num_transitions=0: create it with "
            "Bert4RecConfig(num_transitions=64)"
        )
    if weight is None:
        num_events = histories.num_training_events()
        weight = default_transition_weight(num_events, num_items, model.config.filter_seen_items)
    model.config.transition_weight = weight
    found = transitions(
        histories,
        num_items,
        model.config.num_transitions,
        # What was viewed may be bought next, also where what was bought is never recommended again.
        with_self_pairs=not model.config.filter_seen_items or model.config.num_event_types > 0,
        seed=seed,
    )
    counted = found[0].any(dim=1)
    counted[PAD_TOKEN_ID] = True
    kept: Any = model.history_scores
    for buffer, values in zip((kept.successor_ids, kept.successor_scores, kept.next_item_scores), found, strict=True):
        buffer[counted.to(buffer.device)] = values[counted].to(buffer)


@torch.no_grad()
def keep_conversion_scores(model: Bert4RecForMaskedItemPrediction, histories: AnyHistories, *, seed: int = 0) -> None:
    """Count conversion scores and store them in a model with event types; see `counting.conversion_scores`.

    Args:
        model: The model, which is changed in place. A target type without events in these histories keeps its scores.
        histories: Histories from `read_prepared`, or `StreamedHistories`, with event types.
        seed: Seed of the sampled histories.
    """
    found = conversion_scores(histories, model.config.num_event_types, seed=seed)
    kept: Any = model.history_scores.conversion_scores
    is_counted = found.flatten(1).any(dim=1)
    kept[is_counted.to(kept.device)] = found[is_counted].to(kept)
