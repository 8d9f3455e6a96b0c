"""Loading a model folder or Hub id, with an error that says what is wrong with it."""

import json
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

from ..model.configuration_bert4rec import Bert4RecConfig
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction

REPOSITORY_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
HUB_TIMEOUT_SECONDS = 10


def load_model(model: str | os.PathLike) -> Bert4RecForMaskedItemPrediction:
    """A model folder or Hub id; raises ValueError for a folder that is none."""
    if os.path.isdir(model):
        config = Path(model) / "config.json"
        kind = json.loads(config.read_text("utf-8")).get("model_type") if config.is_file() else None
        if kind != Bert4RecConfig.model_type:
            found = f"its config.json says model_type {kind!r}" if kind else "it has no config.json with a model_type"
            raise ValueError(f"{model} is not a BERT4Rec model folder ({found}): make one with bert4rec train")
    else:
        _check_on_hub(str(model))
    try:
        return Bert4RecForMaskedItemPrediction.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"{model} is neither a model folder nor a model that the Hub gives: {error}") from error


def _check_on_hub(name: str) -> None:
    """Raise for what is no folder and no model of the Hub; its loader would ask for a minute before it says so."""
    missing = f"there is no folder {name}"
    if not REPOSITORY_ID.fullmatch(name):
        raise ValueError(f"{missing}; expected a model folder, which bert4rec train makes, or a Hub id, owner/name")
    if os.path.isdir(Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"):
        return  # it was loaded before, and may be loaded without the Hub
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError:
        return  # its files say how to get access
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"{missing}, and the Hub gives no such model: {error}") from error
    except Exception as error:  # those of the HTTP library, which differs between versions of huggingface_hub
        raise ValueError(f"{missing}, and the Hub cannot be asked for a model of that name: {error}") from error
