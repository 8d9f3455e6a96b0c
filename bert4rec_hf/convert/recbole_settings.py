"""Converting settings of RecBole and hopwise to recipes of `bert4rec train`."""

import math
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub.errors import StrictDataclassError

from ..evaluation.metrics import ranking_metrics
from ..model.configuration_bert4rec import Bert4RecConfig
from ..reading import read_yaml

# Settings of RecBole, and the fields of `Bert4RecConfig` with the same meaning.
SETTINGS = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_size": "hidden_size",
    "inner_size": "intermediate_size",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attn_dropout_prob": "attention_probs_dropout_prob",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}
# Settings that filter the log, and their values that filter nothing.
FILTERS = {
    "user_inter_num_interval": "[0,inf)", "item_inter_num_interval": "[0,inf)", "val_interval": None,
    "rm_dup_inter": None, "benchmark_filename": None,
}  # fmt: skip
ITEM_LOSSES = {"CE": "softmax", "BPR": "bpr"}
# RecBole's architecture in fields of `Bert4RecConfig`, and its lack of counted scores.
ARCHITECTURE = {
    "position_embedding_type": "learned_from_start", "normalization": "post", "gated_feed_forward": False,
    "causal_attention": False, "filter_share": 0.0, "prediction_head": True, "num_transitions": 0, "repeat_weight": 0.0,
}  # fmt: skip


def convert_config(path: str | os.PathLike) -> dict[str, Any]:
    """Convert a YAML file of RecBole or hopwise to a recipe for `bert4rec train --config`.

    Settings that the file lacks have RecBole 1.2's defaults if they concern the model or the objective, and the
    defaults of this package if they concern the training loop.

    Args:
        path: The YAML file.

    Returns:
        The recipe: values by option of `bert4rec train`.

    Raises:
        ValueError: If the file is not such a YAML file, has invalid values, or is for another model.
    """
    return _converted(path)[0]


def config_recipe(path: str | os.PathLike) -> str:
    """The recipe of `convert_config` as YAML, with comments.

    The comments say how to prepare the log, where the recipe differs from RecBole, and which settings were left out.

    Args:
        path: The YAML file of RecBole or hopwise.

    Raises:
        ValueError: If `convert_config` raises it.
    """
    recipe, prepare, remarks, left_out = _converted(path)
    comments = [
        f"Converted from {Path(path).name}, settings of RecBole or hopwise.",
        f"First prepare the log: {shlex.join(prepare)}",
        "Then train: bert4rec train --config RECIPE.yaml --data DATA --output_dir MODEL",
        *(["Differences:", *(f"  {remark}" for remark in remarks)] if remarks else []),
        *(["Left out:"] if left_out else []),
        *(f"  {', '.join(keys)}: {reason}" for reason, keys in left_out.items()),
    ]
    lines = [f"# {' '.join(comment.splitlines())}\n" for comment in comments]
    return "".join(lines) + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _converted(path: str | os.PathLike) -> tuple[dict[str, Any], list[str], list[str], dict[str, list[str]]]:
    """The recipe, the prepare command, the remarks, and the keys that were left out by reason."""
    given = read_yaml(path, _Loader)
    given = {key: value for key, value in given.items() if value is not None or key not in DEFAULTS}
    settings = DEFAULTS | given
    recipe: dict[str, Any] = ARCHITECTURE | {"item_initialization": "random", "calibrate": False}
    prepare: dict[str, Any] = {}
    remarks: list[str] = []
    left_out: dict[str, list[str]] = {}
    for key, value in settings.items():
        rule = RECIPE.get(key, _unknown)
        try:
            answer = rule(value) if callable(rule) else {rule: value}
        except ValueError as error:
            raise ValueError(f"{key} in {path} {error}") from error
        if isinstance(answer, str):
            left_out.setdefault(answer, []).append(str(key))
            continue
        remarks += [f"{key}: {answer.pop('#')}"] if "#" in answer else []
        for option, chosen in answer.items():
            (prepare if option.startswith("--") else recipe)[option] = chosen
    try:
        Bert4RecConfig(**{name: value for name, value in recipe.items() if name in Bert4RecConfig.__annotations__})
        most = int(recipe["mask_ratio"] * recipe["max_position_embeddings"])
    except (OverflowError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"the settings in {path} make no BERT4Rec: {error}") from error
    if most > 0:
        recipe["max_predictions"] = most
    missing = [key for key in DEFAULTS if key not in given and key in RECIPE and not key.endswith("_FIELD")]
    if missing:
        remarks.append(f"these settings are not in the file and have RecBole's defaults: {', '.join(missing)}")
    name = settings.get("dataset")
    log = "LOG.inter" if name is None else Path(str(settings.get("data_path") or "dataset"), str(name), f"{name}.inter")
    words = ["bert4rec", "prepare", str(log), "--output", "DATA"]
    return recipe, words + [str(word) for option in prepare.items() for word in option], remarks, left_out


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as RecBole's loader does. YAML 1.1 only accepts 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unknown(value: Any) -> str:
    return "unknown settings, which BERT4Rec of RecBole and hopwise does not have"


