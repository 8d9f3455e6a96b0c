"""Helpers for the tables of the benchmarks: the name of the machine, and sections that are rewritten."""

import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

CPU_FILE = Path("/proc/cpuinfo")
CPU = CPU_FILE.read_text() if CPU_FILE.is_file() else f"model name: {platform.processor()}"


def processor(threads: int, processes: int = 1) -> str:
    model = re.search(r"model name\s*:\s*(.+)", CPU)
    per_process = f"{processes} x " if processes > 1 else ""
    return f"{model[1] if model else platform.machine()}, {per_process}{threads} thread{'s' if threads > 1 else ''}"


def machine(threads: int, processes: int = 1) -> str:
    return f"{processor(threads, processes)}, torch {torch.__version__}"


def write_section(path: Path, header: str, title: str, lines: Sequence[str]) -> None:
    """Write a section in place of the one with the same title, or at the end. A new file begins with the header."""
    text = path.read_text("utf-8") if path.is_file() else header
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    new = "\n".join([f"## {title}", "", *lines]) + "\n"
    same = [number for number, section in enumerate(sections) if section.startswith(f"## {title}\n")]
    if same:
        sections[same[0]] = new
    else:
        sections.append(new)
    path.write_text("\n".join(part.rstrip("\n") + "\n" for part in (head, *sections)), "utf-8")
    print(new, flush=True)
