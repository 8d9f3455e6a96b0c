"""Trains with one, two and four processes on CPU cores, DDP and FSDP2, and prints metrics and seconds side by side.

    python benchmarks/processes.py [--users 3200] [--hidden_size 64] [--length 50] [--items 5000] [--epochs 2]

The log is a generated Markov chain. Every item is masked and nothing is dropped, and the rows divide into whole steps
of 32, so that the runs differ by rounding only. Seconds are those of the training steps alone, without the start of the
processes, and without evaluation. With fewer cores than processes, there is no speed-up to see. The script writes
results/processes.md.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from tables import machine, write_section

from bert4rec_hf import prepare

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from chain_runs import write_chain
from process_runs import launch

TABLE = Path(__file__).resolve().parent / "results" / "processes.md"
HEADER = """# Several processes

Written by `benchmarks/processes.py`, which says what is measured. One batch of 32 histories is divided among the
processes, which exchange gradients over gloo. "Weights" is the largest difference from the weights of one process.
"""
RUNS = ((1, False), (2, False), (4, False), (2, True), (4, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("users", 3200), ("hidden_size", 64), ("length", 50), ("items", 5000), ("epochs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.users % 32:
        parser.error(f"--users must be a multiple of 32, so that all steps are whole; got {options.users}")
    rows, first = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, data = folder / "log.csv", folder / "data"
        write_chain(log, options.users, options.items, options.length, follow=0.8)
        prepare(log, data)
        for number, (num_processes, fsdp) in enumerate(RUNS):
            output = folder / str(number)
            given = {
                "data": data, "output_dir": output, "num_train_epochs": options.epochs, "mask_ratio": 1,
                "hidden_size": options.hidden_size, "hidden_dropout_prob": 0, "eval_strategy": "no",
                "save_strategy": "no", "calibrate": "false", "disable_tqdm": "true",
            }  # fmt: skip
            words = ["train", *(word for pair in given.items() for word in (f"--{pair[0]}", pair[1]))]
            done = launch(num_processes, words, folder, fsdp)
            if not (output / "evaluation.json").is_file():
                raise SystemExit(done.stderr[-3000:])
            metrics = json.loads((output / "evaluation.json").read_text())[0]["metrics"]
            seconds = float(re.search(r"'train_runtime': '([\d.]+)'", done.stdout)[1])
            weights = load_file(output / "model.safetensors")
            first = first or {"seconds": seconds, "weights": weights}
            difference = max(float((weights[name] - first["weights"][name]).abs().max()) for name in weights)
            cells = [
                f"{num_processes}",
                "FSDP2" if fsdp else "DDP" if num_processes > 1 else "",
                *(f"{metrics[name]:.6f}" for name in ("loss", "HR@10", "NDCG@10")),
                f"{difference:.1e}",
                f"{seconds:.1f}",
                f"{first['seconds'] / seconds:.2f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    given = " ".join(f"--{name} {value}" for name, value in vars(options).items())
    lines = [
        f"`benchmarks/processes.py {given}`; {os.cpu_count()} cores, {machine(1)} a process.",
        "",
        "| processes | | loss | HR@10 | NDCG@10 | weights | seconds of training | speed-up |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    write_section(TABLE, HEADER, f"{options.users:,} users, {options.items:,} items", lines)


if __name__ == "__main__":
    main()
