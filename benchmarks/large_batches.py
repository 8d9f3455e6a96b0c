"""Looks for a recipe with batches of 1,024 that is as good as the default batches at equal epochs.

    python benchmarks/large_batches.py LOG [--seeds 42] [--ways NAME …] [--epochs 10] [--output FOLDER]

LOG has the forms that benchmarks/quality.py accepts. `WAYS` lists what is tried, and `OPTIMIZERS` the optimizers that
are no `--optim` of Transformers: Muon from PyTorch, LAMB and Lion from the package pytorch-optimizer. Validation
chooses among them. The test targets are ranked only with --test, for the ways that were chosen.

The script writes a section of results/large_batches.md with one line per way. Finished runs stay in FOLDER.
"""

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import checksum, log_file, log_name, named_seeds, prepared, spread
from tables import machine, write_section

from bert4rec_hf import (
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    evaluate_prepared,
    train_prepared,
)
from bert4rec_hf.runs import train as training_run

TABLE = Path(__file__).resolve().parent / "results" / "large_batches.md"
HEADER = """# Large batches

Each row is a way to train with batches of 1,024 histories, beside the default batches of 32 at equal epochs.
`benchmarks/large_batches.py` says what a way is. All train in bfloat16; everything else is the default. NDCG@10 counts
the best of ten evaluations, with the weights of the counted scores calibrated on the same validation targets. ± is the
standard deviation over seeds. Minutes are CPU time.
"""
# A step of 1,024 histories, in parts of similar length: one padded batch takes four times as long on a CPU.
LARGE = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 32, "bf16": True}


class Together(torch.optim.Optimizer):
    """Several optimizers in one. The learning rate of each follows the schedule."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.optimizers = optimizers
        for optimizer in optimizers:  # the schedule changes the groups of this optimizer
            optimizer.param_groups = [
                group
                for group in self.param_groups
                if any(group["params"][0] is own["params"][0] for own in optimizer.param_groups)
            ]

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def muon(model: torch.nn.Module, learning_rate: float, rate: float = 0.02) -> torch.optim.Optimizer:
    """Muon for the matrices of the layers, with a learning rate of its own, and AdamW for everything else."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    own = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in own]
    return Together(
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    )


def lamb(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lamb

    return Lamb(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))


def lion(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion

    return Lion(model.parameters(), lr=learning_rate)


def layer_wise(model: torch.nn.Module, learning_rate: float, layers: float = 4.0) -> torch.optim.Optimizer:
    """AdamW with the learning rate for item vectors and biases, and a multiple of it for the layers."""
    of_layers = list(model.model.layers.parameters())
    own = {id(weight) for weight in of_layers}
    others = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in own]
    groups = [{"params": of_layers, "lr": layers * learning_rate}, {"params": others, "lr": learning_rate}]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "muon": muon,
    "lamb": lamb,
    "lion": lion,
    "layer-wise": layer_wise,
}
SMALL = "batches of 32"
# For each way, changes of the defaults. "optimizer" is one of `OPTIMIZERS`.
WAYS: dict[str, dict[str, Any]] = {
    SMALL: {"gradient_accumulation_steps": 1},
    "AdamW .005": {"learning_rate": 0.005, "warmup_steps": 0.1},
    "AdamW .0113, the square root": {"learning_rate": 0.0113, "warmup_steps": 0.1},
    "AdamW .0113, longer warm-up": {"learning_rate": 0.0113, "warmup_steps": 0.3, "adam_beta2": 0.95},
    "AdamW .005, layers .02": {"optimizer": "layer-wise", "learning_rate": 0.005, "warmup_steps": 0.1},
    "Muon .02, AdamW .005": {"optimizer": "muon", "learning_rate": 0.005, "warmup_steps": 0.1},
    "LAMB .01": {"optimizer": "lamb", "learning_rate": 0.01, "warmup_steps": 0.1},
    "Lion .001": {"optimizer": "lion", "learning_rate": 0.001, "warmup_steps": 0.1},
}


