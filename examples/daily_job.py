"""A daily job: updates the model of yesterday with the events of today, and serves it only if it is not worse.

    python examples/daily_job.py events.parquet models 2026-11-30 [--margin 0.01] [--reload http://127.0.0.1:8001]
                                 [--train_options …]

The log has user_id, item_id and timestamp (dates and times, or seconds since 1970), with the events up to the end of
the day. The folder of models then has

    2026-11-30/data        the events up to this day, prepared; the targets are of the two newest days
    2026-11-30/checked     the model that is compared: it has not seen the two newest days
    2026-11-30/comparison  this model and the one of the day before, on the events of the newest day
    2026-11-30/served      the model that serves: updated in the same way, with all events
    current                a link to the folder that serves, for `bert4rec serve models/current`
    anchor                 a link to the checked model of the first day

On the first day, both models are trained. On the others they are updated: catalogue and counted scores, and with
--train_options --num_train_epochs 1 the network too. If the checked model is worse than the one of the day before or
than the anchor, the link stays where it is: this is the way back. A job that was interrupted may be repeated.

With --train_options --report_to mlflow, the Trainer's own callback logs each run to MLflow (MLFLOW_TRACKING_URI).
"""

import argparse
import os
import shutil
import subprocess
import sys
import urllib.request
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa

from bert4rec_hf import read_log


def bert4rec(*words: object) -> int:
    """Run a command of bert4rec. Its exit status is 1 only if a requirement is not met."""
    print("bert4rec", *words, flush=True)
    status = subprocess.run([sys.executable, "-m", "bert4rec_hf", *map(str, words)]).returncode
    if status not in (0, 1):
        raise SystemExit(status)
    return status


def point(link: Path, target: Path) -> None:
    """Let a symbolic link point to a folder beside it, in one step."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, link.parent))
    os.replace(new, link)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("models", type=Path)
    parser.add_argument("day", type=date.fromisoformat)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--reload", help="The administration port of bert4rec serve.")
    parser.add_argument("--train_options", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args(arguments)

    models, today = options.models, options.models / options.day.isoformat()
    midnight = datetime(options.day.year, options.day.month, options.day.day, tzinfo=UTC)
    cuts = {"validation_cut": midnight - timedelta(days=1), "test_cut": midnight}
    is_number = not pa.types.is_timestamp(read_log(options.log).schema().to_pyarrow().field("timestamp").type)
    where = f"timestamp < {int((midnight + timedelta(days=1)).timestamp())}" if is_number else (
        f"timestamp < TIMESTAMP '{(midnight + timedelta(days=1)).replace(tzinfo=None)}'"
    )  # fmt: skip
    if (models / "current").resolve().parent == today.resolve():
        raise SystemExit(f"{today.name} serves already; name a later day")
    # What an interrupted job has left is made again.
    shutil.rmtree(today, ignore_errors=True)
    before = sorted(path.parent for path in models.glob("*/served") if path.parent.name < today.name)
    words = ["--where", where, "--split", "temporal"]
    for name, cut in cuts.items():
        words += [f"--{name}", int(cut.timestamp()) if is_number else cut.replace(tzinfo=None).isoformat()]
    bert4rec("prepare", options.log, "--output", today / "data", *words)
    bert4rec("prepare", options.log, "--output", today / "all", "--where", where, "--split", "none")

    def train(data: Path, output: Path, start: Path | None) -> None:
        update = [] if start is None else ["--model_name_or_path", start]
        bert4rec("train", "--data", data, "--output_dir", output, *update, *options.train_options)

    old = (models / "current").resolve().parent if before else None
    train(today / "data", today / "checked", None if old is None else old / "checked")
    if old is None:
        point(models / "anchor", today / "checked")
    else:
        comparison = ["--margin", options.margin, "--require", "not-worse", "--report", today / "comparison"]
        anchor = ["--anchor", models / "anchor"]
        if bert4rec("compare", old / "checked", today / "checked", "--data", today / "data", *anchor, *comparison):
            print(f"{today.name} is not served: {old.name} stays", flush=True)
            return 1
    train(today / "all", today / "served", None if old is None else old / "served")
    point(models / "current", today / "served")
    if options.reload is not None:
        urllib.request.urlopen(urllib.request.Request(f"{options.reload}/reload", b"")).read()
    print(f"{today.name} is served", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