def _left_out(reason: str, keys: str) -> dict[str, Callable[[Any], str]]:
    return dict.fromkeys(keys.split(), lambda value: reason)


def _seen_items(value: Any) -> dict[str, Any]:
    remark = "RecBole's BERT4Rec only runs with True and may recommend seen items"
    return {"filter_seen_items": not value} | ({} if value else {"#": remark})


def _last_item_ratio(value: Any) -> dict[str, Any]:
    return {"last_item_ratio": value} | ({"#": "a share of the rows; in RecBole, of the batches"} if value else {})


def _item_loss(value: Any) -> dict[str, Any]:
    if str(value) not in ITEM_LOSSES:
        raise ValueError(f"must be one of {', '.join(ITEM_LOSSES)}; got {value!r}")
    if value == "CE":
        return {"item_loss": ITEM_LOSSES[value]}
    remark = "all labels of a batch share its negatives; 256 negatives give the same mean loss with less noise"
    return {"item_loss": ITEM_LOSSES[value], "num_negatives": 1, "#": remark}


def _optimizer(value: Any) -> dict[str, Any] | str:
    names = {"adam": "adamw_torch", "adamw": "adamw_torch"} | {name: name for name in ("sgd", "adagrad", "rmsprop")}
    name = names.get(str(value).lower())
    return {"optim": name} if name else f"no --optim corresponds to {value}"


def _weight_decay(value: Any) -> dict[str, Any]:
    remark = (
        "AdamW decays the weights directly, except item vectors, biases and norms; RecBole's Adam adds the decay to "
        "all gradients"
    )
    return {"weight_decay": value} | ({"#": remark} if value else {})


def _clipping(value: Any) -> dict[str, Any]:
    if value is None:
        return {"max_grad_norm": 0.0}
    if not isinstance(value, dict) or "max_norm" not in value:
        raise ValueError(f"must be a mapping with max_norm; got {value!r}")
    remark = {"#": "the norm is always the 2-norm"} if value.get("norm_type", 2) != 2 else {}
    return {"max_grad_norm": value["max_norm"]} | remark


def _best_metric(value: Any) -> dict[str, Any] | str:
    """The equivalent metric: with one target, recall is hit, precision orders models like hit, and MAP is MRR."""
    name, _, cutoff = str(value).lower().partition("@")
    if name in ("mrr", "map"):
        return {"metric_for_best_model": "MRR", "#": f"MRR is of the whole ranking, not of its first {cutoff} items"}
    ours = {"ndcg": "NDCG", "hit": "HR", "recall": "HR", "precision": "HR"}.get(name, name)
    if f"{ours}@{cutoff}" not in ranking_metrics(np.ones(1)):
        return f"no metric corresponds to {value}; the best checkpoint is chosen by --metric_for_best_model, NDCG@10"
    return {"metric_for_best_model": f"{ours}@{cutoff}"}


def _interval(value: Any) -> tuple[str, float, float] | None:
    """The left bracket and the two ends of an interval such as "[5,inf)"; None for several intervals."""
    number = r"\s*([-+.\w]+)\s*"
    match = re.fullmatch(rf"([\[(]){number},{number}[\])]", str(value).strip())
    try:
        return (match[1], float(match[2]), float(match[3])) if match else None
    except ValueError:
        return None