def trainer_with(optimizer: str | None) -> type[Bert4RecTrainer]:
    """A Trainer with another optimizer."""

    class ThisTrainer(Bert4RecTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            if optimizer is None:
                return super().create_optimizer(*args, **kwargs)
            if self.optimizer is None:
                self.optimizer = OPTIMIZERS[optimizer](self.model, self.args.learning_rate)
            return self.optimizer

    return ThisTrainer


def measure(data: Path, folder: Path, way: str, epochs: float, seed: int, test: bool) -> dict[str, Any]:
    """Train once, or read an earlier result."""
    given = {"log": checksum(data), "way": WAYS[way], "epochs": epochs, "seed": seed}
    output = folder / f"{re.sub(r'[^a-z0-9]+', '-', way.lower())}-{epochs:g}-{seed}"
    done = output / "large_batches.json"
    record = json.loads(done.read_text()) if done.is_file() else None
    if record is None or record["given"] != given:
        shutil.rmtree(output, ignore_errors=True)
        options = LARGE | WAYS[way]
        optimizer = options.pop("optimizer", None)
        arguments = Bert4RecTrainingArguments(
            str(output), seed=seed, num_train_epochs=epochs, save_only_model=True, disable_tqdm=True, **options
        )
        start = time.process_time()
        before = training_run.Bert4RecTrainer
        training_run.Bert4RecTrainer = trainer_with(optimizer)
        try:
            trainer = train_prepared(data, arguments, with_baselines=False)
        finally:
            training_run.Bert4RecTrainer = before
        record = {
            "given": given,
            "validation": trainer.evaluation["metrics"],
            "protocol": trainer.evaluation["protocol"],
            "steps": trainer.state.global_step,
            "best step": trainer.state.best_global_step,
            "uncalibrated": trainer.state.best_metric,
            "cpu_minutes": (time.process_time() - start) / 60,
        }
    if test and "test" not in record:
        record["test"] = evaluate_prepared(output, data, with_baselines=False)["metrics"]
    done.write_text(json.dumps(record, indent=2))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--seeds", type=int, nargs="*", default=[42])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="NAME")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--test", action="store_true", help="rank the test targets too")
    parser.add_argument("--output", default="large_batches")
    options = parser.parse_args()
    name = log_name(options.log)
    folder = Path(options.output) / name
    data = prepared(options.log, folder, None)
    rows: list[str] = []
    base: dict[int, float] = {}
    for way in options.ways:
        runs = {seed: measure(data, folder, way, options.epochs, seed, options.test) for seed in options.seeds}
        values = {seed: run["validation"]["NDCG@10"] for seed, run in runs.items()}
        base = values if way == SMALL else base
        cells = [
            way,
            ", ".join(f"{name} {value}" for name, value in WAYS[way].items()),
            str(runs[options.seeds[0]]["steps"]),
            spread(list(values.values())),
            f"{statistics.mean(values.values()) / statistics.mean(base.values()) - 1:+.1%}" if base else "",
            spread([run["test"]["NDCG@10"] for run in runs.values()]) if options.test else "",
            f"{statistics.mean(run['cpu_minutes'] for run in runs.values()):.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    given = f"{log_file(options.log)} --seeds {' '.join(map(str, options.seeds))} --epochs {options.epochs:g}"
    lines = [
        f"{named_seeds(options.seeds)}, {options.epochs:g} epochs; {machine(torch.get_num_threads())}; "
        f"`benchmarks/large_batches.py {given}{' --test' if options.test else ''}`",
        "",
        "| way | changes of the defaults | steps | validation NDCG@10 | beside 32 | test NDCG@10 | minutes |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    write_section(TABLE, HEADER, f"{name}, {named_seeds(options.seeds)}", lines)


if __name__ == "__main__":
    main()
