"""A log of what the server has recommended, as Parquet files, for evaluation with clicks."""

import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import file_beside

logger = logging.getLogger(__name__)

SCHEMA = pa.schema([
    ("request_id", pa.string()),
    ("time", pa.timestamp("us", "UTC")),
    ("model_version", pa.string()),
    ("rules", pa.string()),
    ("item_id", pa.string()),
    ("rank", pa.int32()),
    ("score", pa.float32()),
])  # fmt: skip
# A file is written when it has this number of rows, or after this number of seconds.
ROWS_PER_FILE, SECONDS_PER_FILE = 100_000, 60.0


class ServedLog:
    """Writes one row for each recommended item into Parquet files of a folder. No history and no user id is stored.

    A file appears when it is complete. If the process is killed, the rows of the last minute are lost.

    Args:
        folder: The folder, which is made if it is missing. Files that are there stay.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; choose a folder for --served_log")
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.since = time.monotonic()
        self.lock = threading.Lock()

    def add(self, request_id: str, version: str, rules: str | None, answer: Sequence[Mapping[str, Any]]) -> None:
        """Add the answer to a request."""
        head = {"request_id": request_id, "time": time.time_ns() // 1000, "model_version": version, "rules": rules}
        with self.lock:
            self.rows += [
                head | {"item_id": entry["item_id"], "rank": rank, "score": entry["score"]}
                for rank, entry in enumerate(answer, start=1)
            ]

    def write(self, *, is_last: bool = False) -> None:
        """Write a file if enough rows wait, or wait long enough, or the server stops."""
        with self.lock:
            if not self.rows or not (
                is_last or len(self.rows) >= ROWS_PER_FILE or time.monotonic() - self.since >= SECONDS_PER_FILE
            ):
                return
            rows, self.rows, self.since = self.rows, [], time.monotonic()
        name = f"served-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}.parquet"
        try:
            with file_beside(self.folder / name) as beside:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), beside, compression="zstd")
        except OSError as error:
            logger.error("cannot write %s: %s; %d rows are lost", self.folder / name, error, len(rows))
