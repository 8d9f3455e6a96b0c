"""Compares seconds per epoch, memory and ranking time with peers, for the same histories, shape and batch size.

    python benchmarks/speed.py LOG [--hidden_size 64] [--length 200] [--batch 128] [--steps 20] [--repeats 3] …

LOG has the forms that benchmarks/quality.py accepts. The systems run in turns, on a machine that does nothing else.
Each run is a process in the system's own environment, which is created in FOLDER/environments once;
benchmarks/speed_worker.py has the settings. The script rewrites the section of the shape in
benchmarks/results/speed.md after every round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import peers
from quality import HERE, log_name, prepared
from tables import CPU, machine, write_section

from bert4rec_hf.data.histories import read_prepared

TABLE = HERE / "results" / "speed.md"
HEADER = (
    "# Speed\n\n`benchmarks/speed.py` writes the tables of time and memory. `benchmarks/time_to_quality.py` writes the "
    "tables of the time to a peer's best quality.\n"
)
# The ratios are to the first system: bfloat16 if the processor supports it, and each history once per epoch, as in the
# other systems.
OURS = ["ours-bf16-newest", "ours-bf16", "ours-fp32"] if "avx512_bf16" in CPU else ["ours-newest", "ours-fp32"]
SYSTEMS = {
    "ours-bf16-newest": "bert4rec_hf, bf16, `train_windows: newest`",
    "ours-bf16": "bert4rec_hf, bf16",
    "ours-newest": "bert4rec_hf, fp32, `train_windows: newest`",
    "ours-fp32": "bert4rec_hf, fp32",
    "bert": "transformers.BertForMaskedLM by hand, fp32",
    "rectools": "RecTools BERT4Rec, fp32",
    "replay": "RePlay Bert4Rec, fp32",
    "hopwise": "hopwise BERT4Rec, fp32",
}
WARMUP = 3


def run(system: str, data: Path, environments: Path, threads: int, options: dict) -> dict:
    """One run of benchmarks/speed_worker.py."""
    system, *variant = system.split("-")
    # BertForMaskedLM is part of Transformers, which this environment has too.
    is_peer = system not in ("ours", "bert")
    python = peers.return_trip.environment(environments, system) if is_peer else Path(sys.executable)
    command = [python, HERE / "speed_worker.py", system, data.resolve()]
    thread_limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(
            [*command, json.dumps(options | {name: name in variant for name in ("bf16", "newest")})],
            cwd=folder,
            env=os.environ | thread_limits,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if finished.returncode:
            raise RuntimeError(f"{system} failed:\n{finished.stdout[-3000:]}")
        return json.loads((Path(folder) / "speed.json").read_text())


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(rounds: Sequence[dict[str, dict]], num_users: int, batch: int) -> list[str]:
    """One row per system: medians, minima and maxima over the rounds. Ratios are computed within a round."""

    def epoch(run: dict) -> float:
        return run["seconds_a_step"] * -(-run["rows"] // batch)

    def ratio(system: str, of: Callable[[dict], float]) -> str:
        return spread([of(runs[system]) / of(runs[OURS[0]]) for runs in rounds])

    lines = [
        "| system | histories per epoch | seconds per epoch | system / ours | histories per second | ours / system | "
        f"peak GiB | seconds to rank {num_users:,} users | system / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for system in rounds[0]:
        runs = [runs[system] for runs in rounds]
        versions = ", ".join(f"{package} {version}" for package, version in runs[0]["versions"].items())
        cells = [
            f"{SYSTEMS[system]} ({versions})",
            f"{runs[0]['rows']:,}",
            spread([epoch(run) for run in runs]),
            ratio(system, epoch),
            spread([batch / run["seconds_a_step"] for run in runs]),
            ratio(system, lambda run: run["seconds_a_step"]),
            spread([run["peak"] for run in runs]),
            spread([run["seconds_a_user"] * num_users for run in runs]),
            ratio(system, lambda run: run["seconds_a_user"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="timed training steps; for ours, those of an epoch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--users", type=int, help="number of users that are ranked, to estimate the time for all")
    default = [*OURS, "bert", "rectools", "replay", "hopwise"]
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=default)
    parser.add_argument("--output", default="speed")
    options = parser.parse_args()
    name, output = log_name(options.log), Path(options.output)
    data = prepared(options.log, output / name, None)
    num_users = int(np.count_nonzero(read_prepared(data)[0].target_positions["test"] >= 0))
    asked = {name: getattr(options, name) for name in ("hidden_size", "length", "batch", "steps", "users")}
    asked["warmup"] = WARMUP
    systems = dict.fromkeys([OURS[0], *options.systems])  # ratios are relative to the first
    rounds = []
    for number in range(options.repeats):
        rounds.append({})
        for system in systems:
            found = run(system, data, output / "environments", options.threads, asked)
            rounds[-1][system] = found
            print(f"round {number + 1}, {system}: {json.dumps(found)}", flush=True)
        ranked = f"{options.users:,} users, from which the time for all is estimated" if options.users else "all users"
        given = f"--hidden_size {options.hidden_size} --length {options.length} --batch {options.batch}"
        given += f" --steps {options.steps} --repeats {len(rounds)} --threads {options.threads}"
        given += f" --users {options.users}" if options.users else ""
        given += f" --systems {' '.join(options.systems)}" if options.systems != default else ""
        write_section(
            TABLE,
            HEADER,
            f"{name}, length {options.length}, width {options.hidden_size}, batches of {options.batch}",
            [
                f"`benchmarks/speed.py {name} {given}`, {machine(options.threads)}.",
                "",
                f"The models have 2 layers and 2 heads. The systems ran in turns, in {len(rounds)} rounds. A cell has "
                "the median over the rounds, and in brackets the minimum and the maximum. Ratios are to the first row, "
                "within a round. The peak memory is that of training.",
                "",
                f"Training: {options.steps} steps are timed after {WARMUP} warm-up steps, and multiplied by the number "
                "of steps in an epoch. For ours, all steps of an epoch are timed, because its batches differ in "
                "length. With `train_windows: newest`, ours reads the newest window of each history once per epoch. "
                "By default, it reads a long history as often as the history fills the length. hopwise reads every "
                "prefix of a history. The other systems read the newest window.",
                "",
                f"Ranking: the ten best items for {ranked}, in batches of 64, with seen items filtered. The rows with "
                "bf16 also rank in bf16.",
                "",
                *table(rounds, num_users, options.batch),
            ],
        )


if __name__ == "__main__":
    main()
