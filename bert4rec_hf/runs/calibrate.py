"""`bert4rec calibrate` as a function."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.histories import check_prepared
from ..data.rows import users_with_targets
from ..defaults import default_num_transitions
from ..evaluation.calibration import choose_weights, compare_targets, set_weights, weights_of
from ..evaluation.seen_targets import check_targets, json_of_model
from ..hub.change import changed_model
from ..hub.load import load_model
from ..hub.model_card import CALIBRATION_FILE, CALIBRATION_FORM, RECIPE_FILE
from ..model.history_scores import WEIGHT_FIELDS, HistoryScores
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..reading import read_yaml
from ..training.initialization import keep_conversion_scores, keep_transitions
from .model_and_data import check_catalogue, read_histories, rows_for


def calibrate_prepared(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    streaming: bool = False,
    per_device_eval_batch_size: int = 64,
    use_cpu: bool = False,
) -> dict[str, Any]:
    """Choose the weights of a model's counted scores on the validation targets of a prepared folder.

    The counted scores are counted anew in the training part. A model without transitions, such as a converted one, gets
    them. The folder of the model is changed only if the chosen weights are clearly better; see `choose_weights`. Then
    calibration.json is written, recipe.yaml gets the weights, and evaluation.json, whose metrics are those of the
    former weights, is removed.

    Args:
        model: A model folder.
        data: The prepared folder.
        streaming: Whether the histories stay on disk, for a log larger than memory.
        per_device_eval_batch_size: Number of histories ranked at once.
        use_cpu: Whether to leave an accelerator unused.

    Returns:
        The record of `choose_weights`.

    Raises:
        ValueError: If a folder is not a model folder or a prepared folder, if the catalogue has none of the items of
            the data, if no user has a validation target, or if the model has trained on these targets.
    """
    check_prepared(data)
    if not Path(model).is_dir():
        raise ValueError(f"expected a model folder, which calibration changes; got {model}: download it first")
    loaded = load_model(model).eval()
    tokenizer = Bert4RecTokenizer.from_pretrained(model)
    histories, tokenizer, preparation = read_histories(data, streaming, tokenizer)
    check_catalogue(model, tokenizer, data, histories)
    check_targets(model, preparation, "validation")
    config = loaded.config
    evaluated = users_with_targets(histories, "validation", None)
    rows = rows_for(config, evaluated, tokenizer, "validation")
    if not len(rows):
        raise ValueError(f"no user of {data} has a validation target; prepare with another --split, or --validation")
    if not config.num_transitions and default_num_transitions(tokenizer.num_items):
        config.num_transitions = default_num_transitions(tokenizer.num_items)
        config.transition_weight = config.next_item_weight = 0.0  # the model as it is
        loaded.history_scores = HistoryScores(config)
    if config.num_transitions:
        keep_transitions(loaded, histories, tokenizer.num_items, weight=config.transition_weight)
    if config.num_event_types:
        keep_conversion_scores(loaded, histories)
    if not use_cpu and torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    comparisons = compare_targets(loaded, rows, tokenizer, batch_size=per_device_eval_batch_size)
    before = (json_of_model(model, CALIBRATION_FILE, CALIBRATION_FORM) or {}).get("were_chosen", False)
    record = choose_weights(comparisons, weights_of(config), were_chosen=before)
    record |= {"source": os.path.basename(preparation["source"])}
    if record["adopted"]:
        set_weights(config, record["weights"])
        with changed_model(Path(model), Path(model)) as folder:
            loaded.save_pretrained(folder)
            if (folder / RECIPE_FILE).is_file():
                recipe = read_yaml(folder / RECIPE_FILE)
                recipe |= {name: getattr(config, name) for name in ("num_transitions", *WEIGHT_FIELDS.values())}
                text = yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True)
                (folder / RECIPE_FILE).write_text(text, "utf-8")
            (folder / CALIBRATION_FILE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return record
