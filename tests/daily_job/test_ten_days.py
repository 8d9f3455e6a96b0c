"""examples/daily_job.py over ten generated days, with a server that takes over each day's model.

`make test-daily-job` runs it, since it takes a minute.
"""

import json
import os
import random
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
from chain_runs import free_port
from command_runs import run
from running_server import serving

from bert4rec_hf import Bert4RecForMaskedItemPrediction, Bert4RecTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import daily_job

pytestmark = pytest.mark.skipif(not os.environ.get("TEST_DAILY_JOB"), reason="make test-daily-job runs it")
FIRST, NUM_DAYS, NUM_USERS = date(2026, 3, 1), 10, 150
OPTIONS = ["--train_options", "--hidden_size", "32", "--use_cpu", "true", "--disable_tqdm", "true"]
DAY = 24 * 60 * 60


def write_log(path: Path, num_days: int) -> None:
    """A log in which a user's items follow one another in a circle. Each day brings a new item, which replaces one."""
    chance, rows = random.Random(0), []
    start = (FIRST - date(1970, 1, 1)).days * DAY
    items = [f"old {number}" for number in range(12)]
    at = {user: chance.randrange(12) for user in range(NUM_USERS)}
    for day in range(-20, num_days):
        if day >= 0:
            items[day % 12] = f"new of day {day}"
        for user in range(NUM_USERS):
            for visit in range(chance.randrange(3) if day < num_days - 1 else 2):
                at[user] = (at[user] + 1) % 12 if chance.random() < 0.8 else chance.randrange(12)
                rows.append((f"u{user}", items[at[user]], start + day * DAY + 60 * visit + user % 50))
    text = "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    path.write_text("user_id,item_id,timestamp\n" + text)


def in_this_process(*words):
    """`daily_job.bert4rec` without a new process for each command, which would take most of the time."""
    status, _, errors = run(*words)
    assert status in (0, 1), errors
    return status


def test_ten_days_are_updated_compared_served_and_one_of_them_rolled_back(tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setattr(daily_job, "bert4rec", in_this_process)
    models, log = tmp_path / "models", tmp_path / "log.csv"

    def work(number, *words):
        write_log(log, number + 1)
        day = (FIRST + timedelta(days=number)).isoformat()
        return daily_job.main([str(log), str(models), day, *map(str, words), *OPTIONS])

    assert work(0) == 0
    anchor = (models / "anchor").resolve()
    with serving(models / "current", tmp_path, admin_port=free_port()) as server:
        for number in range(1, NUM_DAYS):
            day = (FIRST + timedelta(days=number)).isoformat()
            if number == 5:  # a model that has forgotten everything is not served
                serves = (models / "current").resolve()
                compare = daily_job.bert4rec

                def spoil(*words, day=day, compare=compare):
                    if words[0] == "compare":
                        checked = models / day / "checked"
                        model = Bert4RecForMaskedItemPrediction.from_pretrained(checked)
                        model.item_bias.weight.data[3:].uniform_(-99, 99)
                        model.config.transition_weight = model.config.next_item_weight = 0.0
                        model.save_pretrained(checked)
                    return compare(*words)

                monkeypatch.setattr(daily_job, "bert4rec", spoil)
                assert work(number, "--reload", server.admin_url) == 1
                assert (models / "current").resolve() == serves
                assert not (models / day / "served").exists()
                verdict = json.loads((models / day / "comparison" / "comparison.json").read_text())
                assert verdict["comparisons"]["old"]["verdict"] == "worse"
                monkeypatch.setattr(daily_job, "bert4rec", in_this_process)
            # The next day, or the same one again, goes on from what serves.
            assert work(number, "--reload", server.admin_url) == 0
            version = server.ask("/recommend", {"history": []})[1]["model_version"]
            assert (models / "current").resolve() == (models / day / "served").resolve()
            assert version.startswith("served-")
            tokenizer = Bert4RecTokenizer.from_pretrained(models / "current")
            assert f"new of day {number}" in tokenizer.items
            # The counts of the day are served: the new item follows the one before it in the circle.
            place = f"new of day {number - 1}"
            answer = server.ask("/recommend", {"history": [place], "filter_seen_items": True})[1]
            assert answer["num_unknown_items"] == 0
    assert work(NUM_DAYS - 1) == 0  # it is served already
    with pytest.raises(SystemExit, match="does not answer"):
        work(NUM_DAYS - 1, "--reload", server.admin_url)  # the server has stopped
    assert (models / day / "served" / "config.json").is_file()
    assert (models / "anchor").resolve() == anchor
    comparison = json.loads((models / day / "comparison" / "comparison.json").read_text())
    assert set(comparison["comparisons"]) == {"old", "anchor"}
    assert comparison["comparisons"]["anchor"]["verdict"] == "better"  # the anchor does not know the new items