def _numbers(minimum: str, maximum: str | None = None) -> Callable[[Any], dict[str, Any] | str]:
    """The rule for an interval of numbers of events, as options of `prepare`."""

    def rule(value: Any) -> dict[str, Any] | str:
        if value is None:
            return {}
        interval = _interval(value)
        if interval is None or not math.isfinite(interval[1]):
            return f"{value} is no interval with a lower limit; see bert4rec prepare {minimum}"
        bracket, low, high = interval
        least = math.ceil(low) if bracket == "[" else math.floor(low) + 1
        options: dict[str, Any] = {minimum: least} if least > 1 else {}
        if math.isfinite(high) and maximum:
            most = math.floor(high) if str(value).strip().endswith("]") else math.ceil(high) - 1
            options |= {maximum: most, "#": f"{maximum} is applied once, before the other filters"}
        elif math.isfinite(high):
            options["#"] = f"prepare has no upper limit of {high:g}"
        return options

    return rule


def _delimiter(value: Any) -> dict[str, Any] | str:
    if value in (None, "\t"):  # as prepare finds in the header
        return {}
    if not 1 <= len(str(value).encode()) <= 4:
        return f"prepare takes delimiters of one to four bytes, not {value!r}"
    return {"--delimiter": str(value)}


def _min_rating(value: Any) -> dict[str, Any] | str:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"must be a mapping of fields to intervals; got {value!r}")
    if not value:
        return {}
    field, interval = next(iter(value.items()))
    ends = _interval(interval)
    if len(value) > 1 or ends is None or ends[0] != "[" or ends[2] != math.inf:
        return (
            "prepare filters one column by a lower limit (--rating_column, --min_rating); filter the log yourself for "
            f"{value}"
        )
    return {"--rating_column": str(field), "--min_rating": f"{ends[1]:g}"}


