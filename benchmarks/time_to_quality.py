"""Training seconds to a peer's best validation NDCG@10, of the peer at its defaults and of ours with a recipe.

    python benchmarks/time_to_quality.py ml-100k [--recipe recipes/ml-100k.yaml] [--peer_minutes 60] [--threads 2] …

The peer is hopwise's BERT4Rec; it stops as it does by default, or in the first epoch that ends after so many minutes.
Both are judged alike, as hopwise does it: validation targets, all items ranked, seen items not filtered. Seconds are
those of training alone, without evaluation. Writes a section of benchmarks/speed.md.
"""

import argparse
import json
from pathlib import Path

import yaml
from quality import log_name, prepared
from speed import HEADER, TABLE, machine, run, write_section

METRIC = "NDCG@10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", nargs="?", default="ml-100k")
    parser.add_argument("--recipe", default="recipes/ml-100k.yaml")
    parser.add_argument("--peer_minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="speed")
    options = parser.parse_args()
    recipe = yaml.safe_load(Path(options.recipe).read_text("utf-8"))
    name, output = log_name(options.log), Path(options.output)
    data = prepared(options.log, output / name, recipe.get("max_position_embeddings"))
    asked = {
        "ours-recipe": {"recipe": recipe},
        # More decimals of the metric than four; all else as it comes.
        "hopwise": {"settings": {"metric_decimal_place": 6}, "peer_minutes": options.peer_minutes},
    }
    curves = {}
    for system, given in asked.items():
        found = run(system, data, output / "environments", options.threads, given)
        curves[system] = found["curve"]
        print(json.dumps(found), flush=True)
    ours, peers = curves.values()
    best = max(point[METRIC] for point in peers)  # ours is looked at as often as the recipe evaluates
    lines = [f"| system | epochs run | best validation {METRIC} | epoch of {best:.4f} | seconds to it | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|")
    reached = []
    for title, curve in ((f"bert4rec_hf, `{options.recipe}`", ours), ("hopwise BERT4Rec, its defaults", peers)):
        first = next((point for point in curve if point[METRIC] >= best), None)
        reached.append(first)
        cells = [f"{first['epoch']:.1f}", f"{first['seconds']:.1f}", f"{first['cpu_seconds']:.1f}"] if first else []
        highest = max(point[METRIC] for point in curve)
        cells = [title, f"{curve[-1]['epoch']:.0f}", f"{highest:.4f}", *(cells or ["never", "", ""])]
        lines.append(f"| {' | '.join(cells)} |")
    ratio = "Ours does not reach it."
    if reached[0]:
        times = [reached[1][key] / reached[0][key] for key in ("seconds", "cpu_seconds")]
        ratio = f"hopwise takes {times[0]:.1f} times the seconds, {times[1]:.1f} times the CPU seconds."
    write_section(
        TABLE,
        HEADER,
        f"{name}, time to hopwise's best validation {METRIC}",
        [
            f"{machine(options.threads)}. All items ranked, seen items not filtered; seconds of training; hopwise "
            f"given {options.peer_minutes:g} minutes. `benchmarks/time_to_quality.py {name} --recipe {options.recipe} "
            f"--peer_minutes {options.peer_minutes:g}`",
            "",
            *lines,
            "",
            ratio,
        ],
    )


if __name__ == "__main__":
    main()
