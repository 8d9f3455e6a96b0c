"""Measures the training seconds that each peer and our recipe need to reach the peer's best validation NDCG@10.

    python benchmarks/time_to_quality.py ml-100k [--recipe recipes/ml-100k.yaml] [--peer_minutes 30] [--threads 2] …

Each peer stops by its default rule, or in the first epoch that ends after --peer_minutes. All systems are evaluated in
the same way, that of hopwise: validation targets, all items ranked, seen items not filtered. The seconds are those of
training, without evaluation. benchmarks/speed_worker.py has the settings. The script writes a section of
benchmarks/results/speed.md.
"""

import argparse
import json
from pathlib import Path

import yaml
from quality import log_name, prepared
from speed import HEADER, TABLE, run
from tables import machine, write_section

METRIC = "NDCG@10"
BERT_EPOCHS = 100
PEERS = {
    "bert": f"`BertForMaskedLM` by hand, 64 wide, {BERT_EPOCHS} epochs",
    "rectools": "RecTools BERT4Rec, its defaults",
    "replay": "RePlay Bert4Rec, its defaults, softmax at masked positions, batches of 32",
    "hopwise": "hopwise BERT4Rec, its defaults",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", nargs="?", default="ml-100k")
    parser.add_argument("--recipe", default="recipes/ml-100k.yaml")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peer_minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="speed")
    options = parser.parse_args()
    recipe = yaml.safe_load(Path(options.recipe).read_text("utf-8"))
    name, output = log_name(options.log), Path(options.output)
    data = prepared(options.log, output / name, recipe.get("max_position_embeddings"))
    given = {
        "peer_minutes": options.peer_minutes,
        "recipe": recipe,
        "length": recipe.get("max_position_embeddings", 200),
        "epochs": BERT_EPOCHS,
        # hopwise would round its metrics to four decimals. Its other settings are its own.
        "settings": {"metric_decimal_place": 6},
    }

    def measured(system: str) -> dict:
        found = run(system, data, output / "environments", options.threads, given)
        print(json.dumps(found), flush=True)
        return found

    def to_best(curve: list[dict]) -> tuple[dict, list[str]]:
        best = max(curve, key=lambda point: point[METRIC])  # the first of equals
        return best, [f"{best[METRIC]:.4f}", f"{best['seconds']:,.1f}", f"{best['cpu_seconds']:,.1f}"]

    ours = measured("ours-recipe")["curve"]
    cells = [f"bert4rec_hf, `{options.recipe}`", f"{ours[-1]['epoch']:.0f}", *to_best(ours)[1], *[""] * 4]
    lines = [
        f"| system | epochs | best validation {METRIC} | seconds to its best | CPU seconds to its best | our epoch "
        "| our seconds | our CPU seconds | ratio of CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {' | '.join(cells)} |",
    ]
    for system in options.peers:
        found = measured(system)
        best, to_its_best = to_best(found["curve"])
        epochs = f"{found['curve'][-1]['epoch']:.0f}" + (", stopped" if found["stopped"] else "")
        cells = [PEERS[system], epochs, *to_its_best]
        # The recipe decides how often ours is evaluated.
        reached = next((point for point in ours if point[METRIC] >= best[METRIC]), None)
        if reached:
            cells += [f"{reached['epoch']:.1f}", f"{reached['seconds']:.1f}", f"{reached['cpu_seconds']:.1f}"]
            cells += [f"{best['cpu_seconds'] / reached['cpu_seconds']:.1f}"]
        else:
            cells += ["never", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    command = f"benchmarks/time_to_quality.py {name} --recipe {options.recipe}"
    command += f" --peers {' '.join(options.peers)}" if options.peers != list(PEERS) else ""
    command += f" --peer_minutes {options.peer_minutes:g} --threads {options.threads}"
    write_section(
        TABLE,
        HEADER,
        f"{name}, time to a peer's best validation {METRIC}",
        [
            f"`{command}`, {machine(options.threads)}.",
            "",
            "All items are ranked and seen items are not filtered. Seconds are those of training, without evaluation. "
            "Our epoch and our seconds are those at which our recipe first has the peer's best value. A peer with "
            f'"stopped" was stopped after {options.peer_minutes:g} minutes: its best is the best within these minutes.',
            "",
            *lines,
        ],
    )


if __name__ == "__main__":
    main()