def _split(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping; got {value!r}")
    split, modes = value.get("split") or {"LS": "valid_and_test"}, value.get("mode") or "full"
    if not isinstance(split, dict) or "LS" not in split:
        return f"prepare has the splits leave-one-out and temporal, not {split}"
    options = {"--split": "leave-one-out"} | ({"--validation": "false"} if split["LS"] == "test_only" else {})
    both = split["LS"] in ("valid_and_test", "test_only")
    remarks = [] if both else [f"both validation and test targets are held out, not {split['LS']}"]
    remarks += ["events are ordered by time"] * (value.get("order", "TO") != "TO")
    if any(mode != "full" for mode in (modes.values() if isinstance(modes, dict) else [modes])):
        remarks.append(f"all items are ranked, not {modes}; bert4rec evaluate --protocol paper ranks among 100")
    return options | ({"#": "; ".join(remarks)} if remarks else {})


def _model(value: Any) -> dict[str, Any]:
    if value != "BERT4Rec":
        raise ValueError(f"must be BERT4Rec; got {value!r}")
    return {}


# For each setting of RecBole: the option of `bert4rec train` with the same value, or a function of its value. The
# function returns options, with "--" if they are options of `bert4rec prepare`, and possibly a remark under "#"; or the
# reason why the setting is left out.
RECIPE: dict[str, str | Callable[[Any], dict[str, Any] | str]] = {
    **SETTINGS,
    "mask_ratio": "mask_ratio",
    "ft_ratio": _last_item_ratio,
    "loss_type": _item_loss,
    "MAX_ITEM_LIST_LENGTH": "max_position_embeddings",
    "repeatable": _seen_items,
    "learning_rate": lambda value: {"learning_rate": value, "lr_scheduler_type": "constant", "warmup_steps": 0},
    "learner": _optimizer,
    "weight_decay": _weight_decay,
    "clip_grad_norm": _clipping,
    "train_batch_size": lambda value: {
        "per_device_train_batch_size": value,
        "#": "a row is a user, in RecBole it is a prefix of a user's history, so an epoch has fewer steps; --max_steps "
        "sets their number, a smaller batch gives more",
    },
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "seed": "seed",
    "valid_metric": _best_metric,
    "enable_amp": lambda value: {"bf16": True} if value else {},
    "use_gpu": lambda value: {} if value else {"use_cpu": True},
    "worker": "dataloader_num_workers",
    "shuffle": lambda value: {} if value else {"train_sampling_strategy": "sequential"},
    "show_progress": lambda value: {} if value else {"disable_tqdm": True},
    "log_wandb": lambda value: {"report_to": "wandb"} if value else {},
    "model": _model,
    "dataset": lambda value: {},
    "data_path": lambda value: {},
    "USER_ID_FIELD": lambda value: {"--user_column": str(value)},
    "ITEM_ID_FIELD": lambda value: {"--item_column": str(value)},
    "TIME_FIELD": lambda value: {"--time_column": str(value)},
    "field_separator": _delimiter,
    "user_inter_num_interval": _numbers("--min_user_events", "--max_user_events"),
    "item_inter_num_interval": _numbers("--min_item_events"),
    # The spellings of RecBole before 1.0.
    "min_user_inter_num": lambda value: _numbers("--min_user_events")(f"[{value or 0},inf)"),
    "min_item_inter_num": lambda value: _numbers("--min_item_events")(f"[{value or 0},inf)"),
    "max_user_inter_num": lambda value: _numbers("--min_user_events", "--max_user_events")(f"[0,{value or 'inf'}]"),
    "max_item_inter_num": lambda value: _numbers("--min_item_events")(f"[0,{value or 'inf'}]"),
    "val_interval": _min_rating,
    "rm_dup_inter": lambda value: (
        {"--duplicates": "drop"} if value == "first" else {} if value is None else "--duplicates drop keeps the first"
    ),
    "eval_args": _split,
    "stopping_step": "early_stopping_patience",
    **_left_out("--eval_steps and --save_steps are numbers or shares of steps, not of epochs", "eval_step"),
    **_left_out("the metric decides it", "valid_metric_bigger"),
    **_left_out("always HR and NDCG at 1 to 100, and MRR", "metrics topk metric_decimal_place loss_decimal_place"),
    **_left_out("CUDA_VISIBLE_DEVICES chooses devices, accelerate launch processes", "gpu_id nproc world_size offset "
                "ip port local_rank device single_spec"),
    **_left_out("the seed is always set; --full_determinism true chooses kernels too", "reproducibility"),
    **_left_out("weights are float32; --bf16 true computes in half precision", "weight_precision enable_scaler"),
    **_left_out("train writes to --output_dir, prepare to --output", "checkpoint_dir save_dataset dataset_save_path "
                "save_dataloaders dataloaders_save_path"),
    **_left_out("set WANDB_PROJECT", "wandb_project"),
    **_left_out("settings of RecBole's logs", "state progress_bar_rich config_file"),
    **_left_out("the data collator masks items and draws negatives", "transform train_neg_sample_args MASK_ITEM_SEQ "
                "POS_ITEMS NEG_ITEMS MASK_INDEX"),
    **_left_out("BERT4Rec reads no columns of sequences", "seq_separator"),
    **_left_out("prepare reads the columns that its options name, such as --event_columns", "load_col unload_col "
                "unused_col additional_feat_suffix"),
    **_left_out("--rating_column is the column that val_interval names", "RATING_FIELD"),
    **_left_out("prepare always filters users and items together", "filter_inter_by_user_or_item"),
    **_left_out("prepare splits the log itself", "benchmark_filename"),
    **_left_out("names inside RecBole's batches", "NEG_PREFIX LABEL_FIELD ITEM_LIST_LENGTH_FIELD LIST_SUFFIX "
                "POSITION_FIELD"),
    **_left_out("BERT4Rec reads item ids only", "seq_len threshold numerical_features alias_of_user_id "
                "alias_of_item_id alias_of_entity_id alias_of_relation_id preload_weight preload_weight_path "
                "normalize_field normalize_all discretization require_pow reg_weight embedding_size"),
    **_left_out("settings of knowledge graphs and paths, not of BERT4Rec", "HEAD_ENTITY_ID_FIELD TAIL_ENTITY_ID_FIELD "
                "RELATION_ID_FIELD ENTITY_ID_FIELD ui_relation kg_reverse_r entity_kg_num_interval "
                "relation_kg_num_interval path_hop_length MAX_PATHS_PER_USER context_length metapaths "
                "path_sample_args tokenizer"),
}  # fmt: skip
# RecBole's defaults of model, objective and columns.
DEFAULTS: dict[str, Any] = {
    "n_layers": 2, "n_heads": 2, "hidden_size": 64, "inner_size": 256, "hidden_dropout_prob": 0.2,
    "attn_dropout_prob": 0.2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02,
    "mask_ratio": 0.2, "ft_ratio": 0.5, "loss_type": "CE", "MAX_ITEM_LIST_LENGTH": 50, "repeatable": True,
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp",
}  # fmt: skip
