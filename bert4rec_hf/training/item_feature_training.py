"""Training the projection from item features together with the item vectors."""

from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.item_features import SparseRows, fit_projection, product, select_rows
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from ..model.tokenization_bert4rec import Bert4RecTokenizer

# Share of the items that have no own part in a training step.
SHARE_WITHOUT_OWN_PART = 0.1


@torch.no_grad()
def fit_item_projection(
    model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, table: Any
) -> dict[str, float]:
    """Fit the projection from item features to the item vectors and biases that a model has, by ridge regression.

    Args:
        model: The model. Its `item_projection` is changed in place, and fits the features of the tokenizer.
        tokenizer: Its tokenizer, with `item_features` and counts. Items without a training event do not count.
        table: The item table.

    Returns:
        penalty; and explained, the share of the variance of the vectors of items left out that the features explain.
    """
    counts = torch.tensor(tokenizer.counts or [1] * tokenizer.num_items)
    trained = counts.nonzero().squeeze(1)
    vectors, biases = (values.float().cpu()[trained] for values in _tables(model))
    rows = tokenizer.feature_rows(table, [tokenizer.items[place] for place in trained.tolist()])
    targets = torch.cat((vectors, biases.unsqueeze(1)), dim=1)
    weight, penalty, explained = fit_projection(rows, targets, counts[trained].float())
    size = tokenizer.item_features.size  # type: ignore[union-attr]
    model.config.num_item_features = size
    # The last numbers are those of no trained item.
    model.item_projection.weight = torch.nn.functional.pad(weight, (0, 0, 0, size - len(weight))).to(model.device)
    return {"penalty": penalty, "explained": explained}


class ItemFeatureTraining(TrainerCallback):
    """Trains item vectors as the sum of a part of the item's own and a projection of its features.

    The vector and the bias of item i are own(i) + features(i) · W, where W is the weight of `model.item_projection`.
    The tables of the model hold this sum at all times, so that the network, its scores and its checkpoints are those of
    a model without features. The gradient of the sum is that of own(i); that of W is features' · gradient. In each
    step, a random share of the items has no own part, so that features alone learn to stand for an item.

    A step draws from a generator of its own, so that a resumed run goes on as if it had never stopped. The trainer's
    optimizer must have W among its parameters, although W is a buffer: no loss reads it.

    Args:
        tokenizer: The model's tokenizer, with `item_features` and counts. An item without a training event trains no W.
        table: The item table.
        share: Share of the items that have no own part in a step.
        seed: Seed of the draws.
    """

    def __init__(
        self, tokenizer: Bert4RecTokenizer, table: Any, *, share: float = SHARE_WITHOUT_OWN_PART, seed: int = 0
    ):
        self.rows = tokenizer.feature_rows(table, tokenizer.items)
        self.is_trained = torch.tensor(tokenizer.counts or [1] * tokenizer.num_items) > 0
        self.share, self.seed = share, seed

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        weight = model.item_projection.weight
        self.transposed = _transposed(self.rows, self.is_trained, len(weight)).to(weight.device)
        self.rows_on_device = _to(self.rows, weight.device)

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Leave out the own parts of some items."""
        weight = model.item_projection.weight
        draws = np.random.default_rng((self.seed, state.global_step)).random(len(self.is_trained))
        # Items are chosen on the CPU, since a device would have to say how many they are.
        is_chosen = torch.from_numpy(draws < self.share) & self.is_trained
        self.chosen, self.before = is_chosen.nonzero().squeeze(1).to(weight.device), weight.clone()
        projected = product(_to(select_rows(self.rows, is_chosen), weight.device), weight)
        self.own = []
        for table, part in zip(_tables(model), (projected[:, :-1], projected[:, -1]), strict=True):
            self.own.append(table[self.chosen] - part)
            table[self.chosen] = part

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Compute the gradient of the projection. Own parts that were left out have none."""
        of_vectors, of_biases = (gradient[FIRST_ITEM_ID:] for gradient in _gradients(model))
        parts = self.transposed @ of_vectors, self.transposed @ of_biases.unsqueeze(1)
        model.item_projection.weight.grad = torch.cat(parts, dim=1)
        of_vectors[self.chosen], of_biases[self.chosen] = 0.0, 0.0

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Add the change of the projection to the tables, and put the own parts back."""
        weight = model.item_projection.weight
        change = product(self.rows_on_device, weight - self.before)
        for table, part, own in zip(_tables(model), (change[:, :-1], change[:, -1]), self.own, strict=True):
            table += part
            table[self.chosen] += own
        weight.grad = None


def _to(rows: SparseRows, device: torch.device) -> SparseRows:
    places, values, starts = rows
    return places.to(device), values.to(device), starts.to(device)


def _transposed(rows: SparseRows, is_wanted: torch.Tensor, num_numbers: int) -> torch.Tensor:
    """The numbers of items as a sparse matrix (numbers, items), without those of the items not wanted."""
    owners = torch.arange(len(is_wanted)).repeat_interleave(rows[2].diff())
    kept = is_wanted[owners]
    indices, size = torch.stack((rows[0][kept], owners[kept])), (num_numbers, len(is_wanted))
    return torch.sparse_coo_tensor(indices, rows[1][kept], size, check_invariants=False).coalesce()


def _parameters(model: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return model.get_input_embeddings().weight, model.item_bias.weight


def _gradients(model: Any) -> tuple[Any, Any]:
    vectors, biases = _parameters(model)
    return vectors.grad, biases.grad


def _tables(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors (items, hidden size) and biases (items,) of a model, as views."""
    vectors, biases = _parameters(model)
    return vectors.detach()[FIRST_ITEM_ID:], biases.detach()[FIRST_ITEM_ID:]
