"""Finds recommendations by a vector database and the successors, and counts how many are the pipeline's.

    pip install chromadb
    python benchmarks/vectors.py MODEL DATA [--users 1000]

The script exports the vectors of a model (`bert4rec export-vectors`), starts a Chroma server, stores the item vectors
there, and asks it for the items with the largest products for each user's vector: approximate search in a graph (HNSW).
It then counts, of the ten items that the pipeline recommends, how many are

- among the ten hits of the database alone,
- among the ten best of the hits, the successors of the eight newest items, and the history, scored by the pipeline.

It writes a section of results/vectors.md. Seen items are filtered as the model folder says; the database is asked for
as many more items as the history has.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import chromadb
import pyarrow.parquet as pq
from quality import log_name
from tables import machine, write_section
from transformers import pipeline

from bert4rec_hf.model.history_scores import NUM_NEWEST_ITEMS
from bert4rec_hf.serving.vectors import export_vectors

TABLE = Path(__file__).parent / "results" / "vectors.md"
HEADER = """# A vector database

Written by `benchmarks/vectors.py`, which says what is counted.
"""
ITEMS_PER_CALL, TOP_K = 1_000, 10


def start(folder: Path) -> tuple[subprocess.Popen, chromadb.api.ClientAPI]:
    """A Chroma server, and a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "chroma"
    words = ["run", "--path", folder / "database", "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            client = chromadb.HttpClient("127.0.0.1", port)
            client.heartbeat()
            return server, client
        except Exception:
            if server.poll() is not None:
                raise SystemExit("the Chroma server has ended") from None
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--users", type=int, default=1000)
    options = parser.parse_args()
    recommend = pipeline("sequential-recommendation", model=options.model)
    keeps_seen = not recommend.model.config.filter_seen_items
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export_vectors(options.model, folder / "vectors", histories=options.data)
        items = pq.read_table(folder / "vectors" / "items.parquet").to_pydict()
        users = pq.read_table(folder / "vectors" / "users.parquet").slice(0, options.users).to_pydict()
        rows = pq.read_table(folder / "vectors" / "successors.parquet").to_pydict()
        successors = dict(zip(rows["item_id"], rows["successors"], strict=True))
        histories = pq.read_table(Path(options.data) / "histories.parquet", columns=["item_id"])
        histories = histories.slice(0, options.users)["item_id"].to_pylist()
        server, client = start(folder)
        try:
            configuration = {"hnsw": {"space": "ip", "ef_construction": 200, "ef_search": 200, "max_neighbors": 32}}
            collection = client.create_collection("items", configuration=configuration)
            for first in range(0, len(items["item_id"]), ITEMS_PER_CALL):
                part = slice(first, first + ITEMS_PER_CALL)
                collection.add(ids=items["item_id"][part], embeddings=items["vector"][part])
            hits = []
            for vector, history in zip(users["vector"], histories, strict=True):
                number = min(TOP_K + (0 if keeps_seen else len(set(history))), len(items["item_id"]))
                hits += collection.query(query_embeddings=[vector], n_results=number)["ids"]
        finally:
            server.terminate()
            server.wait()
    expected = recommend(histories, batch_size=64)
    alone = [
        [item for item in found if keeps_seen or item not in set(history)][:TOP_K]
        for found, history in zip(hits, histories, strict=True)
    ]
    unions = []
    for found, history in zip(hits, histories, strict=True):
        newest = history[-NUM_NEWEST_ITEMS:] or [None]
        union = {*found, *history}.union(*(successors.get(item, []) for item in newest))
        unions.append({"history": history, "candidates": sorted(union)})
    scored = [[entry["item_id"] for entry in answer] for answer in recommend(unions, batch_size=64)]
    best = [{entry["item_id"] for entry in answer} for answer in expected]
    lines = [
        f"`benchmarks/vectors.py MODEL DATA --users {options.users}`, Chroma {chromadb.__version__}, {machine(1)}; "
        f"{len(items['item_id']):,} items, {len(best):,} users",
        "",
        "| found by | of the pipeline's ten |",
        "|---|---|",
    ]
    for name, found in (("the database alone", alone), ("hits, successors and history, scored", scored)):
        shared = sum(len(mine.intersection(answer)) for mine, answer in zip(best, found, strict=True))
        lines.append(f"| {name} | {shared / len(best):.2f} |")
    write_section(TABLE, HEADER, log_name(options.data), lines)


if __name__ == "__main__":
    main()
