"""Measures `bert4rec serve` under load: requests a second, and the time to an answer, by the number of clients.

    apt-get install wrk
    python benchmarks/server.py quickstart/model random:54542 [--seconds 10] [--soak_minutes 10] [--output FOLDER]

Each argument is a model folder, or random:N for a model of N items with random weights, width 256, length 50 and
transitions, which takes as long as a trained one. The client is wrk with one thread, on the same machine. Each client
sends its next request when it has an answer. A request is a history of 5 to 60 random items. The rows "one at a time"
are of a server with --max_batch_size 1. The runs with and without batches alternate.

With --soak_minutes, 16 clients ask for so long, while the folder is loaded again every 10 seconds; the table then has
the errors, the requests without an answer and the memory of the process at the start and at the end.

The script writes a section of results/server.md.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch
from tables import machine, write_section

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer

TABLE = Path(__file__).parent / "results" / "server.md"
HEADER = """# Server under load

`benchmarks/server.py` writes this page and says what is measured. The server, and the client beside it, have two cores.
"""
CLIENTS = (1, 4, 16, 64)
BATCH_SIZES = {"one at a time": 1, "batches": 32}
RELOAD_SECONDS, ADMIN_PORT = 10, 8764
LUA = """
local items = %s
math.randomseed(os.time())
request = function()
  local history = {}
  for place = 1, math.random(5, 60) do history[place] = items[math.random(#items)] end
  local body = '{"history": [' .. table.concat(history, ",") .. ']}'
  return wrk.format("POST", "/recommend", {["content-type"] = "application/json"}, body)
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    "RESULT %%f %%f %%f %%d %%d\\n", summary.requests / summary.duration * 1e6, latency:percentile(50) / 1000,
    latency:percentile(99) / 1000, errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
"""


def random_model(folder: Path, num_items: int) -> Path:
    """A model folder with random weights and random successors."""
    tokenizer = Bert4RecTokenizer.from_items([str(number) for number in range(num_items)])
    config = Bert4RecConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_attention_heads=8, intermediate_size=672, hidden_act="silu",
        gated_feed_forward=True, max_position_embeddings=50, num_transitions=64, causal_attention=True,
    )  # fmt: skip
    model = Bert4RecForMaskedItemPrediction(config)
    scores = model.history_scores
    scores.successor_ids[3:] = torch.stack([torch.randperm(num_items)[:64] + 3 for _ in range(num_items)]).int()
    scores.successor_scores[3:] = torch.rand(num_items, 64)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Served:
    """A server process."""

    def __init__(self, model: Path, folder: Path, batch_size: int):
        self.folder, self.model = folder, model
        words = ["--port", "0", "--admin_port", str(ADMIN_PORT), "--store", f"sqlite:///{folder / 'events.db'}"]
        self.log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bert4rec_hf", "serve", model, *words, "--max_batch_size", str(batch_size)],
            stdout=self.log, stderr=self.log,
        )  # fmt: skip
        while not (found := re.search(r" at (http\S+);", (folder / "server.log").read_text())):
            if self.process.poll() is not None:
                raise SystemExit((folder / "server.log").read_text())
            time.sleep(0.1)
        self.url = found[1]
        items = Bert4RecTokenizer.from_pretrained(model).items
        (folder / "requests.lua").write_text(LUA % ("{" + ",".join(f"'{json.dumps(item)}'" for item in items) + "}"))

    def load(self, clients: int, seconds: float) -> tuple[float, float, float, int, int]:
        """Requests a second, median and 99th percentile in ms, requests without an answer, and with an error."""
        words = ["wrk", "-t", "1", "-c", str(clients), "-d", f"{seconds:.0f}s", "--timeout", "30s", "--latency"]
        output = subprocess.run(
            [*words, "-s", self.folder / "requests.lua", self.url], capture_output=True, text=True, check=True
        ).stdout
        rate, median, slow, lost, refused = re.search(r"RESULT (.*)", output)[1].split()  # type: ignore[index]
        return float(rate), float(median), float(slow), int(lost), int(refused)

    def memory(self) -> float:
        """Resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def reload(self) -> None:
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{ADMIN_PORT}/reload", b"")).read()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak_minutes", type=float, default=0)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as place:
            folder, number = Path(place), name.removeprefix("random:")
            model = random_model(folder / "random", int(number)) if number != name else Path(name)
            lines = [
                f"`benchmarks/server.py {name} --seconds {options.seconds:g} --rounds {options.rounds}"
                f"{f' --soak_minutes {options.soak_minutes:g}' if options.soak_minutes else ''}`, {machine(1)}",
                "",
                *table(model, folder, options.seconds, options.rounds),
            ]
            if options.soak_minutes:
                lines += ["", soak(model, folder, options.soak_minutes)]
            num_items = len(Bert4RecTokenizer.from_pretrained(model).items)
            write_section(TABLE, HEADER, f"{num_items:,} items", lines)


def table(model: Path, folder: Path, seconds: float, rounds: int) -> list[str]:
    found: dict[tuple[int, str], list[tuple[float, float, float, int, int]]] = {}
    for _ in range(rounds):
        for kind, batch_size in BATCH_SIZES.items():
            served = Served(model, folder, batch_size)
            served.load(4, 2)  # the first requests are slower
            for clients in CLIENTS:
                found.setdefault((clients, kind), []).append(served.load(clients, seconds))
            served.close()
    lines = [
        "| clients | | requests a second | of one at a time | median, ms | 99th percentile, ms | without an answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for clients in CLIENTS:
        rates = {kind: [run[0] for run in found[clients, kind]] for kind in BATCH_SIZES}
        for kind in BATCH_SIZES:
            runs = found[clients, kind]
            rate, median, slow = (statistics.median(run[place] for run in runs) for place in range(3))
            ratios = [mine / other for mine, other in zip(rates[kind], rates["one at a time"], strict=True)]
            ratio = f"{statistics.median(ratios):.2f}" if kind != "one at a time" else ""
            lost = sum(run[3] + run[4] for run in runs)
            lines.append(f"| {clients} | {kind} | {rate:,.0f} | {ratio} | {median:.1f} | {slow:.1f} | {lost} |")
    return lines


def soak(model: Path, folder: Path, minutes: float) -> str:
    served = Served(model, folder, BATCH_SIZES["batches"])
    served.load(16, 20)
    before, is_running, reloads = served.memory(), True, 0

    def reload() -> None:
        nonlocal reloads
        while is_running:
            time.sleep(RELOAD_SECONDS)
            served.reload()
            reloads += 1

    thread = threading.Thread(target=reload, daemon=True)
    thread.start()
    rate, median, slow, lost, refused = served.load(16, 60 * minutes)
    is_running = False
    thread.join()
    after = served.memory()
    served.close()
    return (
        f"16 clients for {minutes:g} minutes, the folder loaded again {reloads} times: {60 * minutes * rate:,.0f} "
        f"requests, {rate:,.0f} a second, median {median:.1f} ms, 99th percentile {slow:.1f} ms; {lost} without an "
        f"answer, {refused} with an error; memory {before:,.0f} MiB before and {after:,.0f} MiB after."
    )


if __name__ == "__main__":
    main()
