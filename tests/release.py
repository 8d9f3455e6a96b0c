"""Builds the wheel and the source distribution, and uses each as somebody who has only this file.

    python tests/release.py FOLDER DISTRIBUTIONS

The script writes both files into DISTRIBUTIONS, and beside them the list of the wheel's dependencies (SBOM, CycloneDX).
The environments are in FOLDER. The quickstart runs from the installed wheel, outside the checkout and without its
recipes; its NDCG@10 and recommendations must be close to those of the README. They need not be the same: another
processor or number of threads adds floats in another order, and the model is another one of the same quality.
Known vulnerabilities are looked up with pip-audit if its service can be reached.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
PINNED = ["--no-require-hashes", "--constraint", ROOT / "constraints.txt"]
TOOLS = ("build", "twine", "cyclonedx-bom", "pip-audit")
HISTORY = ("50", "172", "181")


def run(*words: Any, **options: Any) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)], env=environment, stdout=subprocess.PIPE, text=True, check=False, **options
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def environment(folder: Path, *packages: Any) -> Path:
    """A new environment with these packages; the path of its programs."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    programs = folder / "bin"
    run(programs / "python", *PIP, "install", "--upgrade", re.search(r"pip==\S+", (ROOT / "Makefile").read_text())[0])
    run(programs / "python", *PIP, "install", *PINNED, *packages)
    return programs


def recommended(text: str) -> list[str]:
    """The lines of recommendations: a place, an item id, a score and a title."""
    return [line.strip() for line in re.findall(r"^ +\d+ +\S+ +\d+\.\d{3}  .+$", text, re.MULTILINE)]


def ndcg(text: str) -> float:
    """The model's NDCG@10 in a comparison: HR@1, HR@10 and NDCG@10 are the first three columns."""
    return float(re.findall(r"^model +\S+ +\S+ +(\S+)", text, re.MULTILINE)[0])


def quickstart(bert4rec: Path) -> None:
    recipe = re.findall(r"^(\w+): (.+)$", (ROOT / "recipes/ml-100k.yaml").read_text("utf-8"), re.MULTILINE)
    options = [word for name, value in recipe for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        here: dict[str, Any] = {"cwd": folder, "stderr": subprocess.DEVNULL}
        run(bert4rec, "prepare", "ml-100k", "--output", "data", **here)
        run(bert4rec, "train", "--data", "data", "--output_dir", "model", *options, **here)
        output = run(bert4rec, "evaluate", "model", "--data", "data", **here)
        output += run(bert4rec, "recommend", "model", *HISTORY, **here)
    print(output)
    readme = (ROOT / "README.md").read_text("utf-8")
    assert abs(ndcg(output) - ndcg(readme)) < 0.01, f"README.md shows another NDCG@10: {ndcg(readme)}"
    expected, found = ({line.split()[1] for line in recommended(text)} for text in (readme, output))
    assert len(expected & found) >= 2, f"README.md shows other recommendations: {expected}"


def audit(tools: Path, installed: Path) -> str:
    """Look up known vulnerabilities. Raises if there is one."""
    options = (
        "--no-deps",
        "--disable-pip",
        "--progress-spinner",
        "off",
        "--format",
        "json",
        "--requirement",
        installed,
    )
    done = subprocess.run([tools / "pip-audit", *options], capture_output=True, text=True, check=False, timeout=300)
    found = json.loads(done.stdout)["dependencies"] if done.stdout.startswith("{") else []
    audited = [package for package in found if "vulns" in package]
    if not audited:
        return "pip-audit: skipped, since its service cannot be reached or knows none of the packages\n"
    vulnerable = [
        f"{package['name']} {package['version']}: {package['vulns']}" for package in audited if package["vulns"]
    ]
    assert not vulnerable, "\n".join(["pip-audit found known vulnerabilities", *vulnerable])
    return f"pip-audit: no known vulnerability in {len(audited)} of {len(found)} packages that its service knows\n"


def main() -> None:
    folder, distributions = (Path(word).resolve() for word in sys.argv[1:])
    shutil.rmtree(distributions, ignore_errors=True)
    tools = environment(folder / "tools", *TOOLS)
    run(tools / "python", "-m", "build", "--outdir", distributions, ROOT, stderr=subprocess.STDOUT)
    (wheel,), (source,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    print(run(tools / "twine", "check", "--strict", wheel, source))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bert4rec_hf").rglob("*.py")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == modules

    version = f"bert4rec {wheel.name.split('-')[1]}\n"
    from_source = environment(folder / "source", source)
    assert run(from_source / "bert4rec", "--version") == version
    from_wheel = environment(folder / "wheel", wheel)
    assert run(from_wheel / "bert4rec", "--version") == version
    # The SBOM and the audit are of the wheel and its dependencies, not of the tool that installed them.
    run(from_wheel / "python", *PIP, "uninstall", "--yes", "setuptools")
    sbom = distributions / f"{wheel.name.removesuffix('.whl')}.cdx.json"
    run(tools / "cyclonedx-py", "environment", from_wheel / "python", "--output-file", sbom, stderr=subprocess.DEVNULL)

    installed = folder / "installed.txt"
    installed.write_text(run(from_wheel / "python", *PIP, "freeze", "--exclude", "bert4rec-hf"), "utf-8")
    print(audit(tools, installed))

    quickstart(from_wheel / "bert4rec")
    for file in sorted(distributions.iterdir()):
        print(f"{file.stat().st_size:9,} bytes  {file.name}")


if __name__ == "__main__":
    main()
