"""Checkpoints of RecBole's and hopwise's BERT4Rec, in and out, and their settings as recipes."""

import copyreg
import json
import logging
import math
import os
import pickle
import re
import shlex
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID, Bert4RecConfig
from .metrics import ranking_metrics
from .model_card import write_model_card
from .modeling_bert4rec import SPECIAL_TOKEN_LOGIT, Bert4RecForMaskedItemPrediction
from .runs import load_model
from .tokenization_bert4rec import Bert4RecTokenizer

logger = logging.getLogger(__name__)

# Their names of layers, and ours.
LAYER_NAMES = {
    "multi_head_attention.query": "attention.query",
    "multi_head_attention.key": "attention.key",
    "multi_head_attention.value": "attention.value",
    "multi_head_attention.dense": "attention.output",
    "multi_head_attention.LayerNorm": "attention_norm",
    "feed_forward.dense_1": "feed_forward.inner",
    "feed_forward.dense_2": "feed_forward.outer",
    "feed_forward.LayerNorm": "feed_forward_norm",
}
OTHER_NAMES = {"LayerNorm": "model.embeddings.norm", "output_ffn": "head.dense", "output_ln": "head.norm"}
ITEMS, POSITIONS, BIAS = "item_embedding.weight", "position_embedding.weight", "output_bias"
# Their settings, and our fields.
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
# Settings that leave rows of the log out, and what they are if they do not.
FILTERS = {
    "user_inter_num_interval": "[0,inf)", "item_inter_num_interval": "[0,inf)", "val_interval": None,
    "rm_dup_inter": None, "benchmark_filename": None,
}  # fmt: skip
ITEM_LOSSES = {"CE": "softmax", "BPR": "bpr"}
# What their architecture is in our configuration.
ARCHITECTURE = {
    "position_embedding_type": "learned_from_start", "normalization": "post", "gated_feed_forward": False,
    "prediction_head": True, "num_transitions": 0, "repeat_weight": 0.0,
}  # fmt: skip


