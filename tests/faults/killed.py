"""Commands that are killed at random moments: what they leave, and whether the next run goes on from it.

`python tests/faults/killed.py [SEED]` kills 60 runs and the server four times, prints a line for each, and ends with
status 1 if one left something that it must not leave. `make test-faults` runs it.

After each kill:

- each file under a final name is whole: it is read in full by the library of its format;
- the output is the old one, the new one, or there is none, and then reading it is an error;
- the same command, run again, ends well, and then the output is the new one;
- what the killed run left unfinished is named on standard error by the next run, or the next run removes it.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import ask, import_everything, moments, run

NUM_SERVER_KILLS = 4
OPTIONS = [
    "--use_cpu", "true", "--hidden_size", "16", "--num_attention_heads", "2", "--disable_tqdm", "true",
    "--report_to", "none", "--save_total_limit", "2",
]  # fmt: skip


def is_unfinished(path: Path) -> bool:
    return any(part.startswith(".") and part.endswith(".new") for part in path.parts)


def unfinished(folder: Path) -> list[Path]:
    """What was left unfinished in a folder: the outermost file or folder of each."""
    return [path for path in folder.rglob(".*.new") if not is_unfinished(path.parent)]


def half_written(folder: Path) -> list[str]:
    """The files under final names that the library of their format cannot read in full."""
    import numpy as np
    import onnx
    import pyarrow.parquet as pq
    import torch
    import yaml
    from matplotlib.image import imread
    from safetensors.numpy import load_file

    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text("utf-8")),
        ".yaml": lambda path: yaml.safe_load(path.read_text("utf-8"))["seed"],
        ".parquet": pq.read_table,
        ".safetensors": load_file,
        ".png": lambda path: np.asarray(imread(path)),
        ".onnx": lambda path: onnx.checker.check_model(onnx.load(path)),
        ".md": lambda path: path.read_text("utf-8").index("bert4rec_hf wrote this card"),
        ".txt": Path.read_text,
    }
    readers |= dict.fromkeys((".pt", ".pth", ".bin"), lambda path: torch.load(path, weights_only=False))
    broken = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not is_unfinished(path):
            try:
                readers[path.suffix](path)
            except Exception as error:
                broken.append(f"{path.relative_to(folder)} ({type(error).__name__}: {error})")
    return broken


# What an output is, as text. It differs between the old output, the new one, and a mixture of both.


def prepared(folder: Path) -> Any:
    from bert4rec_hf.data.histories import read_prepared

    histories, tokenizer, preparation = read_prepared(folder)
    mine = (folder / "mine.txt").read_text() if (folder / "mine.txt").exists() else None
    return [tokenizer.items, tokenizer.counts, preparation["checksum"], len(histories.item_ids), mine]


def model(folder: Path) -> Any:
    import hashlib

    import pyarrow.parquet as pq

    from bert4rec_hf import Bert4RecForMaskedItemPrediction, Bert4RecTokenizer

    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(folder)
    tokenizer = Bert4RecTokenizer.from_pretrained(folder)
    if len(tokenizer) != loaded.config.vocab_size:
        raise ValueError(f"{len(tokenizer)} tokens, {loaded.config.vocab_size} vectors")
    digest = hashlib.sha256()
    for name, values in sorted(loaded.state_dict().items()):
        digest.update(name.encode() + values.numpy().tobytes())
    weights = {name: value for name, value in loaded.config.to_dict().items() if name.endswith("_weight")}
    table = folder / "items.parquet"
    evaluation, calibration = folder / "evaluation.json", folder / "calibration.json"
    return [
        digest.hexdigest(),
        weights,
        tokenizer.items,
        pq.read_table(table).to_pylist() if table.exists() else None,
        json.loads(evaluation.read_text()) if evaluation.exists() else None,
        calibration.exists(),
        sorted(path.name for path in folder.glob("checkpoint-*")) and "has checkpoints",
    ]


def run_folder(folder: Path) -> Any:
    """A training run: its model, and each checkpoint that is there, which must be complete."""
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        model(checkpoint)
        names = {path.name for path in checkpoint.iterdir()}
        missing = {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"} - names
        if missing:
            raise AssertionError(f"{checkpoint.name} lacks {sorted(missing)}")
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        if not Path(state["best_model_checkpoint"]).name.startswith("checkpoint-"):
            raise AssertionError(f"{checkpoint.name}: the best one is {state['best_model_checkpoint']}")
        if ".new" in state["best_model_checkpoint"]:
            raise AssertionError(f"{checkpoint.name}: the best one is {state['best_model_checkpoint']}")
    return model(folder)[:5]


def table(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def onnx_scores(path: Path) -> Any:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    history, nothing = np.array([[3, 4, 5, 1]]), np.zeros((1, 1), np.int64)
    inputs = {
        "input_ids": history, "attention_mask": np.ones_like(history), "history_ids": history[:, :3],
        "exclude_ids": nothing, "candidate_ids": nothing,
    }  # fmt: skip
    scores, items = session.run(None, inputs)
    return [scores.round(4).tolist(), items.tolist()]


@dataclass
class Scenario:
    """A command to kill.

    Attributes:
        name: Its name.
        number: How often it is killed.
        words: The words of the command line.
        output: The file or folder that it writes.
        read: What the output is, see above.
        start: Brings the old state into an empty folder of its own.
        again: The words of the next run, where they are others.
    """

    name: str
    number: int
    words: list[Any]
    output: str
    read: Callable[[Path], Any]
    start: Callable[[Path], None]
    again: Callable[[Path], list[Any]] | None = None


def write_log(path: Path, num_users: int, num_items: int) -> Path:
    chance, lines = random.Random(num_items), ["user_id,item_id,timestamp"]
    for user in range(num_users):
        item = chance.randrange(num_items)
        for moment in range(chance.randint(6, 14)):
            item = (item + 1) % num_items if chance.random() < 0.8 else chance.randrange(num_items)
            lines.append(f"u{user},item {item},{1000 * moment + user}")
    path.write_text("\n".join(lines) + "\n")
    return path


def scenarios(base: Path) -> list[Scenario]:
    """The commands, with all that they read in `base`."""

    def made(*words: Any) -> None:
        ended = run(list(words), base)
        assert ended.status == 0, ended.err

    logs = [write_log(base / f"log-{number}.csv", 120, number) for number in (30, 33)]
    for number, log in enumerate(logs):
        made("prepare", log, "--output", base / f"data-{number}")
    # Weights that are far from good make sure that calibration changes the model.
    made("train", "--data", base / "data-0", "--output_dir", base / "model", "--num_train_epochs", 2, *OPTIONS,
         "--calibrate", "false", "--transition_weight", 0, "--repeat_weight", 5)  # fmt: skip
    items = base / "items.csv"
    items.write_text("item_id,title\n" + "".join(f"new {number},Title {number}\n" for number in range(5)))

    def with_copy(source: str, name: str) -> Callable[[Path], None]:
        return lambda folder: shutil.copytree(base / source, folder / name)  # type: ignore[return-value]

    def with_prepared(folder: Path) -> None:
        shutil.copytree(base / "data-0", folder / "data")
        (folder / "data" / "mine.txt").write_text("a file of the user's own")

    def resumed(words: list[Any]) -> Callable[[Path], list[Any]]:
        def again(folder: Path) -> list[Any]:
            has_checkpoint = any((folder / "run").glob("checkpoint-*"))
            return [*words, *(["--resume_from_checkpoint", "last"] if has_checkpoint else [])]

        return again

    def with_output(name: str, *words: Any) -> Callable[[Path], None]:
        """An earlier output of a command, which is made only once and only if it is asked for."""

        def start(folder: Path) -> None:
            if not (base / name).exists():
                made(*words, "--output", base / name, "--top_k", 3)
            shutil.copy(base / name, folder / name)

        return start

    train = ["train", "--data", base / "data-0", "--output_dir", "{}/run", "--num_train_epochs", 4, *OPTIONS]
    further = ["train", "--data", base / "data-1", "--output_dir", "{}/run", "--num_train_epochs", 3,
               "--model_name_or_path", base / "model", *OPTIONS]  # fmt: skip
    return [
        Scenario("prepare", 6, ["prepare", logs[1], "--output", "{}/data"], "data", prepared, with_prepared),
        Scenario("prepare, empty folder", 4, ["prepare", logs[1], "--output", "{}/data"], "data", prepared,
                 lambda folder: (folder / "data").mkdir()),
        Scenario("train", 12, train, "run", run_folder, lambda folder: None, resumed(train)),
        Scenario("continued training", 8, further, "run", run_folder, lambda folder: None, resumed(further)),
        Scenario("recommend --histories", 8,
                 ["recommend", base / "model", "--histories", base / "data-0", "--output", "{}/out.parquet",
                  "--top_k", 5], "out.parquet", table,
                 with_output("out.parquet", "recommend", base / "model", "--histories", base / "data-1")),
        Scenario("export", 6, ["export", base / "model", "--output", "{}/model.onnx", "--top_k", 5], "model.onnx",
                 onnx_scores, with_output("model.onnx", "export", base / "model")),
        Scenario("calibrate", 8, ["calibrate", "{}/model", "--data", base / "data-0", "--use_cpu", "true"], "model",
                 model, with_copy("model", "model")),
        Scenario("update-items", 8, ["update-items", "{}/model", "--items", items], "model", model,
                 with_copy("model", "model")),
    ]  # fmt: skip


def words_in(folder: Path, words: list[Any]) -> list[Any]:
    return [str(word).format(folder) if str(word).startswith("{}") else word for word in words]


def kill_runs(scenario: Scenario, base: Path, chance: random.Random) -> list[str]:
    """Kill the runs of a scenario. Prints a line for each, and returns the problems."""

    def begin(name: str) -> Path:
        folder = base / name
        folder.mkdir()
        scenario.start(folder)
        return folder

    folder = begin("unbroken")
    old = ask(scenario.read, folder / scenario.output)
    ended = run(words_in(folder, scenario.words), base, watched=folder)
    assert ended.status == 0, ended.err
    new = ask(scenario.read, folder / scenario.output)
    assert new != old, f"{scenario.name} changes nothing"
    assert not isinstance(new, str), new
    assert ask(half_written, folder) == []
    shutil.rmtree(folder)
    print(f"\n{scenario.name}: unbroken {ended.seconds:.1f} s, {ended.num_changes} changes of the folder", flush=True)

    problems, seen = [], Counter()
    waiting = moments(chance, 2 * scenario.number, ended.seconds, ended.num_changes)
    number = 0
    while number < scenario.number:
        kill = waiting.pop(0)
        folder = begin(f"killed-{number}")
        killed = run(words_in(folder, scenario.words), base, kill=kill, watched=folder)
        if killed.status != -signal.SIGKILL:  # it had ended before
            assert killed.status == 0, killed.err
            shutil.rmtree(folder)
            continue
        number += 1
        state, left = ask(scenario.read, folder / scenario.output), unfinished(folder)
        broken = ask(half_written, folder)
        name = "new" if state == new else "old" if state == old else state
        words = scenario.words if scenario.again is None else scenario.again(folder)
        after = run(words_in(folder, words), base, watched=folder)
        final = ask(scenario.read, folder / scenario.output)
        found = []
        if broken:
            found.append(f"half-written: {broken}")
        if not isinstance(name, str):
            found.append(f"loads as something else: {str(name)[:300]}")
        elif name.startswith("error: AssertionError"):
            found.append(name)
        if after.status != 0:
            found.append(f"the next run ends with {after.status}: {after.err.strip().splitlines()[-1:]}")
        elif final != new:
            found.append(f"the next run ends with {str(final)[:300]}")
        found += [f"{path.name} is not named" for path in left if path.exists() and str(path) not in after.err]
        where = (
            f"{kill.seconds:.2f} s" if kill.change is None else f"change {kill.change} + {1000 * kill.seconds:.0f} ms"
        )
        shown = str(name) if isinstance(name, str) else "something else"
        resumed = " (resumed)" if "last" in map(str, words) else ""
        print(f"  {where:22} {shown[:90].replace(str(base), '…'):92} unfinished {len(left)}; next run{resumed}: "
              f"{'new' if final == new else 'other'}; {'; '.join(found) or 'well'}", flush=True)  # fmt: skip
        seen[shown.split(":")[0]] += 1
        problems += [f"{scenario.name}, {where}: {problem}" for problem in found]
        if found and os.environ.get("KEEP"):
            shutil.copytree(folder, Path(os.environ["KEEP"]) / f"{scenario.name}-{number}")
        shutil.rmtree(folder)
    print(f"  after the kill: {dict(seen)}", flush=True)
    return problems


def kill_server(base: Path, chance: random.Random) -> list[str]:
    """Kill the server while four clients send events. Each acknowledged event must be in the store."""
    from running_server import serving

    folder, problems = base / "server", []
    folder.mkdir()
    acknowledged: dict[str, list[str]] = {}

    def send(running: Any, user: str) -> None:
        items = acknowledged.setdefault(user, [])
        while True:
            some = [f"{len(items)}-{place}" for place in range(3)]
            try:
                if running.ask("/events", {"user_id": user, "item_ids": some})[0] != 201:
                    return
            except OSError:
                return
            items += some

    for number in range(NUM_SERVER_KILLS):
        with serving(base / "model", folder) as running:
            threads = [threading.Thread(target=send, args=(running, f"{number}-{user}")) for user in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(chance.uniform(0.2, 2))
            os.kill(running.process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
        lost, partly = 0, 0
        with sqlite3.connect(folder / "events.db") as connection:
            for user, items in acknowledged.items():
                query = "select item_id from bert4rec_events where user_id = ? order by id"
                stored = [item for (item,) in connection.execute(query, (user,))]
                lost += stored[: len(items)] != items
                partly += len(stored) - len(items) not in (0, 3)
        total = sum(map(len, acknowledged.values()))
        print(f"  kill {number + 1}: {total} events acknowledged so far, users with a lost event: {lost}, with a "
              f"request stored in part: {partly}", flush=True)  # fmt: skip
        if lost or partly:
            problems.append(f"the server lost events of {lost} users, stored a part of a request of {partly}")
    return problems


def main(seed: int = 0, only: str = "") -> int:
    chance, problems, begun = random.Random(seed), [], time.monotonic()
    import_everything()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary).resolve()
        for scenario in scenarios(base):
            if scenario.name.startswith(only):
                problems += kill_runs(scenario, base, chance)
        if "server".startswith(only):
            print("\nthe server", flush=True)
            problems += kill_server(base, chance)
    print(f"\n{time.monotonic() - begun:.0f} s; {len(problems)} problems")
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 0, *sys.argv[2:]))
