"""Long runs: the memory and the file handles of the pipeline, the server and a training run stay flat.

`python tests/faults/soak.py [MINUTES] [REQUESTS_PER_SECOND]` sends random requests with histories, events and rules to
a pipeline and to a server for so many minutes (default 3, at 20 requests a second in all). Both load another model
every 15 seconds. Then a run makes 72 checkpoints and keeps 2; the memory of the first two dozen still grows, for
pictures. It prints the memory (resident set) and the number of open files at the start and the end, with the slope of a
straight line through the second half. It ends with status 1 if one of them grows. `make test-faults` runs it.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import numpy as np
from running_server import serving

SECONDS_PER_MODEL, SECONDS_PER_SAMPLE, NUM_CHECKPOINTS = 15.0, 1.0, 72
# Growth of the straight line through the second half that is still called flat. Allocators keep and return pages.
FLAT_MEGABYTES, FLAT_FILES = 16, 2
NUM_ITEMS, NUM_USERS = 400, 300
RULES = {
    "one": {"where": "category = 'c1' AND price < 50"},
    "mixed": {"max_per": "category:2", "boost": "0.5: on_sale", "diversity": 0.3},
}


class Watch:
    """Samples the memory and the number of open files of a process until it ends or `stop` is called."""

    def __init__(self, process: int):
        self.process, self.samples, self.is_over = process, [], threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def _sample(self) -> None:
        while not self.is_over.wait(SECONDS_PER_SAMPLE):
            try:
                pages = int(Path(f"/proc/{self.process}/statm").read_text().split()[1])
                files = len(os.listdir(f"/proc/{self.process}/fd"))
            except OSError:
                return
            self.samples.append((time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files))

    def stop(self) -> None:
        self.is_over.set()
        self.thread.join()

    def report(self, name: str) -> list[str]:
        """Print the start, the end and the slope. Returns what is not flat."""
        times, memory, files = np.array(self.samples).T
        half = len(times) // 2
        found = []
        for what, unit, values, flat in (
            ("memory", "MB", memory, FLAT_MEGABYTES),
            ("open files", "", files, FLAT_FILES),
        ):
            slope = np.polyfit(times[half:] - times[half], values[half:], 1)[0]
            growth = slope * (times[-1] - times[half])
            tenth = max(1, len(values) // 10)
            early, middle, late = (
                np.median(values[start : start + tenth]) for start in (tenth, half, len(values) - tenth)
            )
            print(
                f"{name:10} {what:10} after a tenth of the time {early:.1f}, in the middle {middle:.1f}, at the end "
                f"{late:.1f} {unit}; second half {60 * slope:+.3f} {unit} a minute, {growth:+.1f} in all", flush=True,
            )  # fmt: skip
            if growth > flat:
                found.append(f"{name}: {what} grows by {growth:.1f} {unit} in {times[-1] - times[half]:.0f} s")
        return found


def write_inputs(folder: Path) -> None:
    """Two model folders with the same catalogue, and an item table."""
    chance = random.Random(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(NUM_USERS):
        item = chance.randrange(NUM_ITEMS)
        for moment in range(20):
            item = (item + 1) % NUM_ITEMS if chance.random() < 0.8 else chance.randrange(NUM_ITEMS)
            lines.append(f"u{user},{item},{moment}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    rows = [f"{item},Title {item},c{item % 5},{item % 90},{item % 3 == 0}" for item in range(NUM_ITEMS)]
    (folder / "items.csv").write_text("\n".join(["item_id,title,category,price,on_sale", *rows]) + "\n")
    (folder / "rules.yaml").write_text(json.dumps(RULES))
    bert4rec("prepare", folder / "log.csv", "--output", folder / "data", "--items", folder / "items.csv")
    for name, seed in (("a", 0), ("b", 1)):
        bert4rec("train", "--data", folder / "data", "--output_dir", folder / name, "--num_train_epochs", 1,
                 "--hidden_size", 32, "--use_cpu", "true", "--disable_tqdm", "true", "--seed", seed)  # fmt: skip


def bert4rec(*words: Any) -> None:
    command = [sys.executable, "-m", "bert4rec_hf", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def a_history(chance: random.Random) -> list[str]:
    length = chance.choice([0, 1, 3, 10, 40, 200])
    return [str(chance.randrange(NUM_ITEMS + 20)) for _ in range(length)]


def use_pipeline(folder: Path, seconds: float, per_second: float) -> None:
    """In a process of its own: requests to a pipeline, which is loaded anew now and then."""
    import torch
    from transformers import pipeline

    from bert4rec_hf.serving.rules import named_rules, read_item_table

    torch.set_num_threads(1)
    chance, numbers, until, loaded = random.Random(1), Counter(), time.monotonic() + seconds, -np.inf
    while time.monotonic() < until:
        if time.monotonic() - loaded > SECONDS_PER_MODEL:
            model = folder / ("b" if numbers["models"] % 2 else "a")
            pipe = pipeline("sequential-recommendation", model=str(model), device="cpu")
            rules = named_rules(read_item_table(model), RULES)
            loaded = time.monotonic()
            numbers["models"] += 1
        options: dict[str, Any] = {"top_k": chance.randint(1, 30)}
        match chance.randrange(4):
            case 0:
                options["rules"] = rules[chance.choice(list(RULES))]
            case 1:
                options["explain"] = True
            case 2:
                options["batch_size"] = 4
        histories = [a_history(chance) for _ in range(chance.choice([1, 1, 1, 8]))]
        pipe(histories, **options)
        numbers["requests"] += 1
        time.sleep(max(0.0, chance.expovariate(per_second)))
    print(f"pipeline: {numbers['requests']:,} calls, {numbers['models']} models", flush=True)


def use_server(running: Any, folder: Path, seconds: float, per_second: float) -> list[str]:
    """Requests to a server, good and bad ones, which loads another model now and then. Returns wrong answers."""
    chance, numbers, problems = random.Random(2), Counter(), []
    until, loaded, begun = time.monotonic() + seconds, time.monotonic(), time.monotonic()
    while time.monotonic() < until:
        if time.monotonic() - loaded > SECONDS_PER_MODEL:
            beside = folder / "next"
            beside.symlink_to(folder / ("a" if numbers["models"] % 2 else "b"))
            beside.rename(folder / "current")
            running.ask("/reload", b"", url=running.admin_url)
            loaded = time.monotonic()
            numbers["models"] += 1
        user = f"u{chance.randrange(NUM_USERS)}"
        path, expected, body = "/recommend", 200, {"history": a_history(chance), "top_k": chance.randint(1, 30)}
        match chance.randrange(8):
            case 0:
                path, expected, body = "/events", 201, {"user_id": user, "item_ids": a_history(chance) or ["0"]}
            case 1:
                body = {"user_id": user}
            case 2:
                body["rules"] = chance.choice(list(RULES))
            case 3:
                body |= {"candidates": ["0", *a_history(chance)], "exclude": ["1"]}  # a known one among them
            case 4:
                expected, body = 422, {"histori": []}
            case 5:
                body["where"] = "price < 20 AND category <> 'c2'"
            case 6:
                body["explain"] = True
        status, answer = running.ask(path, body)
        numbers[status] += 1
        if status != expected and len(problems) < 5:
            problems.append(f"{path} {str(body)[:100]}: status {status}, expected {expected}: {str(answer)[:200]}")
        time.sleep(max(0.0, chance.expovariate(per_second)))
    print(f"server: {dict(numbers)} in {time.monotonic() - begun:.0f} s", flush=True)
    return problems


def main(minutes: float = 3.0, per_second: float = 20.0) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        write_inputs(folder)
        (folder / "current").symlink_to(folder / "a")
        words = [sys.executable, __file__, "--pipeline", str(folder), str(60 * minutes), str(per_second / 2)]
        problems = []
        from chain_runs import free_port

        served = ["--rules", folder / "rules.yaml", "--served_log", folder / "served", "--allow_where", "true"]
        with serving(folder / "current", folder, *served, admin_port=free_port()) as running:
            pipe = subprocess.Popen(words)
            watches = {"pipeline": Watch(pipe.pid), "server": Watch(running.process.pid)}
            problems += use_server(running, folder, 60 * minutes, per_second / 2)
            watches["server"].stop()
            if pipe.wait(timeout=120) != 0:
                problems.append(f"the pipeline ended with {pipe.returncode}")
            watches["pipeline"].stop()
        words = [
            sys.executable, "-m", "bert4rec_hf", "train", "--data", folder / "data", "--output_dir", folder / "run",
            "--num_train_epochs", NUM_CHECKPOINTS, "--eval_strategy", "epoch", "--save_strategy", "epoch",
            "--save_total_limit", 2, "--hidden_size", 128, "--use_cpu", "true",
            "--disable_tqdm", "true", "--early_stopping_patience", NUM_CHECKPOINTS,
        ]  # fmt: skip
        training = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        watches["training"], made = Watch(training.pid), set()
        while training.poll() is None:
            made |= {path.name for path in folder.glob("run/checkpoint-*")}
            time.sleep(0.05)
        watches["training"].stop()
        kept = sorted(path.name for path in folder.glob("run/checkpoint-*"))
        print(f"training: status {training.returncode}, {len(made)} checkpoints made, {len(kept)} kept", flush=True)
        if training.returncode != 0 or len(made) != NUM_CHECKPOINTS or len(kept) > 2:
            problems.append(f"training: status {training.returncode}, made {len(made)}, kept {kept}")
        for name, watch in watches.items():
            problems += watch.report(name)
    print(f"{len(problems)} problems")
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pipeline"]:
        use_pipeline(Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
        sys.exit(0)
    sys.exit(main(*map(float, sys.argv[1:])))
