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
than the anchor, the link stays where it is: this is the way back. A job that was interrupted may be repeated. On a day
without events, nothing changes. The exit status is 1 if the new model is not served.

With --train_options --report_to mlflow, the Trainer's own callback logs each run to MLflow (MLFLOW_TRACKING_URI).
"""

import argparse
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import date, timedelta
from pathlib import Path

from bert4rec_hf import read_log

SECONDS_PER_DAY = 24 * 60 * 60
# The last day that is believed, in days since 1970: it is in the year 2243. Milliseconds would give later days.
LATEST_DAY = 100_000


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


def days_of(log: str) -> tuple[list[date], bool]:
    """The days with events in ascending order, and whether the times are seconds since 1970."""
    times = read_log(log).timestamp
    numbers = times if times.type().is_numeric() else None
    if times.type().is_string():  # CSV
        casted = times.try_cast("float64")
        numbers = casted if casted.notnull().all().to_pyarrow().as_py() else None
    found = times.try_cast("timestamp").date() if numbers is None else (numbers // SECONDS_PER_DAY).cast("int64")
    days = found.name("day").as_table().distinct().to_pyarrow()["day"].to_pylist()
    if None in days:
        raise SystemExit(f"{log}: expected dates and times, or seconds since 1970, in timestamp; some are neither")
    if numbers is None:
        return sorted(days), False
    if max(days) > LATEST_DAY:
        raise SystemExit(f"{log}: expected seconds since 1970 in timestamp; got numbers that look like milliseconds")
    return sorted(date(1970, 1, 1) + timedelta(days=int(day)) for day in days), True


def tell(url: str | None, models: Path, old: Path | None) -> None:
    """Tell the server that there is a new folder. If it refuses the folder, the link points back."""
    if url is None:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/reload", b"")).read()
    except urllib.error.HTTPError as error:
        if old is not None:
            point(models / "current", old / "served")
        raise SystemExit(f"the server refuses the folder, and {old} stays: {error.read().decode()}") from error
    except OSError as error:
        raise SystemExit(f"current points to the new folder, but {url} does not answer: {error}; repeat") from error


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
    days, is_number = days_of(options.log)
    days = [day for day in days if day <= options.day]
    # On the first day there is no link, also if the job of that day was interrupted.
    old = (models / "current").resolve().parent if (models / "current").exists() else None
    if old == today.resolve():
        tell(options.reload, models, None)
        print(f"{today.name} is served already", flush=True)
        return 0
    if options.day not in days or len(days) < 3:
        print(f"no events on {today.name}, or on fewer than two days before: nothing changes", flush=True)
        return 0

    def moment(day: date) -> str:
        return str(int((day - date(1970, 1, 1)).total_seconds())) if is_number else f"{day.isoformat()}T00:00:00"

    # What an interrupted job has left is made again.
    shutil.rmtree(today, ignore_errors=True)
    end = moment(options.day + timedelta(days=1))
    where = f"timestamp < {end}" if is_number else f"CAST(timestamp AS TIMESTAMP) < TIMESTAMP '{end}'"
    cuts = ["--validation_cut", moment(days[-2]), "--test_cut", moment(days[-1])]
    bert4rec("prepare", options.log, "--output", today / "data", "--where", where, "--split", "temporal", *cuts)
    bert4rec("prepare", options.log, "--output", today / "all", "--where", where, "--split", "none")

    def train(data: Path, output: Path, start: Path | None) -> None:
        update = [] if start is None else ["--model_name_or_path", start]
        bert4rec("train", "--data", data, "--output_dir", output, *update, *options.train_options)

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
    tell(options.reload, models, old)
    print(f"{today.name} is served", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
