"""One request, warm: milliseconds until a user's ten items are there, exactly and by an index.

    python benchmarks/serving.py [--model FOLDER] [--items 3416 1000000] [--batches 1 64] [--repeats 200]

From token ids on, seen items filtered, 50 items a history. Without --model the weights are generated, and what item
vectors look like decides how much of the exact answer an index finds: those generated here are clustered, as trained
ones are; recall@10 of a real model is what `--model` gives. Writes benchmarks/serving.md.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from onnx_int8 import exported

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, ItemIndex
from bert4rec_hf.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID
from bert4rec_hf.runs import load_model

TABLE = Path(__file__).parent / "serving.md"
LENGTH, TOP_K, CLUSTERS = 50, 10, 1000
WARM, FEWEST, MOST_SECONDS = 3, 20, 40


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


def measure(
    model: Bert4RecForMaskedItemPrediction, batch: int, repeats: int, index: ItemIndex, others: dict[str, Callable]
) -> dict[str, str]:
    """Milliseconds by way; recall@10 of the index."""
    random = torch.Generator().manual_seed(batch)
    vocabulary = model.config.vocab_size

    def requests() -> Iterator[dict[str, torch.Tensor]]:
        start = time.perf_counter()
        for repeat in range(repeats + WARM):
            if repeat > WARM + FEWEST and time.perf_counter() - start > MOST_SECONDS:
                return
            input_ids = torch.randint(FIRST_ITEM_ID, vocabulary, (batch, LENGTH + 1), generator=random)
            input_ids[:, -1] = MASK_TOKEN_ID
            yield {
                "input_ids": input_ids,
                "attention_mask": torch.ones_like(input_ids),
                "exclude_ids": input_ids[:, :-1].contiguous(),
            }

    def by_index(request: dict[str, torch.Tensor]) -> torch.Tensor:
        scores, item_ids = index.search(model.user_vectors(request["input_ids"]), TOP_K + LENGTH)
        excluded = (item_ids.unsqueeze(2) == request["exclude_ids"].unsqueeze(1)).any(dim=2)
        return item_ids.gather(1, scores.masked_fill(excluded, -torch.inf).topk(TOP_K).indices)

    def exactly(request: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.recommend(**request, top_k=TOP_K)[1]

    ways: dict[str, Callable] = {
        "encoder": lambda request: model.user_vectors(request["input_ids"]),
        "exact": exactly,
        **others,
        "index": by_index,
    }
    cells = {}
    for name, answer in ways.items():
        seconds = []
        for request in requests():
            start = time.perf_counter()
            answer(request)
            seconds.append(time.perf_counter() - start)
        cells[name] = percentiles(seconds[WARM:])
    found = total = 0
    for request in itertools.islice(requests(), FEWEST):
        exact = exactly(request)
        found += int((by_index(request).unsqueeze(2) == exact.unsqueeze(1)).sum())
        total += exact.numel()
    return cells | {"recall": f"{found / total:.4f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--items", type=int, nargs="*", default=[3416, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    models = [load_model(options.model)] if options.model else (generated(number) for number in options.items)
    lines = [
        "| items | batch | encoder | exact | by ONNX | by ONNX, int8 | by an index | its recall@10 | building it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        model.eval()
        start = time.perf_counter()
        index = ItemIndex.build(model)
        building = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            others = {name: answer for name, (answer, _) in exported(model, Path(folder)).items()}
            for batch in options.batches:
                cells = measure(model, batch, options.repeats, index, others)
                lines.append(f"| {len(index):,} | {batch} | {' | '.join(cells.values())} | {building:.0f} s |")
                print(lines[-1], flush=True)
    title = f"the weights of {Path(options.model).name}" if options.model else "generated weights, 64 wide"
    text = (
        "# Serving\n\nWritten by `benchmarks/serving.py`: milliseconds a request, p50 / p99 of "
        f"{options.repeats}, or of as many as {MOST_SECONDS} seconds allow, histories of {LENGTH} items; {title}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads. What int8 costs in quality: "
        "[onnx_int8.md](onnx_int8.md).\n\n" + "\n".join(lines) + "\n"
    )
    TABLE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
