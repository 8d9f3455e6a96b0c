"""Loading a model folder or Hub id, with an error that says what is wrong with it."""

import json
import os
from pathlib import Path

from ..model.configuration_bert4rec import Bert4RecConfig
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction


def load_model(model: str | os.PathLike) -> Bert4RecForMaskedItemPrediction:
    """A model folder or Hub id; raises ValueError for a folder that is none."""
    if os.path.isdir(model):
        config = Path(model) / "config.json"
        kind = json.loads(config.read_text("utf-8")).get("model_type") if config.is_file() else None
        if kind != Bert4RecConfig.model_type:
            found = f"its config.json says model_type {kind!r}" if kind else "it has no config.json with a model_type"
            raise ValueError(f"{model} is not a BERT4Rec model folder ({found}): make one with bert4rec train")
    try:
        return Bert4RecForMaskedItemPrediction.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"{model} is neither a model folder nor a model that the Hub gives: {error}") from error
