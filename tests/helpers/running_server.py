"""A `bert4rec serve` process, and requests to it."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path


class Running:
    """A server process. `ask` returns the status and the JSON of an answer."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path, admin_url: str | None = None):
        self.process, self.url, self.log, self.admin_url = process, url, log, admin_url

    def ask(self, path: str, body=None, *, method: str | None = None, url: str | None = None):
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            (url or self.url) + path, content, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text


@contextmanager
def serving(model, folder: Path, *options, port: int = 0, admin_port: int | None = None):
    """Start `bert4rec serve`, and stop it with SIGTERM at the end if it still runs.

    Args:
        model: The model folder.
        folder: A folder for the database and the output of the process.
        options: Further words of the command line.
        port: The port to listen on.
        admin_port: The port for POST /reload.
    """
    log = folder / f"serve-{time.monotonic_ns()}.log"
    words = ["--store", f"sqlite:///{folder / 'events.db'}", "--port", port, "--device", "cpu", *options]
    words += [] if admin_port is None else ["--admin_port", admin_port]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bert4rec_hf", "serve", str(model), *map(str, words)], stdout=output, stderr=output
        )
    try:
        waited = time.monotonic() + 120
        while " at http" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < waited, log.read_text()
            time.sleep(0.05)
        url = log.read_text().split(" at ")[1].split(";")[0]
        running = Running(process, url, log, None if admin_port is None else f"http://127.0.0.1:{admin_port}")
        waited = time.monotonic() + 60
        while True:
            try:
                assert running.ask("/healthz")[0] == 200
                break
            except urllib.error.URLError:
                assert time.monotonic() < waited, log.read_text()
                time.sleep(0.05)
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=60)
