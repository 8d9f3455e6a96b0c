"""Compares the quickstart's model in PyTorch, in onnxruntime, and in onnxruntime with int8 weights: NDCG@10 and speed.

    python benchmarks/onnx_int8.py quickstart/model quickstart/data

Each runs on one thread, in turns, with batches of 64. The script writes benchmarks/results/onnx_int8.md.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from bert4rec_hf import (
    Bert4RecForMaskedItemPrediction,
    DataCollatorForMaskedItemPrediction,
    ranking_metrics,
    ranking_rows,
    read_prepared,
)
from bert4rec_hf.evaluation.protocol import Protocol
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.serving.onnx_export import export_onnx

ROUNDS, BATCH = 5, 64


def exported(model: Bert4RecForMaskedItemPrediction, folder: Path) -> dict[str, tuple[Callable, int]]:
    """For each graph: a function that recommends for a batch with onnxruntime on one thread, and its size in bytes."""
    path, small = folder / "model.onnx", folder / "int8.onnx"
    export_onnx(model, path, top_k=10)
    quantize_dynamic(path, small, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found: dict[str, tuple[Callable, int]] = {}
    for name, file in (("onnxruntime", path), ("onnxruntime, int8", small)):
        session = onnxruntime.InferenceSession(file, options)
        size = sum(part.stat().st_size for part in folder.glob(f"{file.name}*"))

        def answer(batch: dict, session: onnxruntime.InferenceSession = session) -> np.ndarray:
            inputs = {key: value.numpy() for key, value in batch.items()}
            inputs.setdefault("history_ids", inputs["input_ids"])
            inputs["candidate_ids"] = np.zeros((len(batch["input_ids"]), 1), np.int64)
            return session.run(["item_ids"], inputs)[0]

        found[name] = answer, size
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder, data = sys.argv[1:3]
    model = load_model(folder).eval()
    histories, tokenizer, preparation = read_prepared(data)
    policy, length = model.config.filter_seen_items, model.config.max_position_embeddings
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=policy, max_length=length)
    protocol = Protocol.of(histories, preparation, "test", tokenizer.num_items, policy)
    collator = DataCollatorForMaskedItemPrediction(tokenizer, max_length=length)
    batches = [
        collator([rows[index] for index in range(start, min(start + BATCH, len(rows)))])
        for start in range(0, len(rows), BATCH)
    ]

    with tempfile.TemporaryDirectory() as temporary:
        answers: dict[str, Callable] = {"PyTorch": lambda batch: model.recommend(**batch, top_k=10)[1].numpy()}
        sizes = {"PyTorch": (Path(folder) / "model.safetensors").stat().st_size}
        for name, (answer, size) in exported(model, Path(temporary)).items():
            answers[name], sizes[name] = answer, size

        ranks: dict[str, list[int]] = {name: [] for name in answers}
        seconds: dict[str, list[float]] = {name: [] for name in answers}
        for number in range(ROUNDS + 1):
            for name, answer in answers.items():
                start = time.perf_counter()
                found = [
                    answer({key: batch[key] for key in ("input_ids", "attention_mask", "history_ids", "exclude_ids")})
                    for batch in batches
                ]
                seconds[name].append(time.perf_counter() - start)
                if number == 0:
                    for batch, item_ids in zip(batches, found, strict=True):
                        hit = item_ids == batch["labels"].amax(dim=1, keepdim=True).numpy()
                        ranks[name] += np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0).tolist()
    lines = [
        "| | test NDCG@10 | test HR@10 | histories a second | times PyTorch's | file |",
        "|---|---|---|---|---|---|",
    ]
    base = statistics.median(seconds["PyTorch"][1:])
    for name in answers:
        metrics, time_taken = ranking_metrics(np.array(ranks[name])), statistics.median(seconds[name][1:])
        lines.append(
            f"| {name} | {metrics['NDCG@10']:.4f} | {metrics['HR@10']:.4f} | {len(rows) / time_taken:,.0f} | "
            f"{base / time_taken:.2f} | {sizes[name] / 2**20:.2f} MiB |"
        )
    text = (
        "# ONNX and int8\n\n"
        f"Written by `benchmarks/onnx_int8.py` on the quickstart's model; torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}, one thread, batches of {BATCH}, medians of {ROUNDS} rounds in turns. "
        f"{protocol}.\n\n" + "\n".join(lines) + "\n"
    )
    (Path(__file__).resolve().parent / "results" / "onnx_int8.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
