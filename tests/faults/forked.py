"""Runs of commands in forked processes, which save the seconds of the imports, and what is known of their output.

A forked process computes on its own copy, so the parent must not compute: it would start threads, which a fork loses.
"""

import codecs
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parent.parent / "helpers"
sys.path.insert(0, str(HELPERS))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Events of Python's audit hooks that change the file system. Those with a path have it first.
WRITING_EVENTS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class Kill:
    """When a command is killed: after some seconds, or at a change of a folder.

    Attributes:
        seconds: Seconds from the start, or from the change.
        change: The number of the change, from 1. None: seconds from the start.
    """

    seconds: float
    change: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (-9: killed), seconds, number of changes in the folder, and its output."""

    status: int
    seconds: float
    num_changes: int
    out: str
    err: str


def import_everything() -> None:
    """Import what the commands import later, so that forked processes need not."""
    import matplotlib.figure  # noqa: F401
    import onnxscript  # noqa: F401
    import torch
    import torch.onnx

    import bert4rec_hf.cli
    import bert4rec_hf.data.preparation
    import bert4rec_hf.runs.calibrate
    import bert4rec_hf.runs.train
    import bert4rec_hf.runs.update_items
    import bert4rec_hf.serving.bulk
    import bert4rec_hf.serving.onnx_export  # noqa: F401

    # Another user may not be able to read the standard library of this one.
    codecs.lookup("utf-8-sig")
    importlib.import_module("importlib.readers")
    torch.set_num_threads(1)


def run(
    words: list[Any],
    scratch: Path,
    *,
    kill: Kill | None = None,
    watched: Path | None = None,
    before: Callable[[], None] | None = None,
    meanwhile: Callable[[int], None] | None = None,
) -> Ended:
    """Run a command in a forked process.

    Args:
        words: The words of the command line after `bert4rec`.
        scratch: A folder for the output of the process.
        kill: When it is killed. None: it is not.
        watched: The folder whose changes are counted. A change is a call that makes, moves or removes something, or
            opens a file to write. Writing by native code in between is not counted.
        before: Called in the new process first, for example to limit its memory.
        meanwhile: Called in this process while the other one runs, with its number.
    """
    paths = {name: scratch / f"{name}.txt" for name in ("out", "err", "changes")}
    for path in paths.values():
        path.unlink(missing_ok=True)
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(paths[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            if watched is not None:
                _count_changes(str(watched), kill, paths["changes"])
            if before is not None:
                before()
            from bert4rec_hf.cli import main

            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if meanwhile is not None:
        meanwhile(child)
    if kill is not None and kill.change is None:
        time.sleep(max(0.0, kill.seconds - (time.monotonic() - begun)))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begun
    texts = {name: path.read_text("utf-8", "replace") if path.exists() else "" for name, path in paths.items()}
    return Ended(status, seconds, len(texts["changes"]), texts["out"], texts["err"])


def has_ended(process: int) -> bool:
    """Whether a process that `run` started has ended."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def has_open(process: int, path: Path) -> bool:
    """Whether a process that `run` started has a file open."""
    try:
        return any(os.readlink(link) == str(path) for link in Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False


def _count_changes(folder: str, kill: Kill | None, path: Path) -> None:
    count = 0
    counter = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            name, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in WRITING_EVENTS:
            name = arguments[0]
        else:
            return
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        if not isinstance(name, (str, os.PathLike)) or not os.path.abspath(name).startswith(folder):
            return
        count += 1
        os.write(counter, b".")
        if kill is not None and kill.change == count:
            me = os.getpid()
            if not kill.seconds:
                os.kill(me, signal.SIGKILL)
            elif os.fork() == 0:
                time.sleep(kill.seconds)
                os.kill(me, signal.SIGKILL)
                os._exit(0)

    sys.addaudithook(note)


def ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a function in a forked process, as JSON. An exception is the text "error: TYPE: MESSAGE"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                answer = question(*arguments)
            except Exception as error:
                if os.environ.get("KEEP"):
                    Path(os.environ["KEEP"], "traceback.txt").write_text(traceback.format_exc())
                answer = f"error: {type(error).__name__}: {' '.join(str(error).split())}"
            with os.fdopen(writer, "w") as file:
                json.dump(answer, file)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else "error: the process died"


def moments(chance: random.Random, number: int, seconds: float, num_changes: int) -> list[Kill]:
    """Moments to kill at: a third at any time of the run, the others at or shortly after a change of the folder."""
    found = []
    for place in range(number):
        if place % 3 == 0:
            found.append(Kill(chance.uniform(0, seconds)))
        else:
            found.append(Kill(chance.choice([0.0, chance.uniform(0, 0.02)]), chance.randint(1, num_changes)))
    return found


def limit(name: int, value: int) -> Callable[[], None]:
    """A function that sets a limit of the process."""
    return lambda: resource.setrlimit(name, (value, value))
