"""Loading models: names that are neither a model folder nor a Hub id fail at once."""

import subprocess
import sys

import pytest
from hub_server import HubServer
from small_models import make_model

from bert4rec_hf.cli import main
from bert4rec_hf.hub import load
from bert4rec_hf.hub.load import load_model


@pytest.mark.parametrize("name", ["no_such_model", "./no_such_model", "/no/such/model", "a/b/c"])
def test_a_name_that_is_no_hub_id_is_told_without_asking_the_hub(name, capsys, monkeypatch):
    monkeypatch.setattr(load, "HfApi", None)
    assert main(["recommend", name, "1"]) == 2
    assert capsys.readouterr().err == (
        f"bert4rec recommend: there is no folder {name}; expected a model folder, made with bert4rec train, or a Hub "
        "id, owner/name\n"
    )


def test_a_hub_that_cannot_be_reached_is_asked_once():
    code = """
import time
from bert4rec_hf.hub.load import load_model
started = time.monotonic()
try:
    load_model("owner/no_such_model")
finally:
    print(time.monotonic() - started)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "PATH": ""},
    )  # fmt: skip
    assert "there is no folder owner/no_such_model, and the Hub cannot be reached" in done.stderr
    assert float(done.stdout) < 20  # retries would take minutes


def test_a_model_that_the_hub_lacks_is_told(monkeypatch):
    with HubServer() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(ValueError, match=r"there is no folder somebody/nothing, and the Hub has no such model"):
            load_model("somebody/nothing")


def test_a_model_folder_is_loaded(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert load_model(tmp_path).config.vocab_size == make_model().config.vocab_size
