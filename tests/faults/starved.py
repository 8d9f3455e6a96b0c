"""Commands without disk space, permission or memory, and with files that vanish or change while they run.

`python tests/faults/starved.py [FAULT [COMMAND]]` prints a line for each run and ends with status 1 if one had no clear
error or lost what was there before. `make test-faults` runs it, as root, since it mounts small file systems in memory.

A clear error is exit status 2, with one line of standard error that begins with "bert4rec COMMAND: " and comes last,
and no traceback. Warnings may come before.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from forked import Ended, ask, has_ended, has_open, import_everything, limit, run
from killed import OPTIONS, Scenario, half_written, scenarios, unfinished, words_in, write_log

SHARES_OF_SPACE = (0.0, 0.3, 0.6, 0.9)  # of what an unbroken run needs
# Megabytes of address space: from what the imports nearly need to what a command on a small log needs.
MEMORY_LIMITS = (1_300, 1_450, 1_600, 1_750, 1_900, 2_200)
NOBODY = 65534


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """A file system in memory of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def space_used(folder: Path) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def judged(command: str, ended: Ended, *, may_end_well: bool = False) -> tuple[str, list[str]]:
    """The last line of standard error, and what is wrong with how a command ended."""
    lines = [line for line in ended.err.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    problems = []
    if "Traceback" in ended.err:
        problems.append("a traceback")
    if ended.status == 0 and may_end_well:
        return "(ended well)", problems
    if ended.status != 2:
        problems.append(f"exit status {ended.status}")
    if not last.startswith(f"bert4rec {command}: "):
        problems.append("no clear error")
    return last, problems


def after(seconds: float, change: Callable[[], Any], opened: Path | None = None) -> Callable[[int], None]:
    """Change something after some seconds, counted from the start or from the moment when a file is opened."""

    def wait_and_change(process: int) -> None:
        while opened is not None and not has_open(process, opened) and not has_ended(process):
            pass
        time.sleep(seconds)
        change()

    return wait_and_change


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Report:
    """Prints a line for each run and collects the problems."""

    def __init__(self, base: Path):
        self.base, self.problems, self.number = base, [], 0

    def add(self, fault: str, command: str, line: str, problems: list[str]) -> None:
        self.number += 1
        line = re.sub(r"/\S*/", "…/", line.replace(str(self.base), "…"))
        print(f"{fault:34} {command:24} {line[:260]}", flush=True)
        for problem in problems:
            print(f"{'':34} PROBLEM: {problem}", flush=True)
            self.problems.append(f"{fault}, {command}: {problem}")

    def check(
        self,
        fault: str,
        scenario: Scenario,
        folder: Path,
        ended: Ended,
        before: dict[str, bytes],
        *,
        may_end_well: bool = False,
        may_crash: bool = False,
    ) -> None:
        command = str(scenario.words[0])
        line, problems = judged(command, ended, may_end_well=may_end_well)
        if may_crash and (ended.status not in (0, 1, 2) or line.startswith("OpenBLAS error")):
            line, problems = f"(crashed, status {ended.status}) {line}", []
        if ended.status != 0:
            after = folder_contents(folder)
            # Training may have made complete checkpoints before it failed.
            lost = sorted(name for name in before if after.get(name) != before[name])
            more = sorted(
                name for name in after
                if name not in before and "/checkpoint-" not in f"/{name}" and not (may_crash and ".new" in name)
            )  # fmt: skip
            if lost:
                problems.append(f"lost or changed: {', '.join(lost[:3])}")
            if more:
                problems.append(f"left: {', '.join(more[:3])}")
            broken = ask(half_written, folder)
            if broken:
                problems.append(f"half-written: {broken}")
        if problems:
            print(ended.err[-1500:])
        self.add(fault, scenario.name, line, problems)


def disk_full(base: Path, report: Report, commands: list[Scenario]) -> None:
    for scenario in commands:
        with mounted(base / "disk", 2**28) as disk:
            scenario.start(disk)
            at_start = space_used(disk)
            highest = at_start

            def watch(process: int) -> None:
                nonlocal highest
                while not has_ended(process):
                    highest = max(highest, space_used(disk))
                    time.sleep(0.005)

            assert run(words_in(disk, scenario.words), base, meanwhile=watch).status == 0
            needed = max(highest, space_used(disk)) - at_start
        for share in SHARES_OF_SPACE:
            with mounted(base / "disk", 2**28) as disk:
                scenario.start(disk)
                before = folder_contents(disk)
                free = int(share * needed)
                size = -(-(space_used(disk) + free) // 4096) * 4096 or 4096
                subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
                ended = run(words_in(disk, scenario.words), base)
                subprocess.run(["mount", "-o", f"remount,size={2**28}", disk], check=True)
                report.check(f"disk full, {free:,} bytes free", scenario, disk, ended, before, may_end_well=share > 0.5)


def read_only(base: Path, report: Report, commands: list[Scenario]) -> None:
    for scenario in commands:
        with mounted(base / "disk", 2**28) as disk:
            scenario.start(disk)
            before = folder_contents(disk)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            ended = run(words_in(disk, scenario.words), base)
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            report.check("read-only", scenario, disk, ended, before)


def become_nobody() -> None:
    os.environ["HOME"] = "/nonexistent"
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def no_permission(base: Path, report: Report, commands: list[Scenario]) -> None:
    for path in (base, *base.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for scenario in commands:
        folder = base / "of root"
        folder.mkdir()
        scenario.start(folder)
        before = folder_contents(folder)
        ended = run(words_in(folder, scenario.words), base, before=become_nobody)
        report.check("permission denied", scenario, folder, ended, before)
        shutil.rmtree(folder)


def vanishing(base: Path, report: Report, commands: list[Scenario], large: Path) -> None:
    """The folder with the output, or the input, is removed as soon as the run has begun to write, or has read some."""

    def when_begun(folder: Path, removed: Path) -> Callable[[int], None]:
        def remove(process: int) -> None:
            while not has_ended(process) and not unfinished(folder) and not list(folder.rglob("checkpoint-*")):
                time.sleep(0.001)
            while removed.exists():
                shutil.rmtree(removed, ignore_errors=True)

        return remove

    for scenario in commands:
        folder = base / "vanishing"
        folder.mkdir()
        scenario.start(folder)
        ended = run(words_in(folder, scenario.words), base, meanwhile=when_begun(folder, folder))
        line, problems = judged(str(scenario.words[0]), ended, may_end_well=True)
        if problems:
            print(ended.err[-1500:])
        left = unfinished(folder) if folder.exists() else []
        problems += [f"left {path.name}" for path in left]
        report.add("output vanishes", scenario.name, line, problems)
        shutil.rmtree(folder, ignore_errors=True)

    data, model = base / "data-0", base / "model"
    for seconds in (0.05, 0.3, 1.0):
        inputs = [
            ("log", ["prepare", "{}/log.csv", "--output", base / "out"],
             lambda folder: shutil.copy(large, folder / "log.csv")),
            ("data", ["train", "--data", "{}/data", "--output_dir", base / "out", "--num_train_epochs", 2, *OPTIONS],
             lambda folder: shutil.copytree(data, folder / "data")),
            ("model", ["recommend", "{}/model", "--histories", data, "--output", base / "out"],
             lambda folder: shutil.copytree(model, folder / "model")),
            ("histories", ["recommend", model, "--histories", "{}/data", "--output", base / "out"],
             lambda folder: shutil.copytree(data, folder / "data")),
        ]  # fmt: skip
        for name, words, start in inputs:
            folder = base / "vanishing"
            folder.mkdir()
            start(folder)
            ended = run(words_in(folder, words), base, meanwhile=after(seconds, partial(shutil.rmtree, folder)))
            line, problems = judged(words[0], ended, may_end_well=True)
            problems += [f"left {path.name}" for path in unfinished(base)]
            if problems:
                print(ended.err[-1500:])
            report.add(f"{name} vanishes after {seconds:g} s", words[0], line, problems)
            shutil.rmtree(base / "out", ignore_errors=True)


def kinds_of_items(folder: Path) -> list[str]:
    """The first words of the item ids of a prepared folder."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    items = pc.unique(pc.list_flatten(pq.read_table(folder / "histories.parquet")["item_id"]))
    return sorted({item.split()[0] for item in items.to_pylist()})


def changing(base: Path, report: Report, large: Path) -> None:
    """A log grows, shrinks or is replaced while it is prepared: the folder is of a log that was there, or an error."""
    folder = base / "changing"
    folder.mkdir()
    log = folder / "log.csv"
    lines = large.read_text().splitlines(keepends=True)
    text = "".join(lines)
    half = "".join(lines[: len(lines) // 2])
    whole = {len(lines) - 1, half.count("\n") - 1, len(lines) - 1 + half.count("\n") - 1}
    changes: dict[str, Callable[[], Any]] = {
        "grows": lambda: log.open("a").write(half.partition("\n")[2]),
        "is cut": lambda: os.truncate(log, len(half)),
        "is cut in a row": lambda: os.truncate(log, len(half) - 7),
        "is rewritten in place": lambda: log.write_text(text.replace(",item ", ",thing ")),
        "is replaced": lambda: (
            (folder / "other").write_text(text.replace(",item ", ",thing ")),
            os.replace(folder / "other", log),
        ),
    }
    for name, change in changes.items():
        for seconds in (0.0, 0.02, 0.2):
            log.write_text(text)

            ended = run(["prepare", log, "--output", folder / "data"], base, meanwhile=after(seconds, change, log))
            line, problems = judged("prepare", ended, may_end_well=True)
            if ended.status == 0:
                record = json.loads((folder / "data" / "preparation.json").read_text("utf-8"))
                num_events = record["statistics"]["num_source_events"]
                line = f"prepared {num_events:,} of {len(lines) - 1:,} events"
                if len(ask(kinds_of_items, folder / "data")) > 1:
                    problems.append("items of the former and of the later log")
                if num_events not in whole:
                    problems.append("neither the former log nor the later one")
            problems += [f"left {path.name}" for path in unfinished(folder)]
            if problems:
                print(ended.err[-1500:])
            report.add(f"log {name} after {seconds:g} s", "prepare", line, problems)
            shutil.rmtree(folder / "data", ignore_errors=True)


def run_with_little_memory(words: list[Any], megabytes: int) -> Ended:
    """A command in a process of its own whose address space is limited. -9: it did not end within a minute."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "bert4rec_hf", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=limit(resource.RLIMIT_AS, megabytes * 2**20),
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return Ended(process.returncode, time.monotonic() - begun, 0, out, err)


def little_memory(base: Path, report: Report, commands: list[Scenario]) -> None:
    """A limit of the address space. The C library and native libraries may end the process; nothing may be lost."""
    for scenario in commands:
        for megabytes in MEMORY_LIMITS:
            folder = base / "little memory"
            folder.mkdir()
            scenario.start(folder)
            before = folder_contents(folder)
            ended = run_with_little_memory(words_in(folder, scenario.words), megabytes)
            report.check(f"memory limit {megabytes:,} MB", scenario, folder, ended, before, may_end_well=True,
                         may_crash=True)  # fmt: skip
            shutil.rmtree(folder)


def main(only: str = "", command: str = "") -> int:
    begun = time.monotonic()
    import_everything()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary).resolve()
        commands = [scenario for scenario in scenarios(base) if scenario.name.startswith(command)]
        commands = [scenario for scenario in commands if scenario.name != "prepare, empty folder"]
        large = write_log(base / "large.csv", 40_000, 500)
        report = Report(base)
        tests: dict[str, Callable[[], None]] = {
            "disk": lambda: disk_full(base, report, commands),
            "read-only": lambda: read_only(base, report, commands),
            "permission": lambda: no_permission(base, report, commands),
            "vanish": lambda: vanishing(base, report, commands, large),
            "change": lambda: changing(base, report, large),
            "memory": lambda: little_memory(base, report, commands),
        }
        for name, test in tests.items():
            if only in name:
                test()
    print(f"\n{report.number} runs, {time.monotonic() - begun:.0f} s; {len(report.problems)} problems")
    for problem in report.problems:
        print(problem)
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
