"""A PostgreSQL server, which the tests start."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
from chain_runs import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []


@pytest.fixture(scope="session")
def server():
    """The URL of a server of its own, which listens in a folder only. PostgreSQL does not run as root."""
    pytest.importorskip("psycopg")
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed")
    folder = Path("/tmp") / f"bert4rec-postgres-{os.getpid()}"
    folder.mkdir()
    port = free_port()
    user = {}
    if os.getuid() == 0:
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": "postgres"}
    run = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **user}
    programs = PROGRAMS[-1]
    subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "shop", "--auth", "trust"], **run)
    options = f"-k {folder} -c listen_addresses=127.0.0.1 -p {port}"
    subprocess.run(
        [programs / "pg_ctl", "-D", folder / "data", "-l", folder / "log", "-w", "-o", options, "start"], **run
    )
    try:
        yield f"postgres://shop@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([programs / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"], **run)
        shutil.rmtree(folder)
