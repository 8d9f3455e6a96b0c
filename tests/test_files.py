"""Writing of files and folders that a signal interrupts."""

import os
import shutil
import signal
import threading

import pytest

from bert4rec_hf.files import files_beside, folder_beside

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
