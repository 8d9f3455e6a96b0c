"""What was counted in the log, put into a new model."""

from typing import Any

import torch

from ..data.counting import cooccurrence_vectors, transitions
from ..data.histories import Histories
from ..defaults import default_transition_weight
from ..model.configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction


@torch.no_grad()
def start_from_cooccurrence(
    model: Bert4RecForMaskedItemPrediction,
    histories: Histories,
    num_items: int,
    *,
    with_mean: bool = True,
    seed: int = 0,
) -> None:
    """Give a new model the item vectors, and a first layer that hands their mean on.

    Args:
        model: What changes. An item without neighbours keeps its vector.
        histories, num_items, seed: As in `cooccurrence_vectors`. What `with_mean` draws, PyTorch's own generator gives.
        with_mean: Whether values and output of the first layer's attention undo one another. Queries and keys are near
            0, as they are in every new model: a history's [MASK] has the mean of its items' vectors then, and what
            stands near them has the highest scores before anything is learnt.
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
def keep_transitions(
    model: Bert4RecForMaskedItemPrediction,
    histories: Histories,
    num_items: int,
    *,
    weight: float | None = None,
    seed: int = 0,
) -> None:
    """Give a model its transitions, `config.num_transitions` of each item, see `transitions`.

    They are added to the scores wherever items are ranked (`HistoryScores`). Training, which predicts the very pairs
    that are counted, is without them: they would look surer than they are.

    Args:
        model: What changes; its `num_transitions` is above 0. An item that has none in these histories keeps the
            transitions that it has.
        histories, num_items, seed: As in `cooccurrence_vectors`.
        weight: The `config.transition_weight` from now on. None: `default_transition_weight`.

    Raises:
        ValueError: If the model has no room for them.
    """
    if not model.config.num_transitions:
        raise ValueError("the model has no room for transitions: make it with Bert4RecConfig(num_transitions=64)")
    if weight is None:
        weight = default_transition_weight(int(histories.is_training().sum()), num_items)
    model.config.transition_weight = weight
    successor_ids, successor_scores = transitions(histories, num_items, model.config.num_transitions, seed=seed)
    counted = successor_scores.any(dim=1)
    counted[PAD_TOKEN_ID] = True
    kept: Any = model.history_scores
    places = counted.nonzero().squeeze(1).to(kept.successor_ids.device)
    kept.successor_ids[places] = successor_ids[counted].to(kept.successor_ids)
    kept.successor_scores[places] = successor_scores[counted].to(kept.successor_scores)
