"""Converting checkpoints of RecBole's and hopwise's BERT4Rec to model folders, and back."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.duckdb_tables import LIBRARY_ERRORS, SOURCE_ROW
from ..data.logs import open_log, read_titles
from ..files import files_beside, finished, folder_beside
from ..hub.load import load_model
from ..hub.model_card import write_model_card
from ..model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID, Bert4RecConfig
from ..model.modeling_bert4rec import SPECIAL_TOKEN_LOGIT, Bert4RecForMaskedItemPrediction
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .recbole_settings import ARCHITECTURE, FILTERS, ITEM_LOSSES, SETTINGS
from .safe_pickle import read_pickle, strings

logger = logging.getLogger(__name__)

# RecBole's names of the parts of a layer, and the names here.
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


def convert_from_recbole(
    checkpoint: str | os.PathLike,
    items: str | os.PathLike | Sequence[str],
    output: str | os.PathLike,
    *,
    drop_oldest_item: bool = True,
    titles: Mapping[Any, str] | str | os.PathLike | None = None,
) -> Bert4RecForMaskedItemPrediction:
    """Convert a checkpoint of RecBole 1.0 to 1.2 or hopwise to a model folder. The scores stay the same.

    The pickle in a checkpoint is read by an unpickler that executes nothing; see `read_pickle`.

    Args:
        checkpoint: The .pth file that the trainer of RecBole or hopwise saved.
        items: The raw item ids, which a checkpoint lacks, in the order of RecBole's internal ids, starting with that of
            id 1: a sequence, or a file. A file is a dataset that RecBole saved (.pth), an atomic file (.inter), a JSON
            list, or text with one id per line.
        output: The model folder. It must be missing or empty.
        drop_oldest_item: Whether the oldest item of a history is dropped before the [MASK] is appended, even if there
            is room, as in RecBole 1.2 and hopwise. False: the scores of histories shorter than the window differ from
            theirs. Has no effect on checkpoints of the older layout without a prediction head, which never drops it.
        titles: Titles by raw item id, or a file of them with the columns item_id and title.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If a file is damaged, of another kind or holds code, or if the number of items does not match.
    """
    output = Path(output).resolve()  # follows a link to an empty folder
    if output.exists() and (not output.is_dir() or finished(output)):
        raise ValueError(f"{output} exists and is not an empty folder; choose another --output")
    state, settings = read_checkpoint(checkpoint)
    has_head = BIAS in state
    filters = [name for name, none in FILTERS.items() if settings.get(name, none) not in (None, none)]
    if filters and str(items).endswith(".inter"):
        raise ValueError(
            f"{checkpoint} was trained with {', '.join(filters)}, which change the order of the internal ids: {items} "
            "does not have that order; give RecBole's saved dataset (save_dataset: True)"
        )
    separator = settings.get("field_separator")
    raw_ids = read_items(
        items, str(settings.get("ITEM_ID_FIELD") or "item_id"), None if separator is None else str(separator)
    )
    num_items = state[ITEMS].shape[0] - 2  # without [PAD] and [MASK]
    if len(raw_ids) != num_items:
        raise ValueError(
            f"{checkpoint} has {num_items:,} items, {_name(items)} has {len(raw_ids):,}: give the items of the "
            "training log after its filters, for example RecBole's saved dataset (save_dataset: True)"
        )
    if isinstance(titles, str | os.PathLike):
        titles = read_titles(Path(titles), "item_id", raw_ids)
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
    except Exception as error:  # settings may be no numbers, and weights may have another shape
        raise ValueError(f"{checkpoint} has settings or weights that make no BERT4Rec: {error}") from error
    with folder_beside(output, last_file="config.json") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_model_card(folder)
    return model.eval()


def convert_to_recbole(model: str | os.PathLike, output: str | os.PathLike) -> None:
    """Write a file that RecBole 1.2 and hopwise load with `load_state_dict(torch.load(file)["state_dict"])`.

    The file is a mapping with the keys "state_dict"; "config", the settings that RecBole's model must be created with;
    and "item_id", the raw ids in the order of RecBole's internal ids, [PAD] first.

    Args:
        model: A folder or Hub id of a model with the paper's architecture: positions learned from the start,
            post-normalisation and a prediction head.
        output: The file to write. It must not exist.

    Raises:
        ValueError: If the model has another architecture, or the file exists.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another --output")
    ours = load_model(model)
    config, tokenizer = ours.config, Bert4RecTokenizer.from_pretrained(model)
    architecture = ARCHITECTURE
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
            "RecBole drops the oldest item of every history: for histories shorter than the window, its scores will "
            "differ from those of %s",
            model,
        )
    state = ours.state_dict()
    table, bias = state["model.embeddings.item_embeddings.weight"], state["item_bias.weight"].clone()
    if not config.pad_in_softmax:
        bias[PAD_TOKEN_ID] = SPECIAL_TOKEN_LOGIT
    # RecBole's table has [PAD], the items and [MASK]. It has no row for unknown items.
    rows = torch.tensor([PAD_TOKEN_ID, *range(FIRST_ITEM_ID, len(tokenizer)), MASK_TOKEN_ID])
    theirs = {
        ITEMS: table[rows],
        POSITIONS: state["model.embeddings.position_embeddings.weight"],
        BIAS: bias[rows[:-1]],
    }
    theirs |= {name: state[_our_name(name)] for name in _their_names(config.num_hidden_layers)}
    settings = {name: getattr(config, field) for name, field in SETTINGS.items()}
    loss_type = {"bpr": "BPR"}.get(config.item_loss, "CE")
    content = {
        "state_dict": {name: value.contiguous() for name, value in theirs.items()},
        "config": settings | {"loss_type": loss_type, "MAX_ITEM_LIST_LENGTH": config.max_position_embeddings},
        "item_id": ["[PAD]", *tokenizer.items],
    }
    # The file has its own name in the temporary folder, because torch.save writes the name into it.
    with files_beside(output.parent) as folder:
        try:
            torch.save(content, folder / output.name)
        except RuntimeError as error:
            raise OSError(f"cannot write {output}: {error}") from error


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the state dict and the settings of a BERT4Rec checkpoint of RecBole or hopwise.

    Raises:
        ValueError: If the file is not such a checkpoint.
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
    else:  # the older layout, without a prediction head
        expected -= {name for name in expected if name.startswith("output_")}
    if state.keys() != expected or not all(isinstance(value, torch.Tensor) for value in state.values()):
        odd = sorted(map(str, state.keys() ^ expected))
        raise ValueError(
            f"{path} is no BERT4Rec of a known layout: missing or unexpected weights are {', '.join(odd[:5])}"
        )
    if state[ITEMS].dim() != 2 or state[POSITIONS].dim() != 2:
        raise ValueError(
            f"the tables in {path} must have two dimensions; got {state[ITEMS].dim()} and {state[POSITIONS].dim()}"
        )
    if state[ITEMS].shape[1] != settings["hidden_size"]:
        raise ValueError(
            f"hidden_size in {path} is {settings['hidden_size']}, its item vectors have {state[ITEMS].shape[1]} values"
        )
    return state, settings


