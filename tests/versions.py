"""Runs the whole test suite with the oldest versions that pyproject.toml allows, with the pinned and with the newest.

    python tests/versions.py FOLDER [oldest] [pinned] [newest]

Each set has an environment of its own in FOLDER, made by the Python that runs this script; `newest=python3.14` takes
another one. The script writes the table of docs/reference/compatibility.md from the last result of each set. The exit
code is 1 if a test failed.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "compatibility.md"
SETS = ("oldest", "pinned", "newest")
SHOWN = (
    "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub", "ibis-framework",
    "duckdb", "pyarrow", "numpy", "pandas", "matplotlib", "onnx", "onnxscript", "faiss-cpu", "peft", "optuna",
)  # fmt: skip
ASK = (
    "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
)


def floors() -> list[str]:
    """The lower bounds of the dependencies and of the optional ones, each as the version that is required exactly."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    bounds = (re.match(r"([\w-]+)(?:\[.*])?>=([\d.]+)", line) for line in project["dependencies"] + optional)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def constraints(name: str, folder: Path) -> list[str]:
    """pip's options for a set. The hashes of constraints.txt are left out, since older versions of pip refuse them."""
    if name == "newest":
        return []
    pinned = re.findall(r"^[\w.-]+(?:\[.*])?==\S+", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    file = folder / "constraints.txt"
    file.write_text("\n".join(floors() if name == "oldest" else pinned) + "\n", "utf-8")
    return ["-c", str(file)]


def measure(name: str, python: str, folder: Path) -> bool:
    """Install one set, run the tests with it, and store versions and result in FOLDER/NAME/result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = folder / "venv"
    if not environment.is_dir():
        subprocess.run([python, "-m", "venv", environment], check=True)
    own = environment / "bin" / "python"
    install = [own, "-m", "pip", "install", "--quiet", "--upgrade", *constraints(name, folder), "-e", ".[dev]"]
    subprocess.run(install, check=True, cwd=ROOT)
    run = [own, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    with (folder / "tests.log").open("w") as log:
        subprocess.run(run, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    last = (folder / "tests.log").read_text().strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    versions = json.loads(subprocess.run([own, "-c", ASK, *SHOWN], check=True, capture_output=True, text=True).stdout)
    versions["Python"] = subprocess.run([own, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]
    (folder / "result.json").write_text(json.dumps({"versions": versions, "counts": counts}, indent=1) + "\n")
    print(f"{name}: {last}", flush=True)
    return counts.keys() <= {"passed", "skipped"} and counts.get("passed", 0) > 0


def write_table(folder: Path) -> None:
    results = {name: json.loads((folder / name / "result.json").read_text()) for name in SETS}
    rows = [["", *SETS], ["---"] * (len(SETS) + 1)]
    for shown in ("Python", *SHOWN):
        rows.append([shown, *(results[name]["versions"][shown] for name in SETS)])
    for word in ("passed", "failed", "skipped"):
        rows.append([f"tests {word}", *(f"{results[name]['counts'].get(word, 0):,}" for name in SETS)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = PAGE.read_text("utf-8")
    PAGE.write_text(re.sub(r"^\|.*\|$(\n^\|.*\|$)*", table, text, count=1, flags=re.MULTILINE), "utf-8")


def main() -> int:
    folder, *wanted = sys.argv[1:]
    passed = True
    for name, _, python in (item.partition("=") for item in wanted or SETS):
        passed &= measure(name, python or sys.executable, Path(folder).resolve() / name)
    if all((Path(folder) / name / "result.json").is_file() for name in SETS):
        write_table(Path(folder))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
