"""Small models with known weights, and batches for them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bert4rec_hf.model.layers as layers
import bert4rec_hf.model.modeling_bert4rec as modeling
from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction

PAD, MASK, FIRST = 0, 1, 3
NUM_ITEMS = 37
VOCAB = FIRST + NUM_ITEMS
ARCHITECTURES = {
    "rotary-pre": {"position_embedding_type": "rotary", "normalization": "pre", "hidden_act": "gelu"},
    "causal-pre": {"causal_attention": True, "normalization": "pre", "hidden_act": "silu"},
    "filter-post": {"causal_attention": True, "filter_share": 0.4, "normalization": "post"},
    "from_start-post-head": {
        "position_embedding_type": "learned_from_start",
        "normalization": "post",
        "prediction_head": True,
        "hidden_act": "relu",
    },
    "from_end-pre-gated": {
        "position_embedding_type": "learned_from_end",
        "normalization": "pre",
        "hidden_act": "silu",
        "gated_feed_forward": True,
    },
}
HISTORIES = [[5, 9, 17, 30, 4, 22, 8], [11, 3], [39, 38, 37, 39], []]


def make_model(seed: int = 0, **options) -> Bert4RecForMaskedItemPrediction:
    """A model whose weights and biases are so large that scores differ by far more than the tolerances of the tests."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
    }
    plain = {"hidden_dropout_prob": 0.0, "initializer_range": 0.3, "popularity_weight": 1.0}
    config = Bert4RecConfig(**(sizes | plain | options))
    model = Bert4RecForMaskedItemPrediction(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "item_bias.weight")):
            nn.init.normal_(parameter, std=0.3)
    scores = model.history_scores
    if scores.successor_ids is not None:
        # Each item has distinct random successors. Some items have fewer than the maximum, or none.
        _, max_successors = scores.successor_ids.shape
        for item in (PAD, *range(FIRST, config.vocab_size)):
            count = int(torch.randint(max_successors + 1, ()))
            scores.successor_ids[item, :count] = FIRST + torch.randperm(config.vocab_size - FIRST)[:count].int()
            scores.successor_scores[item, :count] = torch.rand(count) * 3
            if item != PAD:
                scores.next_item_scores[item, :count] = torch.rand(count) * 3
    return model.eval()


def make_popularity_model(scores: list[float]) -> Bert4RecForMaskedItemPrediction:
    """A model with known scores: all weights are 0, and `scores` are the biases of the items."""
    model = make_model(vocab_size=FIRST + len(scores))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.item_bias.weight[FIRST:] = torch.tensor(scores)
    return model


WITH_HISTORY = {
    "transitions": {"num_transitions": 5},
    "repeats": {"repeat_weight": 0.8},
    "recency": {"recency_weight": 1.5},
    "all": {"num_transitions": 5, "next_item_weight": 2.0, "repeat_weight": 0.8, "recency_weight": 1.5},
}
# The models of the fixture `model` without history scores.
without_history_scores = pytest.mark.parametrize(
    "model", [*ARCHITECTURES.values()], ids=[*ARCHITECTURES], indirect=True
)


def pad(rows: list[list[int]], side: str = "right", length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded histories, each with a [MASK] at its end, and their attention mask."""
    rows = [[*row, MASK] for row in rows]
    length = length or max(map(len, rows))
    fill = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([p + row if side == "left" else row + p for row, p in zip(rows, fill, strict=True)])
    return ids, (ids != PAD).long()


@torch.no_grad()
def mask_scores(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scores (batch, vocabulary) at the [MASK]s: the logits of `forward` plus the history scores."""
    scores = model(input_ids=input_ids, attention_mask=attention_mask).logits[input_ids == MASK]
    for row, (items, values) in enumerate(zip(*model.history_scores(input_ids, attention_mask), strict=True)):
        scores[row, items] += values
    return scores


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def at_masks(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace labels (batch, length) by labels at `masked_positions`, as the collator makes them."""
    places = [row.nonzero()[:, 0] for row in batch["labels"] != -100]
    positions = nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
    labels = batch["labels"].gather(1, positions.clamp(min=0)).masked_fill(positions < 0, -100)
    return batch | {"labels": labels, "masked_positions": positions}


def training_batch() -> dict[str, torch.Tensor]:
    """Two rows with three labels in total. The second row is padded."""
    return {
        "input_ids": torch.tensor([[9, MASK, MASK, 30], [MASK, 11, PAD, PAD]]),
        "labels": torch.tensor([[-100, 5, 17, -100], [3, -100, -100, -100]]),
    }


class HostWaitsForDeviceError(RuntimeError):
    pass


class NoSynchronization(TorchDispatchMode):
    """Raises if an operation would make Python wait for a GPU."""

    waiting = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for module in (modeling, layers):
            self.patch.setattr(module, "is_eager_on_cpu", lambda states: False)  # as on a device
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.waiting or by_mask:
            raise HostWaitsForDeviceError(str(func))
        return func(*args, **(kwargs or {}))