def read_items(
    items: str | os.PathLike | Sequence[str], item_column: str = "item_id", delimiter: str | None = None
) -> list[str]:
    """Read raw item ids in the order of RecBole's internal ids, starting with that of id 1.

    Args:
        items: A sequence or a file, as `convert_from_recbole` describes it; or a file that `convert_to_recbole` wrote.
        item_column: Column of the item ids in an atomic file.
        delimiter: Field separator of an atomic file. None: found in the header.

    Raises:
        ValueError: If the file has no item ids that can be read.
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
            fields = {strings(field)[0]: stored for field, stored in tokens.items()}
            raw_ids = strings(fields[tables.get("iid_field", "item_id")])
        except Exception as error:  # a damaged file can hold anything
            raise ValueError(f"{items} has no item ids that can be read: {error}") from error
    else:
        try:
            if Path(items).suffix == ".inter":
                raw_ids = _items_of_atomic_file(Path(items), item_column, delimiter)
            elif Path(items).suffix == ".json":
                raw_ids = json.loads(Path(items).read_text("utf-8-sig"))
            else:
                raw_ids = [line for line in Path(items).read_text("utf-8-sig").split("\n") if line]
        except (json.JSONDecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {items}: {error}") from error
        if not isinstance(raw_ids, list):
            raise ValueError(f"{items} must hold a list of item ids; got {type(raw_ids).__name__}")
    return raw_ids[1:] if raw_ids[:1] == ["[PAD]"] else raw_ids


def _items_of_atomic_file(path: Path, item_column: str, delimiter: str | None) -> list[str]:
    """The item ids in the order of their first appearance, which is the order of RecBole's internal ids."""
    log = open_log(path, delimiter=delimiter)
    if item_column not in log.columns:
        raise ValueError(f"{path} has no column {item_column}:token; its columns are {', '.join(log.columns)}")
    try:
        rows = log.table([item_column]).order_by(SOURCE_ROW).to_pyarrow()
    except LIBRARY_ERRORS as error:
        raise log.error(error) from error
    return [item for item in dict.fromkeys(rows[item_column].to_pylist()) if item is not None]


def _name(items: Any) -> str:
    return str(items) if isinstance(items, (str, os.PathLike)) else "the given list"


def _their_names(num_layers: int) -> list[str]:
    """RecBole's names of all weights except the tables."""
    layers = [f"trm_encoder.layer.{number}.{name}" for number in range(num_layers) for name in LAYER_NAMES]
    return [f"{name}.{part}" for name in [*OTHER_NAMES, *layers] for part in ("weight", "bias")]


def _our_name(name: str) -> str:
    name, part = name.rsplit(".", 1)
    if name in OTHER_NAMES:
        return f"{OTHER_NAMES[name]}.{part}"
    _, _, number, name = name.split(".", 3)
    return f"model.layers.{number}.{LAYER_NAMES[name]}.{part}"


def _our_state(state: Mapping[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """RecBole's state dict as one of this package: rows [PAD], items, [MASK] become [PAD], [MASK], [UNK], items."""
    theirs = state[ITEMS].float()
    table = torch.cat((theirs[:1], theirs[-1:], torch.zeros_like(theirs[:1]), theirs[1:-1]))
    bias = torch.zeros(vocab_size)
    if BIAS in state:
        bias[PAD_TOKEN_ID], bias[FIRST_ITEM_ID:] = state[BIAS][0], state[BIAS][1:]
    ours = {_our_name(name): value for name, value in state.items() if name not in (ITEMS, POSITIONS, BIAS)}
    return ours | {
        "model.embeddings.item_embeddings.weight": table,
        "model.embeddings.position_embeddings.weight": state[POSITIONS],
        "item_bias.weight": bias,
    }
