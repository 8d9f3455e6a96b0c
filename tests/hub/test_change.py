"""A changed model folder takes the place of the former one as a whole."""

import json

import pytest
from small_models import NUM_ITEMS, make_model

import bert4rec_hf.hub.change
from bert4rec_hf import Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.hub.change import changed_model


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    Bert4RecTokenizer.from_items([f"item {number:02}" for number in range(NUM_ITEMS)]).save_pretrained(folder)
    (folder / "evaluation.json").write_text("[]")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "config.json").write_text("{}")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_belongs_to_the_former_weights_goes_and_all_else_stays(folder):
    with changed_model(folder, folder) as new:
        assert not list(new.glob("*.safetensors"))
        make_model(seed=1, popularity_weight=3.0).save_pretrained(new)
    assert not (folder / "evaluation.json").exists()
    assert (folder / "checkpoint-7" / "config.json").read_text() == "{}"
    assert Bert4RecForMaskedItemPrediction.from_pretrained(folder).config.popularity_weight == 3
    assert "item 00" in Bert4RecTokenizer.from_pretrained(folder).items
    assert (folder / "README.md").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_error_leaves_the_folder_as_it_was(folder, monkeypatch):
    before = contents(folder)

    def fail(folder):
        assert json.loads((folder / "config.json").read_text())["popularity_weight"] == 3
        raise OSError("no space left")

    monkeypatch.setattr(bert4rec_hf.hub.change, "write_model_card", fail)
    with pytest.raises(OSError, match="no space left"), changed_model(folder, folder) as new:
        make_model(seed=1, popularity_weight=3.0).save_pretrained(new)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
