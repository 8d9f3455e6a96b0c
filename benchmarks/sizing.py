"""Memory of training by catalogue size, hidden size and history length: the table of docs/distributed.md.

    python benchmarks/sizing.py

Counted, not estimated: parameters from the model, activations from the tensors that autograd keeps in a forward pass
on the meta device, which allocates nothing. In fp32, with AdamW and the full softmax, all logits at once.
"""

import math

import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, losses

GIB = 2**30
BATCH, MASK_RATIO = 128, 0.2


def kept_bytes(model: Bert4RecForMaskedItemPrediction, length: int) -> tuple[int, int]:
    """What autograd keeps for the encoder, and for the item table with the softmax."""
    with torch.device("meta"):
        input_ids = torch.ones(BATCH, length, dtype=torch.long)
        positions = torch.zeros(BATCH, int(length * MASK_RATIO), dtype=torch.long)
        labels = torch.full((BATCH, length), 3)
    mask = torch.ones_like(input_ids)
    totals = []
    for forward in (
        lambda: model.model(input_ids, mask, prediction_positions=positions),
        lambda: model(input_ids, mask, labels=labels, label_positions=positions),
    ):
        kept = {}

        def keep(tensor: torch.Tensor, kept: dict = kept) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
        totals.append(sum(storage.nbytes() for storage in kept.values()))
    encoder, everything = totals
    return encoder, everything - encoder


def main() -> None:
    losses.LOGITS_AT_ONCE = math.inf
    print(f"batch {BATCH}, mask ratio {MASK_RATIO}, 2 layers; GiB a device\n")
    print("| items | hidden size | length | weights | with gradients and AdamW | encoder kept | logits at once |")
    print("|---|---|---|---|---|---|---|")
    for items in (3_416, 100_000, 1_000_000):
        for hidden, length in ((64, 50), (64, 200), (256, 200)):
            config = Bert4RecConfig(
                vocab_size=items + 3, hidden_size=hidden, intermediate_size=4 * hidden, max_position_embeddings=length
            )
            with torch.device("meta"):
                model = Bert4RecForMaskedItemPrediction(config).train()
            model.tie_weights()
            weights = sum(parameter.numel() for parameter in model.parameters()) * 4
            encoder, softmax = kept_bytes(model, length)
            sizes = (weights / GIB, 4 * weights / GIB, encoder / GIB, softmax / GIB)
            print(f"| {items:,} | {hidden} | {length} | {' | '.join(f'{size:.2f}' for size in sizes)} |")


if __name__ == "__main__":
    main()
