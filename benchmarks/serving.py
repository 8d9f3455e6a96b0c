"""One request, warm: milliseconds until a user's ten items are there, exactly and by an index.

    python benchmarks/serving.py [--model FOLDER] [--items 3416 1000000] [--batches 1 64] [--repeats 200]

From token ids on, seen items filtered, 50 items a history. Without --model the weights are generated, and what item
vectors look like decides how much of the exact answer an index finds: those generated here are clustered, as trained
ones are; recall@10 of a real model is what `--model` gives. Writes benchmarks/serving.md.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, ItemIndex
from bert4rec_hf.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID
from bert4rec_hf.trainer import load_model

TABLE = Path(__file__).parent / "serving.md"
LENGTH, TOP_K, CLUSTERS = 50, 10, 1000


def generated(num_items: int, length: int = LENGTH) -> Bert4RecForMaskedItemPrediction:
    torch.manual_seed(0)
    model = Bert4RecForMaskedItemPrediction(
        Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, hidden_size=64, max_position_embeddings=length + 1)
    )
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        centres = torch.randn(CLUSTERS, table.shape[1])
        table.copy_(centres[torch.randint(CLUSTERS, (len(table),))] + 0.5 * torch.randn_like(table))
    return model


def percentiles(seconds: list[float]) -> str:
    p50, p99 = np.percentile(np.array(seconds) * 1000, (50, 99))
    return f"{p50:.1f} / {p99:.1f}"


def measure(model: Bert4RecForMaskedItemPrediction, batch: int, repeats: int, index: ItemIndex) -> dict[str, str]:
    random = torch.Generator().manual_seed(batch)
    times: dict[str, list[float]] = {"encoder": [], "exact": [], "index": []}
    found = total = 0
    for repeat in range(repeats + 3):
        input_ids = torch.randint(FIRST_ITEM_ID, model.config.vocab_size, (batch, LENGTH + 1), generator=random)
        input_ids[:, -1] = MASK_TOKEN_ID
        seen = input_ids[:, :-1]
        start = time.perf_counter()
        vectors = model.user_vectors(input_ids)
        encoded = time.perf_counter()
        scores, item_ids = index.search(vectors, TOP_K + LENGTH)
        excluded = (item_ids.unsqueeze(2) == seen.unsqueeze(1)).any(dim=2)
        near = item_ids.gather(1, scores.masked_fill(excluded, -torch.inf).topk(TOP_K).indices)
        searched = time.perf_counter()
        _, exact = model.recommend(input_ids, top_k=TOP_K, exclude_ids=seen)
        end = time.perf_counter()
        if repeat >= 3:  # warm
            times["encoder"].append(encoded - start)
            times["index"].append(searched - start)
            times["exact"].append(end - searched)
            found += int((near.unsqueeze(2) == exact.unsqueeze(1)).sum())
            total += exact.numel()
    return {name: percentiles(values) for name, values in times.items()} | {"recall": f"{found / total:.4f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--items", type=int, nargs="*", default=[3416, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    models = [load_model(options.model)] if options.model else (generated(number) for number in options.items)
    lines = [
        "| items | batch | encoder | exact | with an index | recall@10 of the index | building it |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        model.eval()
        start = time.perf_counter()
        index = ItemIndex.build(model)
        building = time.perf_counter() - start
        for batch in options.batches:
            cells = measure(model, batch, options.repeats, index)
            shown = [cells[name] for name in ("encoder", "exact", "index", "recall")]
            lines.append(f"| {len(index):,} | {batch} | {' | '.join(shown)} | {building:.0f} s |")
            print(lines[-1], flush=True)
    title = f"the weights of {Path(options.model).name}" if options.model else "generated weights, 64 wide"
    text = (
        "# Serving\n\nWritten by `benchmarks/serving.py`: milliseconds a request, p50 / p99 of "
        f"{options.repeats}, histories of {LENGTH} items; {title}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads. What exported and quantised models take: "
        "[onnx_int8.md](onnx_int8.md).\n\n" + "\n".join(lines) + "\n"
    )
    TABLE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
