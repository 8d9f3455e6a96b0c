"""Writing of files and folders that a signal interrupts."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from bert4rec_hf.files import file_beside, files_beside, finished, folder_beside

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """Both signals raise KeyboardInterrupt, as in the commands, and still do so after each test."""
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    after = [signal.signal(number, handler) for number, handler in zip(SIGNALS, before, strict=True)]
    assert after == [signal.default_int_handler] * 2


def write_folder(folder, content):
    with folder_beside(folder, last_file="b", own_files=lambda folder: ["a", "b"]) as beside:
        for name in ("a", "b"):
            (beside / name).write_text(content)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("beside", ["a folder", "an empty folder", "files"])
def test_a_signal_does_not_interrupt_the_removal_after_an_error(tmp_path, monkeypatch, beside, number):
    if beside == "an empty folder":
        (tmp_path / "new").mkdir()
    before, remove = {*tmp_path.rglob("*")}, shutil.rmtree

    def fail():
        with files_beside(tmp_path) if beside == "files" else folder_beside(tmp_path / "new", last_file="a") as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("no memory is left")

    def interrupted(*arguments, **options):
        signal.raise_signal(number)
        remove(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        fail()
    assert "no memory is left" in str(raised.value.__context__)
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_folder_is_made_leaves_none(tmp_path, monkeypatch, number):
    make = tempfile.mkdtemp

    def interrupted(*arguments, **options):
        folder = make(*arguments, **options)
        signal.raise_signal(number)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_two_moves_does_not_lose_the_folder(tmp_path, monkeypatch, number):
    write_folder(tmp_path / "out", "old")
    move = os.rename

    def interrupted(*arguments):
        move(*arguments)
        signal.raise_signal(number)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == {"a": "new", "b": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_thread_that_is_not_the_main_one_writes_as_well(tmp_path):
    for content in ("old", "new"):
        thread = threading.Thread(target=write_folder, args=(tmp_path / "out", content))
        thread.start()
        thread.join()
        assert contents(tmp_path / "out") == {"a": content, "b": content}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir"}


def killed_at_each_change(folder, start, write):
    """The state of a folder after a process that wrote was killed at its first, second, … change, until it ends."""
    for number in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        start()
        process = os.fork()
        if process == 0:
            count = 0

            def note(event, arguments, number=number):
                nonlocal count
                # The exchange of two folders is a call of the C library, looked up first.
                is_change = event in CHANGES or (event == "ctypes.dlsym" and arguments[1] == "renameat2")
                if is_change or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                    count += 1
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(note)
            write()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        yield folder
        if status == 0:
            assert number > 5
            return
        assert status == -signal.SIGKILL


def left_unfinished(folder):
    return [path for path in folder.glob("**/.*.new") if not any(parent.suffix == ".new" for parent in path.parents)]


def test_a_killed_process_leaves_the_old_folder_or_the_new_one_and_never_loses_a_file_that_stays(tmp_path, caplog):
    folder, seen = tmp_path / "here" / "out", set()

    def start():
        write_folder(folder, "old")
        (folder / "mine").write_text("mine")
        (folder / "mine too").mkdir()
        (folder / "mine too" / "one").write_text("one")

    for _ in killed_at_each_change(folder.parent, start, lambda: write_folder(folder, "new")):
        assert (folder / "mine").read_text() == "mine"
        assert (folder / "mine too" / "one").read_text() == "one"
        assert (folder / "a").read_text() == (folder / "b").read_text()
        seen.add((folder / "a").read_text())
        left = left_unfinished(folder.parent)
        caplog.clear()
        write_folder(folder, "newest")
        assert [str(path) in caplog.text for path in left] == [True] * len(left)
        assert (folder / "b").read_text() == "newest"
    assert seen == {"old", "new"}


def test_a_file_system_that_cannot_exchange_folders_or_link_files_keeps_the_same_files(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out" / "mine").mkdir()
    (tmp_path / "out" / "mine" / "one").write_text("one")

    def refused(*arguments, **options):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(sys, "platform", "another")
    write_folder(tmp_path / "out", "new")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "mine"]
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert (tmp_path / "out" / "mine" / "one").read_text() == "one"


def test_a_folder_that_was_empty_is_filled_again_after_a_kill(tmp_path, caplog):
    folder = tmp_path / "out"

    def fill():
        with folder_beside(folder, last_file="b") as beside:
            for name in ("a", "b"):
                (beside / name).write_text("new")

    for _ in killed_at_each_change(folder, folder.mkdir, fill):
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert names in (set(), {"a"}, {"a", "b"})  # b says that all are there
        left = left_unfinished(folder)
        is_whole = names == {"a", "b"}
        assert [path.name for path in finished(folder)] == (["a", "b"] if is_whole else [])
        if not is_whole:
            caplog.clear()
            fill()
            assert [path.name for path in finished(folder)] == ["a", "b"]
            assert [str(path) in caplog.text for path in left] == [True] * len(left)


def test_a_process_that_is_killed_while_files_move_leaves_no_description_of_other_files(tmp_path):
    folder, seen = tmp_path / "out", set()

    def write(content):
        with files_beside(folder, last_file="b", own_files=["stale"]) as beside:
            for name in ("a", "b"):
                (beside / name).write_text(content)

    def start():
        write("old")
        (folder / "stale").write_text("old")

    for _ in killed_at_each_change(folder, start, lambda: write("new")):
        described = (folder / "b").read_text() if (folder / "b").exists() else None
        seen.add(described)
        if described is not None:
            assert (folder / "a").read_text() == described
            assert (folder / "stale").exists() == (described == "old")
        write("newest")
        assert (folder / "b").read_text() == "newest"
    assert seen == {"old", None, "new"}


def test_a_volume_in_a_folder_is_not_lost(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out" / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(OSError, match=r"volume is a volume, so .*out cannot be replaced"):
        write_folder(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_volume_is_filled_and_not_replaced(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out" / "mine").write_text("mine")
    number = (tmp_path / "out").stat().st_ino
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    write_folder(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == {"a": "new", "b": "new", "mine": "mine"}
    assert (tmp_path / "out").stat().st_ino == number


@pytest.mark.parametrize("beside", [file_beside, files_beside])
def test_an_error_of_a_full_disk_names_the_place(tmp_path, beside):
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"), beside(tmp_path / "out"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"1")
    assert not list(tmp_path.rglob(".*"))
