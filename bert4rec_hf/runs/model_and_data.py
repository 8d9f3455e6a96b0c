"""Where a run begins: a model, its tokenizer, and the histories in the model's token ids."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..data.histories import AnyHistories, Histories, read_prepared, stream_prepared
from ..data.item_tables import ITEM_TABLE_FILE, read_stored_table
from ..data.rows import ranking_rows
from ..defaults import default_architecture, default_start_with_mean, default_train_item_features
from ..evaluation.seen_targets import check_targets, with_period_of
from ..hub.load import load_model
from ..model.configuration_bert4rec import FIRST_ITEM_ID, Bert4RecConfig
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..training.arguments import Bert4RecTrainingArguments
from ..training.initialization import keep_conversion_scores, keep_transitions, start_from_cooccurrence, start_new_items
from ..training.item_feature_training import fit_item_projection

logger = logging.getLogger(__name__)

# A model, its tokenizer, the histories in its token ids, and the content of preparation.json.
ModelAndData = tuple[Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, AnyHistories, dict[str, Any]]


def model_and_data(
    data: str | os.PathLike,
    args: Bert4RecTrainingArguments,
    model_name_or_path: str | os.PathLike | None,
    architecture: Mapping[str, Any],
) -> ModelAndData:
    """The model before training, either new or to be trained further, with its data."""
    if model_name_or_path is None:
        model, tokenizer, histories, preparation = _new_model(data, args, dict(architecture))
    else:
        model, tokenizer, histories, preparation = _continued_model(data, args, model_name_or_path, dict(architecture))
    if model.config.num_transitions:
        # A model that is trained further gets the transitions of its new log.
        weight = model.config.transition_weight
        keep_transitions(model, histories, tokenizer.num_items, weight=weight, seed=args.seed)
    if model.config.num_event_types:
        keep_conversion_scores(model, histories, seed=args.seed)
    return model, tokenizer, histories, preparation


def read_histories(
    data: str | os.PathLike, streaming: bool, tokenizer: Bert4RecTokenizer | None = None
) -> tuple[AnyHistories, Bert4RecTokenizer, dict[str, Any]]:
    return stream_prepared(data, tokenizer) if streaming else read_prepared(data, tokenizer)


def _new_model(data: str | os.PathLike, args: Bert4RecTrainingArguments, architecture: dict[str, Any]) -> ModelAndData:
    histories, tokenizer, preparation = read_histories(data, args.streaming)
    given = {
        "max_position_embeddings": preparation["max_length"],
        "filter_seen_items": preparation["filter_seen_items"],
    } | architecture
    if tokenizer.event_types is not None:
        given |= {
            "num_event_types": len(tokenizer.event_types),
            "target_event_type_ids": tokenizer.target_event_type_ids,
        }
    num_events, num_items = histories.num_training_events(), tokenizer.num_items
    config = Bert4RecConfig(vocab_size=len(tokenizer), **default_architecture(num_events, num_items, given))
    model = Bert4RecForMaskedItemPrediction(config)
    _skip_random_numbers(config)
    if args.item_initialization == "cooccurrence":
        with_mean = default_start_with_mean(num_events, num_items)
        start_from_cooccurrence(model, histories, num_items, with_mean=with_mean, seed=args.seed)
    table = item_table(data)
    trains_features = tokenizer.item_features is not None and default_train_item_features(num_events, num_items)
    if trains_features and table is not None:
        fit_item_projection(model, tokenizer, read_stored_table(table).to_pydict())
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer, histories, preparation


def _skip_random_numbers(config: Bert4RecConfig) -> None:
    """Let a seed give the model that it gave when the numbers in benchmarks/results were measured.

    The model then had a decoder. Its weights were drawn here, and then tied to the item vectors. Remove this function
    when the numbers are measured again.
    """
    torch.nn.Linear(config.hidden_size, config.vocab_size)
    torch.empty(config.vocab_size, config.hidden_size).normal_()


def _continued_model(
    data: str | os.PathLike, args: Bert4RecTrainingArguments, folder: str | os.PathLike, architecture: dict[str, Any]
) -> ModelAndData:
    """A model that is trained further. The new items of the log are added to it."""
    model = load_model(folder)
    policy = architecture.pop("filter_seen_items", None)  # may change, since no weights depend on it
    if policy is not None:
        model.config.filter_seen_items = policy
    other = [f"{name}={value}" for name, value in architecture.items() if getattr(model.config, name) != value]
    if other:
        raise ValueError(
            f"a model that is trained further keeps its architecture; {folder} does not have {', '.join(other)}: leave "
            "these options out"
        )
    tokenizer = Bert4RecTokenizer.from_pretrained(folder)
    catalogue, old_items = Bert4RecTokenizer.from_pretrained(data), set(tokenizer.items)
    titles = dict(zip(catalogue.items, catalogue.titles or [], strict=False))
    items: Any = catalogue.items
    table = item_table(data, folder)
    if model.config.num_item_features and table is not None:
        # New items without events in the log keep the vectors of their features; see `start_new_items` for the others.
        columns = read_stored_table(table).to_pydict()
        known = dict(zip(columns["item_id"], range(len(columns["item_id"])), strict=True))
        places = [known.get(item) for item in catalogue.items]
        items = {
            name: [None if place is None else values[place] for place in places] for name, values in columns.items()
        } | {"item_id": catalogue.items}
    num_new = model.add_items(tokenizer, items, {item: title for item, title in titles.items() if title})
    tokenizer.item_features = catalogue.item_features or tokenizer.item_features
    tokenizer.set_counts(dict(zip(catalogue.items, catalogue.counts, strict=True)))
    if catalogue.event_types is not None:
        unknown = [name for name in catalogue.event_types if name not in (tokenizer.event_types or ())]
        if unknown:
            raise ValueError(
                f"{folder} does not know the event types {', '.join(unknown)} of {data}; it knows "
                f"{', '.join(tokenizer.event_types or ()) or 'none'}: train a new model, or leave these events out "
                "with --where"
            )
    histories, tokenizer, preparation = read_histories(data, args.streaming, tokenizer)
    if num_new:
        start_new_items(model, histories, tokenizer.num_items, num_new, seed=args.seed)
    if tokenizer.item_features is not None and table is not None:
        fit_item_projection(model, tokenizer, read_stored_table(table).to_pydict())
    has_validation = preparation["split"].get("validation")
    check_targets(folder, preparation, "validation" if has_validation else "test", is_trained_further=True)
    preparation = with_period_of(preparation, folder)
    if not old_items.intersection(catalogue.items):
        logger.warning("the catalogue of %s has none of the items of %s: all of them are new", folder, data)
    kept, asked = model.config.filter_seen_items, preparation["filter_seen_items"]
    if policy is None and kept != asked:
        logger.warning(
            "%s was prepared with filter_seen_items %s, but the model keeps its own, %s: --filter_seen_items %s "
            "changes the model", data, asked, kept, str(asked).lower(),
        )  # fmt: skip
    length = model.config.max_position_embeddings
    if length != preparation["max_length"]:
        logger.warning(
            "%s was prepared for length %d, but the model keeps its own, %d", data, preparation["max_length"], length
        )
    return model, tokenizer, histories, preparation


def rows_for(config: Bert4RecConfig, histories: Histories, tokenizer: Bert4RecTokenizer, part: str) -> Dataset:
    """The rows of `ranking_rows` as a model ranks them: with its policy on seen items, and its length."""
    return ranking_rows(
        histories,
        tokenizer,
        part,
        filter_seen_items=config.filter_seen_items,
        max_length=config.max_position_embeddings,
    )


def item_table(data: str | os.PathLike | None, folder: str | os.PathLike | None = None) -> Path | None:
    """The item table of a prepared folder, or else that of a model folder. None: neither has one."""
    for place in (data, folder):
        if place is not None and (Path(place) / ITEM_TABLE_FILE).is_file():
            return Path(place) / ITEM_TABLE_FILE
    return None


def check_catalogue(
    model: str | os.PathLike, tokenizer: Bert4RecTokenizer, data: str | os.PathLike, histories: AnyHistories
) -> None:
    """Raise ValueError if the catalogue of a model has none of the items of a prepared folder."""
    if not any((part.item_ids >= FIRST_ITEM_ID).any() for part in histories.parts()):
        catalogues = (tokenizer.items, Bert4RecTokenizer.from_pretrained(data).items)
        known, asked = (", ".join(map(repr, items[:3])) for items in catalogues)
        raise ValueError(
            f"the catalogue of {model} has none of the items of {data}: its ids look like {known}, those of the data "
            f"like {asked}; give data with the model's item ids"
        )