def convert_from_recbole(
    checkpoint: str | os.PathLike,
    items: str | os.PathLike | Sequence[str],
    output: str | os.PathLike,
    *,
    drop_oldest_item: bool = True,
    titles: Mapping[Any, str] | None = None,
) -> Bert4RecForMaskedItemPrediction:
    """A model folder whose scores are those of a checkpoint of RecBole 1.0 to 1.2 or hopwise.

    The pickle in a checkpoint is read by an unpickler that runs nothing; see `read_pickle`.

    Args:
        checkpoint: The .pth file that their trainer saved.
        items: The raw item ids, which a checkpoint lacks, in the order of their internal ids, from 1: a sequence;
            or a file: their saved dataset (.pth), an atomic file (.inter), JSON (a list), or text, one id a line.
        output: The model folder, which must not exist or be empty.
        drop_oldest_item: As RecBole 1.2 and hopwise do, leave out a history's oldest item before the [MASK] is
            appended, although there may be room. False: scores of histories shorter than the window differ from
            theirs. Their older layout never drops it.
        titles: By raw id.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If a file is not what it should be, holds code, or the number of items is another.
    """
    output = Path(output).resolve()  # a link to an empty folder is that folder
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already and not an empty folder; choose another --output")
    state, settings = read_checkpoint(checkpoint)
    has_head = BIAS in state
    filters = [name for name, none in FILTERS.items() if settings.get(name, none) not in (None, none)]
    if filters and str(items).endswith(".inter"):
        raise ValueError(
            f"{checkpoint} was trained with {', '.join(filters)}, by which internal ids come in another order than in "
            f"one file: {items} does not tell it; give RecBole's saved dataset (save_dataset: True)"
        )
    raw_ids = read_items(items, str(settings.get("ITEM_ID_FIELD") or "item_id"))
    num_items = state[ITEMS].shape[0] - 2  # without [PAD] and [MASK]
    if len(raw_ids) != num_items:
        raise ValueError(
            f"{checkpoint} has {num_items:,} items, {_name(items)} has {len(raw_ids):,}: give the items of the log as "
            "it was trained on, after its filters; RecBole's saved dataset (save_dataset: True) has them"
        )
    num_positions = state[POSITIONS].shape[0]
    tokenizer = Bert4RecTokenizer.from_items(
        raw_ids,
        titles=titles,
        model_max_length=num_positions,
        sort=False,
        drop_oldest_item=has_head and drop_oldest_item,
    )
    try:
        config = Bert4RecConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=num_positions,
            item_loss=ITEM_LOSSES[settings["loss_type"]],
            pad_in_softmax=True,
            **ARCHITECTURE | {"prediction_head": has_head},
            **{ours: settings[theirs] for theirs, ours in SETTINGS.items()},
        )
        model = Bert4RecForMaskedItemPrediction(config)
        model.load_state_dict(_our_state(state, len(tokenizer)))
    except Exception as error:  # of settings that are no numbers, and of weights of another shape
        raise ValueError(f"{checkpoint} has settings or weights that make no BERT4Rec: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / "new"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_model_card(folder)
        if output.exists():
            output.rmdir()  # Windows moves nothing over a folder
        os.replace(folder, output)
    return model.eval()


def convert_to_recbole(model: str | os.PathLike, output: str | os.PathLike) -> None:
    """A file that RecBole 1.2 and hopwise take: `load_state_dict(torch.load(file)["state_dict"])`.

    It has "state_dict"; "config", the settings that their model must be made with; and "item_id", the raw ids in the
    order of their internal ids, [PAD] first.

    Args:
        model: A folder or Hub id of a model with the paper's architecture: positions learned from the start,
            post-normalisation, prediction head.
        output: The file; it must not exist.

    Raises:
        ValueError: If the architecture is not theirs.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} is there already; choose another --output")
    ours = load_model(model)
    config, tokenizer = ours.config, Bert4RecTokenizer.from_pretrained(model)
    architecture = ARCHITECTURE | {"tie_word_embeddings": True}
    wrong = [
        f"{name}={getattr(config, name)!r}" for name, value in architecture.items() if getattr(config, name) != value
    ]
    if wrong:
        raise ValueError(
            f"RecBole's BERT4Rec has {', '.join(f'{name}={value!r}' for name, value in architecture.items())}; {model} "
            f"has {', '.join(wrong)}, which cannot be converted"
        )
    if not tokenizer.drop_oldest_item:
        logger.warning(
            "RecBole leaves out the oldest item of every history: its scores of histories that are shorter than the "
            "window will differ from those of %s",
            model,
        )
    state = ours.state_dict()
    table, bias = state["model.embeddings.item_embeddings.weight"], state["decoder.bias"].clone()
    if not config.pad_in_softmax:
        bias[PAD_TOKEN_ID] = SPECIAL_TOKEN_LOGIT
    # [PAD], the items, [MASK]; there is no unknown item.
    rows = torch.tensor([PAD_TOKEN_ID, *range(FIRST_ITEM_ID, len(tokenizer)), MASK_TOKEN_ID])
    theirs = {
        ITEMS: table[rows],
        POSITIONS: state["model.embeddings.position_embeddings.weight"],
        BIAS: bias[rows[:-1]],
    }
    theirs |= {name: state[_our_name(name)] for name in _their_names(config.num_hidden_layers)}
    settings = {name: getattr(config, field) for name, field in SETTINGS.items()}
    loss_type = {"bpr": "BPR"}.get(config.item_loss, "CE")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        file = Path(temporary) / output.name
        content = {
            "state_dict": {name: value.contiguous() for name, value in theirs.items()},
            "config": settings | {"loss_type": loss_type, "MAX_ITEM_LIST_LENGTH": config.max_position_embeddings},
            "item_id": ["[PAD]", *tokenizer.items],
        }
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise OSError(f"cannot write {output}: {error}") from error
        os.replace(file, output)


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and settings of a RecBole or hopwise BERT4Rec checkpoint.

    Raises:
        ValueError: If it is none.
    """
    content = read_pickle(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    settings = getattr(content.get("config") if isinstance(content, dict) else None, "state", None)
    settings = settings.get("final_config_dict") if isinstance(settings, dict) else None
    if not isinstance(state, dict) or not isinstance(settings, dict):
        raise ValueError(f"{path} is no checkpoint of RecBole or hopwise: it has no state_dict with a Config beside it")
    if settings.get("model") != "BERT4Rec":
        raise ValueError(f"{path} holds the model {settings.get('model')!r}; expected BERT4Rec")
    missing = [name for name in [*SETTINGS, "loss_type"] if name not in settings]
    if missing:
        raise ValueError(f"the settings in {path} lack {', '.join(missing)}")
    sizes = [settings[name] for name in ("n_layers", "n_heads", "hidden_size", "inner_size")]
    if not all(type(size) is int and 0 < size < 2**20 for size in sizes) or settings["n_layers"] > len(state):
        raise ValueError(f"n_layers, n_heads, hidden_size and inner_size in {path} must be sizes; got {sizes}")
    if str(settings["loss_type"]) not in ITEM_LOSSES:
        raise ValueError(f"loss_type in {path} must be one of {', '.join(ITEM_LOSSES)}; got {settings['loss_type']!r}")
    expected = {ITEMS, POSITIONS, *_their_names(settings["n_layers"])}
    if BIAS in state:
        expected.add(BIAS)
    else:  # the older layout, without a head
        expected -= {name for name in expected if name.startswith("output_")}
    if state.keys() != expected or not all(isinstance(value, torch.Tensor) for value in state.values()):
        odd = sorted(map(str, state.keys() ^ expected))
        raise ValueError(f"{path} is no BERT4Rec that is known here: its weights differ in {', '.join(odd[:5])}")
    if state[ITEMS].dim() != 2 or state[POSITIONS].dim() != 2:
        raise ValueError(f"the tables in {path} must have two dimensions")
    if state[ITEMS].shape[1] != settings["hidden_size"]:
        raise ValueError(f"hidden_size in {path} is {settings['hidden_size']}, its items have {state[ITEMS].shape[1]}")
    return state, settings


def read_items(items: str | os.PathLike | Sequence[str], item_column: str = "item_id") -> list[str]:
    """Raw item ids in the order of the internal ids, from 1; see `convert_from_recbole`.

    Args:
        items: As there; or the file that `convert_to_recbole` wrote.
        item_column: Of an atomic file.

    Raises:
        ValueError: If the file has none.
    """
    if not isinstance(items, (str, os.PathLike)):
        raw_ids = list(items)
    elif Path(items).suffix == ".pth":
        content = read_pickle(items)
        if isinstance(content, dict) and isinstance(content.get("item_id"), list):
            return content["item_id"][1:]
        tables = getattr(content, "state", None)
        tables = tables if isinstance(tables, dict) else {}
        tokens = tables.get("field2id_token")
        if not isinstance(tokens, dict):
            raise ValueError(f"{items} is no dataset that RecBole or hopwise saved: it has no field2id_token")
        try:
            fields = {_strings(field)[0]: stored for field, stored in tokens.items()}
            raw_ids = _strings(fields[tables.get("iid_field", "item_id")])
        except Exception as error:  # a damaged file can hold anything
            raise ValueError(f"{items} has no item ids that can be read: {error}") from error
    else:
        try:
            if Path(items).suffix == ".inter":
                raw_ids = _items_of_atomic_file(Path(items), item_column)
            elif Path(items).suffix == ".json":
                raw_ids = json.loads(Path(items).read_text("utf-8-sig"))
            else:
                raw_ids = [line for line in Path(items).read_text("utf-8-sig").split("\n") if line]
        except (json.JSONDecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {items}: {error}") from error
        if not isinstance(raw_ids, list):
            raise ValueError(f"{items} must hold a list of item ids; got {type(raw_ids).__name__}")
    return raw_ids[1:] if raw_ids[:1] == ["[PAD]"] else raw_ids


def _items_of_atomic_file(path: Path, item_column: str) -> list[str]:
    """In the order of their first appearance, which is that of their internal ids."""
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        names = [name.partition(":")[0] for name in header]
        if item_column not in names:
            raise ValueError(f"{path} has no column {item_column}:token; its header is {' '.join(header)!r}")
        rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
        short = next((number for number, row in enumerate(rows, start=2) if len(row) < len(header)), None)
        if short is not None:
            raise ValueError(f"line {short} of {path} has fewer columns than its header")
        return list(dict.fromkeys(row[names.index(item_column)] for row in rows))


def convert_config(path: str | os.PathLike) -> dict[str, Any]:
    """The recipe for `bert4rec train --config` that trains what a YAML file of RecBole or hopwise does.

    Of model and objective, what the file lacks is as RecBole 1.2 has it; of the training loop, as we have it.

    Raises:
        ValueError: If the file is none, or is for another model.
    """
    return _converted(path)[0]


def config_recipe(path: str | os.PathLike) -> str:
    """`convert_config` as YAML, with comments: how to prepare the log, what differs, and what was not taken over.

    Raises:
        ValueError: As `convert_config`.
    """
    recipe, prepare, remarks, left_out = _converted(path)
    comments = [
        f"From {Path(path).name}, settings of RecBole or hopwise.",
        f"The log, first: {shlex.join(prepare)}",
        "Then: bert4rec train --config RECIPE.yaml --data DATA --output_dir MODEL",
        *(["What is different:", *(f"  {remark}" for remark in remarks)] if remarks else []),
        *(["Not taken over:"] if left_out else []),
        *(f"  {', '.join(keys)}: {reason}" for reason, keys in left_out.items()),
    ]
    lines = [f"# {' '.join(comment.splitlines())}\n" for comment in comments]
    return "".join(lines) + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _converted(path: str | os.PathLike) -> tuple[dict[str, Any], list[str], list[str], dict[str, list[str]]]:
    """Recipe, prepare command, remarks, and the keys that were left out by reason."""
    try:
        given = yaml.load(Path(path).read_text("utf-8"), Loader=_Loader)
    except (RecursionError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path} as YAML: {error}") from error
    if not isinstance(given, dict | None):
        raise ValueError(f"{path} must be a mapping of settings to values; got {type(given).__name__}")
    given = {key: value for key, value in (given or {}).items() if value is not None or key not in DEFAULTS}
    settings = DEFAULTS | given
    recipe: dict[str, Any] = ARCHITECTURE | {"item_initialization": "random"}
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
        raise ValueError(f"{path} has no settings of a model: {error}") from error
    if most > 0:
        recipe["max_predictions"] = most
    missing = [key for key in DEFAULTS if key not in given and key in RECIPE and not key.endswith("_FIELD")]
    if missing:
        remarks.append(f"not in the file, so RecBole's defaults: {', '.join(missing)}")
    name = settings.get("dataset")
    log = "LOG.inter" if name is None else Path(str(settings.get("data_path") or "dataset"), str(name), f"{name}.inter")
    words = ["bert4rec", "prepare", str(log), "--output", "DATA"]
    return recipe, words + [str(word) for option in prepare.items() for word in option], remarks, left_out


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as theirs does; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unknown(value: Any) -> str:
    return "unknown here and no setting of BERT4Rec in RecBole or hopwise"


def _left_out(reason: str, keys: str) -> dict[str, Callable[[Any], str]]:
    return dict.fromkeys(keys.split(), lambda value: reason)


def _seen_items(value: Any) -> dict[str, Any]:
    remark = "their BERT4Rec runs with True only and may recommend seen items"
    return {"filter_seen_items": not value} | ({} if value else {"#": remark})


def _last_item_ratio(value: Any) -> dict[str, Any]:
    return {"last_item_ratio": value} | ({"#": "a share of the rows; theirs is of the batches"} if value else {})


def _item_loss(value: Any) -> dict[str, Any]:
    if str(value) not in ITEM_LOSSES:
        raise ValueError(f"must be one of {', '.join(ITEM_LOSSES)}; got {value!r}")
    if value == "CE":
        return {"item_loss": ITEM_LOSSES[value]}
    remark = "all labels of a batch share its negatives; more of them, say 256, give the same mean with less noise"
    return {"item_loss": ITEM_LOSSES[value], "num_negatives": 1, "#": remark}


def _optimizer(value: Any) -> dict[str, Any] | str:
    names = {"adam": "adamw_torch", "adamw": "adamw_torch"} | {name: name for name in ("sgd", "adagrad", "rmsprop")}
    name = names.get(str(value).lower())
    return {"optim": name} if name else f"no --optim is {value}"


def _weight_decay(value: Any) -> dict[str, Any]:
    remark = "AdamW shrinks the weights themselves, items, biases, norms excepted; their Adam adds it to all gradients"
    return {"weight_decay": value} | ({"#": remark} if value else {})


def _clipping(value: Any) -> dict[str, Any]:
    if value is None:
        return {"max_grad_norm": 0.0}
    if not isinstance(value, dict) or "max_norm" not in value:
        raise ValueError(f"must be a mapping with max_norm; got {value!r}")
    remark = {"#": "the norm is always the 2-norm"} if value.get("norm_type", 2) != 2 else {}
    return {"max_grad_norm": value["max_norm"]} | remark


def _best_metric(value: Any) -> dict[str, Any] | str:
    """With one target, recall and hit are the same, precision orders alike, and MAP is MRR."""
    name, _, cutoff = str(value).lower().partition("@")
    if name in ("mrr", "map"):
        return {"metric_for_best_model": "MRR", "#": f"MRR is that of the whole ranking, not of the first {cutoff}"}
    ours = {"ndcg": "NDCG", "hit": "HR", "recall": "HR", "precision": "HR"}.get(name, name)
    if f"{ours}@{cutoff}" not in ranking_metrics(np.ones(1)):
        return f"no metric here is {value}; best is the highest --metric_for_best_model, NDCG@10 if left out"
    return {"metric_for_best_model": f"{ours}@{cutoff}"}


def _interval(value: Any) -> tuple[str, float, float] | None:
    """Left bracket and ends of "[5,inf)"; None if it is several intervals."""
    number = r"\s*([-+.\w]+)\s*"
    match = re.fullmatch(rf"([\[(]){number},{number}[\])]", str(value).strip())
    try:
        return (match[1], float(match[2]), float(match[3])) if match else None
    except ValueError:
        return None


def _least_number(option: str) -> Callable[[Any], dict[str, Any] | str]:
    def rule(value: Any) -> dict[str, Any] | str:
        if value is None:
            return {}
        interval = _interval(value)
        if interval is None or not math.isfinite(interval[1]):
            return f"{value} is no interval with a least number; see bert4rec prepare {option}"
        bracket, low, high = interval
        least = math.ceil(low) if bracket == "[" else math.floor(low) + 1
        remark = {"#": f"prepare has no upper limit of {high:g}"} if math.isfinite(high) else {}
        return ({option: least} if least > 1 else {}) | remark

    return rule


def _min_rating(value: Any) -> dict[str, Any] | str:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"must be a mapping of fields to intervals; got {value!r}")
    if not value:
        return {}
    field, interval = next(iter(value.items()))
    ends = _interval(interval)
    if len(value) > 1 or ends is None or ends[0] != "[" or ends[2] != math.inf:
        return f"prepare filters by one column at least N (--rating_column, --min_rating); filter the log for {value}"
    return {"--rating_column": f"{field}:float", "--min_rating": f"{ends[1]:g}"}


def _split(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping; got {value!r}")
    split, modes = value.get("split") or {"LS": "valid_and_test"}, value.get("mode") or "full"
    if not isinstance(split, dict) or "LS" not in split:
        return f"prepare splits leave-one-out or at a time (--split temporal), not by {split}"
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


# What a setting of theirs is to `bert4rec train`: an option, or a function of its value. That returns options, with
# --those of `bert4rec prepare`, and a remark ("#"); or a reason why there are none.
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
        "#": "rows here are users, theirs are prefixes of users, many more: an epoch has fewer steps; --max_steps sets "
        "their number, a smaller batch gives more",
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
    "USER_ID_FIELD": lambda value: {"--user_column": f"{value}:token"},
    "ITEM_ID_FIELD": lambda value: {"--item_column": f"{value}:token"},
    "TIME_FIELD": lambda value: {"--time_column": f"{value}:float"},
    "user_inter_num_interval": _least_number("--min_user_events"),
    "item_inter_num_interval": _least_number("--min_item_events"),
    "val_interval": _min_rating,
    "rm_dup_inter": lambda value: (
        {"--duplicates": "drop"} if value == "first" else {} if value is None else "prepare keeps the first (drop) only"
    ),
    "eval_args": _split,
    "stopping_step": "early_stopping_patience",
    **_left_out("--eval_steps and --save_steps count steps or are a share of all", "eval_step"),
    **_left_out("follows from the metric", "valid_metric_bigger"),
    **_left_out("always HR and NDCG at 1 to 100, and MRR", "metrics topk metric_decimal_place loss_decimal_place"),
    **_left_out("CUDA_VISIBLE_DEVICES chooses devices, accelerate launch processes", "gpu_id nproc world_size offset "
                "ip port local_rank device single_spec"),
    **_left_out("the seed is always set; --full_determinism true chooses kernels too", "reproducibility"),
    **_left_out("weights are float32; --bf16 true computes in half precision", "weight_precision enable_scaler"),
    **_left_out("train writes to --output_dir, prepare to --output", "checkpoint_dir save_dataset dataset_save_path "
                "save_dataloaders dataloaders_save_path"),
    **_left_out("set WANDB_PROJECT", "wandb_project"),
    **_left_out("of their logs", "state progress_bar_rich config_file"),
    **_left_out("masking and its negatives are the data collator's", "transform train_neg_sample_args MASK_ITEM_SEQ "
                "POS_ITEMS NEG_ITEMS MASK_INDEX"),
    **_left_out("prepare finds it out", "field_separator seq_separator"),
    **_left_out("prepare reads the columns it is told, --event_columns among them", "load_col unload_col unused_col "
                "additional_feat_suffix"),
    **_left_out("prepare is told the column that val_interval names", "RATING_FIELD"),
    **_left_out("always so", "filter_inter_by_user_or_item"),
    **_left_out("prepare splits a log itself", "benchmark_filename"),
    **_left_out("names inside their batches", "NEG_PREFIX LABEL_FIELD ITEM_LIST_LENGTH_FIELD LIST_SUFFIX "
                "POSITION_FIELD"),
    **_left_out("BERT4Rec reads item ids only", "seq_len threshold numerical_features alias_of_user_id "
                "alias_of_item_id alias_of_entity_id alias_of_relation_id preload_weight preload_weight_path "
                "normalize_field normalize_all discretization require_pow reg_weight embedding_size"),
    **_left_out("of knowledge graphs and paths, not of BERT4Rec", "HEAD_ENTITY_ID_FIELD TAIL_ENTITY_ID_FIELD "
                "RELATION_ID_FIELD ENTITY_ID_FIELD ui_relation kg_reverse_r entity_kg_num_interval "
                "relation_kg_num_interval path_hop_length MAX_PATHS_PER_USER context_length metapaths "
                "path_sample_args tokenizer"),
}  # fmt: skip
# Theirs, of model, objective and columns.
DEFAULTS: dict[str, Any] = {
    "n_layers": 2, "n_heads": 2, "hidden_size": 64, "inner_size": 256, "hidden_dropout_prob": 0.2,
    "attn_dropout_prob": 0.2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02,
    "mask_ratio": 0.2, "ft_ratio": 0.5, "loss_type": "CE", "MAX_ITEM_LIST_LENGTH": 50, "repeatable": True,
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp",
}  # fmt: skip


def _name(items: Any) -> str:
    return str(items) if isinstance(items, (str, os.PathLike)) else "the given list"


def _their_names(num_layers: int) -> list[str]:
    """All but the tables."""
    layers = [f"trm_encoder.layer.{number}.{name}" for number in range(num_layers) for name in LAYER_NAMES]
    return [f"{name}.{part}" for name in [*OTHER_NAMES, *layers] for part in ("weight", "bias")]


def _our_name(name: str) -> str:
    name, part = name.rsplit(".", 1)
    if name in OTHER_NAMES:
        return f"{OTHER_NAMES[name]}.{part}"
    _, _, number, name = name.split(".", 3)
    return f"model.layers.{number}.{LAYER_NAMES[name]}.{part}"


def _our_state(state: Mapping[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """Rows [PAD], items, [MASK] -> [PAD], [MASK], [UNK], items."""
    theirs = state[ITEMS].float()
    table = torch.cat((theirs[:1], theirs[-1:], torch.zeros_like(theirs[:1]), theirs[1:-1]))
    bias = torch.zeros(vocab_size)
    if BIAS in state:
        bias[PAD_TOKEN_ID], bias[FIRST_ITEM_ID:] = state[BIAS][0], state[BIAS][1:]
    ours = {_our_name(name): value for name, value in state.items() if name not in (ITEMS, POSITIONS, BIAS)}
    return ours | {
        "model.embeddings.item_embeddings.weight": table,
        "model.embeddings.position_embeddings.weight": state[POSITIONS],
        "decoder.weight": table,
        "decoder.bias": bias,
    }


class Inert:
    """What stands in place of any object but a container, number or string: what the pickle says of it."""

    args: tuple = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.args = args
        return inert

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What stands in their files. None of it is imported.
KNOWN_MODULES = ("recbole", "hopwise", "pandas")
KNOWN_NAMES = {
    ("yaml.loader", "FullLoader"), ("logging", "getLogger"), ("builtins", "slice"), ("torch", "device"),
    ("torch", "float32"), ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_tensor_v2"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
}  # fmt: skip
NUMPY_MODULES, NUMPY_NAMES = ("numpy.core.multiarray", "numpy._core.multiarray"), ("scalar", "_reconstruct")
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64,
}  # fmt: skip


class InertUnpickler(pickle.Unpickler):
    """Builds containers, numbers and strings; a known name is `Inert`, any other an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (
            module.partition(".")[0] in KNOWN_MODULES
            or (module, name) in KNOWN_NAMES
            or (module == "torch" and name in STORAGES)
            or (module in NUMPY_MODULES and name in NUMPY_NAMES)
        ):
            return type(name, (Inert,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of RecBole or hopwise needs")

    def persistent_load(self, identifier: Any) -> Any:
        if not (isinstance(identifier, tuple) and identifier[:1] == ("storage",)):
            raise pickle.UnpicklingError("it has a persistent object that is no tensor's storage")
        return Inert(identifier)


def read_pickle(path: str | os.PathLike) -> Any:
    """What `torch.save` or `pickle.dump` wrote, without running or importing anything that stands in it.

    `torch.load(weights_only=True)` cannot read pickle protocol 4, which RecBole and hopwise write. Here tensors in a
    "state_dict" are read; all other objects of names that stand in their files are `Inert`; other names are an error.

    Raises:
        ValueError: If it is no such file, is damaged, or names anything else.
    """
    copyreg.clear_extension_cache()  # whose entries would not be looked up by `find_class`
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                if file.read(4) == b"PK\3\4":
                    raise pickle.UnpicklingError("it is not whole; fetch it again")
                file.seek(0)
                return InertUnpickler(file).load()
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = name.removesuffix("data.pkl")
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise pickle.UnpicklingError("it is compressed, which torch.save does not do")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise pickle.UnpicklingError("it was saved on a machine of another byte order")
            with archive.open(name) as file:
                content = InertUnpickler(file).load()
            if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
                state = content["state_dict"].items()
                content["state_dict"] = {name: _tensor(value, archive, folder) for name, value in state}
            return content
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"cannot read {path} as a checkpoint of RecBole or hopwise: {error}") from error


def _tensor(stored: Any, archive: zipfile.ZipFile, folder: str) -> torch.Tensor:
    """Of the arguments of `torch._utils._rebuild_tensor_v2`, whose storage is a persistent id."""
    storage, offset, size, stride, *_ = stored.args
    _, dtype, key, *_ = storage.args[0]
    if len(size) > 2:
        raise pickle.UnpicklingError("a tensor in it has more than two dimensions")
    values = torch.frombuffer(bytearray(archive.read(f"{folder}data/{int(key)}")), dtype=STORAGES[dtype.__name__])
    number = math.prod(size)
    contiguous = tuple(math.prod(size[place + 1 :]) for place in range(len(size)))
    if tuple(stride) != contiguous or not 0 <= offset <= offset + number <= len(values):
        raise pickle.UnpicklingError("a tensor in it is not what torch.save writes of weights")
    return values[offset : offset + number].reshape(size).clone()


def _strings(stored: Any) -> list[str]:
    """Of a string, a list, or of numpy's strings and arrays of strings as they are pickled."""
    if isinstance(stored, list):
        return [string for value in stored for string in _strings(value)]
    if not isinstance(stored, Inert):
        return [str(stored)]
    if type(stored).__name__ == "scalar":
        (dtype, data), number = stored.args, 1
    else:
        _, (number,), dtype, _, data = stored.state
    if dtype.args[0].startswith("U") and dtype.state[1] == "<" and number >= 0:
        return np.frombuffer(data, f"<U{int(dtype.args[0][1:])}", count=number).tolist()
    if not isinstance(data, list) or number < 0:
        raise ValueError(f"an array of type {dtype.args[0]}")
    return _strings(data)
