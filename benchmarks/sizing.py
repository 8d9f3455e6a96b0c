"""Computes the memory of training by catalogue size, hidden size and history length.

    python benchmarks/sizing.py

The numbers are counted, not estimated: parameters from the model, and activations from the tensors that autograd keeps
in a forward pass on the meta device, which allocates nothing. They are for fp32 and AdamW. The table is part of
docs/how-to/several-devices.md.
"""

import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID

GIB = 2**30
BATCH, MASK_RATIO = 128, 0.2


def on_meta(num_items: int, hidden_size: int, length: int) -> Bert4RecForMaskedItemPrediction:
    config = Bert4RecConfig(
        vocab_size=num_items + FIRST_ITEM_ID,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=length,
    )
    with torch.device("meta"):
        model = Bert4RecForMaskedItemPrediction(config).train()
    model.tie_weights()
    return model


def kept_bytes(model: Bert4RecForMaskedItemPrediction, length: int) -> int:
    """Bytes of activations that autograd keeps in the encoder for `BATCH` histories."""
    with torch.device("meta"):
        input_ids = torch.ones(BATCH, length, dtype=torch.long)
        positions = torch.zeros(BATCH, int(length * MASK_RATIO), dtype=torch.long)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids, torch.ones_like(input_ids), masked_positions=positions)
    return sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    print(f"batch {BATCH}, mask ratio {MASK_RATIO}, 2 layers; GiB a device\n")
    print("| items | hidden size | length | weights | with gradients and AdamW | encoder kept |")
    print("|---|---|---|---|---|---|")
    for items in (3_416, 100_000, 1_000_000):
        for hidden, length in ((64, 50), (64, 200), (256, 200)):
            model = on_meta(items, hidden, length)
            weights = 4 * model.num_parameters()
            sizes = (weights / GIB, 4 * weights / GIB, kept_bytes(model, length) / GIB)
            print(f"| {items:,} | {hidden} | {length} | {' | '.join(f'{size:.2f}' for size in sizes)} |")


if __name__ == "__main__":
    main()
