"""The wheel is built, installed into an environment without this checkout, and used there."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_the_installed_wheel_has_every_module_and_its_command_runs(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, REPOSITORY]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("bert4rec_hf-*.whl")
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    folder = Path(sysconfig.get_path("purelib", vars={"base": environment, "platbase": environment}))
    # The dependencies come from the development environment. Its editable copy of the package is hidden.
    (folder / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder, wheel], check=True)

    def run(*words):
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([*map(str, words)], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    code = (
        "import pkgutil, importlib, bert4rec_hf\n"
        "for found in pkgutil.walk_packages(bert4rec_hf.__path__, 'bert4rec_hf.'):\n"
        "    found.name.endswith('__main__') or print(importlib.import_module(found.name).__file__)\n"
    )
    files = run(python, "-c", code).split()
    assert all(str(file).startswith(str(folder)) for file in files)
    modules = [path for path in (REPOSITORY / "bert4rec_hf").rglob("*.py") if path.name != "__main__.py"]
    assert len(files) == len(modules) - 1  # walk_packages leaves out the package's own __init__.py
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{n % 5},{n % 7},{n}\n" for n in range(40))
    )
    assert "wrote data; next: bert4rec train" in run(
        python, "-m", "bert4rec_hf", "prepare", "log.csv", "--output", "data"
    )
