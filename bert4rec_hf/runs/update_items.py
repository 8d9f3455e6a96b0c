"""`bert4rec update-items` as a function."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ..data.histories import check_prepared
from ..data.item_tables import ITEM_TABLE_FILE, read_item_table, read_stored_table
from ..data.rows import users_with_targets
from ..data.text_encoder import with_text_vectors
from ..evaluation.seen_targets import json_of_model
from ..files import finished
from ..hub.change import changed_model
from ..hub.load import load_model
from ..hub.model_card import NEW_ITEMS_FILE, NEW_ITEMS_FORM, RECIPE_FILE
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..reading import read_yaml
from ..training.item_feature_training import fit_item_projection
from ..training.new_items import add_new_items, offer_new_items, set_offset, write_new_items
from .model_and_data import item_table, read_histories, rows_for

# The column of an item table that says which items are not recommended any more.
WITHDRAWN_COLUMN = "withdrawn"


def update_items(
    model: str | os.PathLike,
    items: str | os.PathLike | None = None,
    *,
    output: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    new_item_offset: float | None = None,
    text_encoder: str | None = None,
) -> dict[str, Any]:
    """Add, change and withdraw items in a model folder, without training.

    - Items that the catalogue lacks are appended, so that no token id changes. If the model has item features, their
      vectors are made from them; otherwise they get the mean vector.
    - Titles are replaced. The features of an item without training events are read anew. A vector that has trained
      stays.
    - An item whose value in the column `withdrawn` is true is never recommended from then on. It still counts as an
      item of a history. False takes this back.

    Args:
        model: A model folder.
        items: The item table, a file with item_id. Items that it lacks stay as they are. None: the table
            of the folder, for `data` or `new_item_offset`.
        output: The folder to write. None: the model folder itself, which is replaced in one step.
        data: A prepared folder with item features. The vectors are then made anew from the vectors that have trained,
            with these features, and the offset is chosen on its validation targets. This is for a model that was
            trained with FSDP, without features or in another library. None: as the model makes them.
        new_item_offset: Value that is added to the biases of items without training events. The higher, the more often
            they are recommended; new_items.json has the trade. None: as it is.
        text_encoder: Name or folder of the encoder of features of the kind text. None: the one that `prepare` used.

    Returns:
        num_new, num_changed (with another title or another vector), num_withdrawn (in all), and offset.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the folder is no model folder, the table or a value of it cannot be read, there is no table, or
            the data have no item features.
    """
    source, destination = Path(model), Path(model if output is None else output)
    if not (source / "config.json").is_file():
        raise ValueError(f"expected a model folder, with config.json; got {model}")
    loaded, tokenizer = load_model(source).eval(), Bert4RecTokenizer.from_pretrained(source)
    path = items or next((found for found in (item_table(data), item_table(source)) if found), None)
    if path is None:
        raise ValueError(f"{model} has no item table: name one, with a row for each item to add or to change")
    stored = source / ITEM_TABLE_FILE
    old = read_stored_table(stored) if stored.is_file() else None
    texts = [field.name for field in old.schema if pa.types.is_string(field.type)] if old is not None else []
    table = read_item_table(path, texts=texts)
    if data is not None:
        check_prepared(data)
        features = Bert4RecTokenizer.from_pretrained(data).item_features
        if features is None:
            raise ValueError(f"{data} has no item features: prepare it with --items and --item_features")
        tokenizer.item_features = features
    if tokenizer.item_features is not None:
        kept = [
            column
            for column in tokenizer.item_features.columns
            if column.get("source", column["name"]) in table.column_names
        ]
        table, _ = with_text_vectors(table, kept, text_encoder)
    withdrawn = _withdrawn(table, path)
    merged = table if old is None else _merged(old, table, stored)
    columns = merged.slice(len(merged) - len(table)).to_pydict()
    titles = dict(zip(columns["item_id"], columns.get("title", ()), strict=False))
    before = list(tokenizer.titles or [None] * tokenizer.num_items)
    record: dict[str, Any] = {"num_new": tokenizer.num_items}
    new_items: dict[str, Any] | None = json_of_model(source, NEW_ITEMS_FILE, NEW_ITEMS_FORM)
    if data is not None:
        everything = merged.to_pydict()
        fitted = fit_item_projection(loaded, tokenizer, everything)
        new_items = {"num_new_items": add_new_items(loaded, tokenizer, everything)} | fitted
    loaded.add_items(tokenizer, columns, titles)
    record["num_new"] = tokenizer.num_items - record["num_new"]
    num_old = tokenizer.num_items - record["num_new"]
    after = tokenizer.titles or before
    changed = {place for place in range(num_old) if before[place] != after[place]}
    counts = np.array(tokenizer.counts or [1] * tokenizer.num_items)
    named = np.array(tokenizer.item_ids_to_token_ids(columns["item_id"])) - FIRST_ITEM_ID
    untrained = [place for place in named.tolist() if place < num_old and counts[place] == 0]
    has_features = tokenizer.item_features is not None and set(tokenizer.item_features.names) & set(columns)
    if loaded.config.num_item_features and untrained and has_features:
        loaded.set_vectors_from_features(tokenizer, columns, [place + FIRST_ITEM_ID for place in untrained])
        changed |= set(untrained)
    record["num_changed"] = len(changed)
    if data is not None:
        new_items = (new_items or {}) | _trade(loaded, tokenizer, data)
    if new_item_offset is not None:
        set_offset(loaded, tokenizer, new_item_offset)
        new_items = (new_items or {}) | {"offset": new_item_offset}
    if withdrawn is not None:
        now = set(loaded.config.withdrawn_item_ids or ())
        for token_id, is_withdrawn in zip((named + FIRST_ITEM_ID).tolist(), withdrawn, strict=True):
            (now.add if is_withdrawn else now.discard)(token_id)
        loaded.config.withdrawn_item_ids = sorted(now) or None
    record |= {"num_withdrawn": len(loaded.config.withdrawn_item_ids or ()), "offset": loaded.config.new_item_offset}
    _write(source, destination, loaded, tokenizer, merged, new_items)
    return record


def _trade(loaded: Any, tokenizer: Bert4RecTokenizer, data: str | os.PathLike) -> dict[str, Any]:
    """The trade of new items on the validation targets of a prepared folder, and the offset that it gives."""
    histories, _, _ = read_histories(data, False, tokenizer)
    rows = rows_for(loaded.config, users_with_targets(histories, "validation", None), tokenizer, "validation")
    if not len(rows):
        return {"offset": loaded.config.new_item_offset}
    return offer_new_items(loaded, tokenizer, rows)


def _withdrawn(table: pa.Table, path: Any) -> list[bool] | None:
    if WITHDRAWN_COLUMN not in table.column_names:
        return None
    values = table[WITHDRAWN_COLUMN]
    if not pa.types.is_boolean(values.type) or values.null_count:
        raise ValueError(
            f"{path}: the column {WITHDRAWN_COLUMN} must be true or false in every row; it is {values.type} with "
            f"{values.null_count} nulls"
        )
    return values.to_pylist()


def _merged(old: pa.Table, table: pa.Table, path: Path) -> pa.Table:
    """The item table of the folder, with the rows and columns of the new one in place of its own."""
    given = set(table["item_id"].to_pylist())
    is_kept = pa.array([item not in given for item in old["item_id"].to_pylist()])
    lacking = [name for name in old.column_names if name not in table.column_names]
    if lacking:  # values that the new table does not have stay
        joined = old.select(["item_id", *lacking])
        rows = {item: row for row, item in enumerate(joined["item_id"].to_pylist())}
        places = pa.array([rows.get(item) for item in table["item_id"].to_pylist()], pa.int64())
        for name in lacking:
            table = table.append_column(name, joined[name].take(places))
    for number, field in enumerate(table.schema):
        place = old.schema.get_field_index(field.name)
        if place >= 0:
            try:
                table = table.set_column(number, field.name, _like(table.column(number), old.schema.types[place]))
            except pa.ArrowException as error:
                raise ValueError(
                    f"column {field.name!r} of the new item table is {field.type}, and {old.schema.types[place]} in "
                    f"{path}: {error}; write it with the same type"
                ) from error
    try:
        return pa.concat_tables([old.filter(is_kept), table], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"the new item table has a column of another type than {path}: {error}; write it with the same type"
        ) from error


def _like(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column without values, or of lists, with the type that it had before: rows of CSV and JSON alone do not say it.

    Raises:
        pa.ArrowInvalid: If the values do not fit, such as fractions in lists of whole numbers.
    """
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    return column.cast(kind) if pa.types.is_list(column.type) and pa.types.is_list(kind) else column


def _write(
    source: Path,
    destination: Path,
    loaded: Any,
    tokenizer: Bert4RecTokenizer,
    table: pa.Table,
    new_items: dict[str, Any] | None,
) -> None:
    """Write the folder in one step. Checkpoints and files of the user's own stay where they are."""
    if destination.resolve() != source.resolve() and destination.is_dir() and finished(destination):
        raise ValueError(f"{destination} is not empty; choose another --output")
    with changed_model(source, destination) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        pq.write_table(table, folder / ITEM_TABLE_FILE, compression="zstd")
        if (folder / RECIPE_FILE).is_file():
            recipe = read_yaml(folder / RECIPE_FILE)
            recipe["new_item_offset"] = loaded.config.new_item_offset
            (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True), "utf-8")
        if new_items is not None:
            write_new_items(folder, new_items)
