"""`publish_code`: a model folder that also loads where this package is not installed."""

import json
import os
from pathlib import Path
from typing import Any

from ..files import write_file
from ..model.configuration_bert4rec import Bert4RecConfig

MODEL_CODE = Path(__file__).parent.parent / "model"
# The whole folder is copied; its files import nothing of this package but one another.
CODE_FILES = tuple(sorted(path.name for path in MODEL_CODE.glob("*.py") if path.name != "__init__.py"))
# Not our own task's name: under that, Transformers would ask our own users to trust the folder's code as well.
PUBLISHED_TASK = "bert4rec-recommendation"

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
# The slow tokenizer, of which there is none, and the fast one.
TOKENIZER_ENTRIES = {"auto_map": {"AutoTokenizer": [None, "tokenization_bert4rec.Bert4RecTokenizer"]}}


def publish_code(folder: str | os.PathLike) -> None:
    """Put the code of model, tokenizer and pipeline into a model folder, for `trust_remote_code=True`.

    Without this package, `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM`, `AutoTokenizer` and
    `pipeline("bert4rec-recommendation", model=folder, trust_remote_code=True)` then load the folder. With it nothing
    changes. Saving the model elsewhere leaves the code behind: publish the copy anew.

    Raises:
        ValueError: If the folder is no model folder, or has no tokenizer.
    """
    folder = Path(folder)
    config = _read(folder / "config.json", "bert4rec train or model.save_pretrained")
    tokenizer_config = _read(folder / "tokenizer_config.json", "tokenizer.save_pretrained")
    if config.get("model_type") != Bert4RecConfig.model_type:
        raise ValueError(f"{folder} holds no BERT4Rec model: its model_type is {config.get('model_type')!r}")
    for name in CODE_FILES:
        write_file(folder / name, (MODEL_CODE / name).read_bytes())
    # Behind the code that they name.
    for name, content in (
        ("config.json", config | CONFIG_ENTRIES),
        ("tokenizer_config.json", tokenizer_config | TOKENIZER_ENTRIES),
    ):
        write_file(folder / name, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _read(path: Path, written_by: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}, which {written_by} writes; nothing was published")
    return json.loads(path.read_text("utf-8"))
