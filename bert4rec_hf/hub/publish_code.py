"""`publish_code`: model folders that can be loaded without this package."""

import json
import os
from pathlib import Path
from typing import Any

from ..files import write_file
from ..model.configuration_bert4rec import Bert4RecConfig
from ..model.handler import PUBLISHED_TASK
from ..reading import read_json

MODEL_CODE = Path(__file__).parent.parent / "model"
# All files of the folder are copied. They import only one another and libraries.
CODE_FILES = tuple(sorted(path.name for path in MODEL_CODE.glob("*.py") if path.name != "__init__.py"))
CONFIG_ENTRIES: dict[str, Any] = {
    "auto_map": {
        "AutoConfig": "configuration_bert4rec.Bert4RecConfig",
        "AutoModel": "modeling_bert4rec.Bert4RecModel",
        "AutoModelForMaskedLM": "modeling_bert4rec.Bert4RecForMaskedItemPrediction",
    },
    "custom_pipelines": {
        PUBLISHED_TASK: {
            "impl": "pipeline.SequentialRecommendationPipeline",
            "pt": ["AutoModelForMaskedLM"],
            "type": "text",
        }
    },
}
# Classes of the slow tokenizer, which does not exist, and of the fast one.
TOKENIZER_ENTRIES = {"auto_map": {"AutoTokenizer": [None, "tokenization_bert4rec.Bert4RecTokenizer"]}}


def publish_code(folder: str | os.PathLike) -> None:
    """Copy the code of model, tokenizer and pipeline into a model folder, for `trust_remote_code=True`.

    The folder also gets handler.py, with which a Hugging Face Inference Endpoint serves it.

    Without this package installed, `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM`, `AutoTokenizer` and
    `pipeline("bert4rec-recommendation", model=folder, trust_remote_code=True)` then load the folder. With this package
    installed, loading does not change. `save_pretrained` does not copy the code: call this function for the new folder.

    Args:
        folder: A model folder with its tokenizer.

    Raises:
        ValueError: If the folder is not a model folder, or has no tokenizer.
    """
    folder = Path(folder)
    config = _read(folder / "config.json", "bert4rec train or model.save_pretrained")
    tokenizer_config = _read(folder / "tokenizer_config.json", "tokenizer.save_pretrained")
    if config.get("model_type") != Bert4RecConfig.model_type:
        raise ValueError(
            f"{folder} holds no BERT4Rec model: expected model_type {Bert4RecConfig.model_type!r} in config.json; got "
            f"{config.get('model_type')!r}"
        )
    for name in CODE_FILES:
        write_file(folder / name, (MODEL_CODE / name).read_bytes())
    # These files are written last, because they name the code.
    for name, content in (
        ("config.json", config | CONFIG_ENTRIES),
        ("tokenizer_config.json", tokenizer_config | TOKENIZER_ENTRIES),
    ):
        write_file(folder / name, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _read(path: Path, written_by: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; write it with {written_by}. Nothing was published")
    return read_json(path, {})
