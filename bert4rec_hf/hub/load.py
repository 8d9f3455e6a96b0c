"""Loading a model from a folder or the Hub, with errors that name the problem."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

from ..model.configuration_bert4rec import Bert4RecConfig
from ..model.folder_checks import check_links
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from ..reading import read_json

REPOSITORY_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
HUB_TIMEOUT_SECONDS = 10


def load_model(model: str | os.PathLike) -> Bert4RecForMaskedItemPrediction:
    """Load a model.

    Args:
        model: A model folder or Hub id.

    Raises:
        ValueError: If the folder is not a BERT4Rec model folder, or the Hub has no such model; or if the weights are
            damaged or are not those of config.json.
    """
    check_model(model)
    try:
        loaded, found = Bert4RecForMaskedItemPrediction.from_pretrained(model, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"{model} is neither a model folder nor a model on the Hub: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"the weights of {model} do not fit its config.json: {error}") from error
    for problem in ("missing", "unexpected"):
        if names := sorted(found[f"{problem}_keys"]):
            raise ValueError(
                f"the weights of {model} do not fit its config.json: {len(names)} are {problem}, such as {names[0]}"
            )
    return loaded


def check_model(model: str | os.PathLike) -> None:
    """Raise ValueError if a name is neither a BERT4Rec model folder nor a model on the Hub."""
    if os.path.isdir(model):
        check_links(model)
        config = Path(model) / "config.json"
        kind = read_json(config, {"model_type?": object}).get("model_type") if config.is_file() else None
        if kind != Bert4RecConfig.model_type:
            found = f"its config.json says model_type {kind!r}" if kind else "it has no config.json with a model_type"
            raise ValueError(f"{model} is not a BERT4Rec model folder ({found}): make one with bert4rec train")
    else:
        _check_on_hub(str(model))


def _check_on_hub(name: str) -> None:
    """Raise if a name is not a model on the Hub. `from_pretrained` would retry for a minute before it fails."""
    missing = f"there is no folder {name}"
    if not REPOSITORY_ID.fullmatch(name):
        raise ValueError(f"{missing}; expected a model folder, made with bert4rec train, or a Hub id, owner/name")
    if os.path.isdir(Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"):
        return  # the model is in the cache and can be loaded offline
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError:
        return  # the error of `from_pretrained` says how to get access
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"{missing}, and the Hub has no such model: {error}") from error
    except Exception as error:  # the HTTP library, and so its exceptions, depends on the version of huggingface_hub
        raise ValueError(f"{missing}, and the Hub cannot be reached: {error}") from error
