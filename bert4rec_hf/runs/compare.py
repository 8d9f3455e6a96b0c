"""`bert4rec compare` as a function."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState

from ..data.counting import item_counts
from ..data.histories import check_prepared, histories_files, read_preparation
from ..data.rows import target_ids_of
from ..evaluation.compare import (
    COMPARISON_FILES,
    COMPARISON_KEYS,
    compare_ranks,
    format_comparison,
    plot_comparison,
    value_groups,
)
from ..evaluation.report import check_report_folder, user_groups
from ..files import write_file
from ..hub.load import check_model
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.losses import IGNORE_INDEX
from ..serving.rules import read_item_table
from .ranking import RankingTask, predict, ranking_task

logger = logging.getLogger(__name__)


def compare_prepared(
    old: str | os.PathLike,
    new: str | os.PathLike,
    data: str | os.PathLike,
    *,
    part: str = "test",
    anchor: str | os.PathLike | None = None,
    margin: float = 0.01,
    slice_by: Sequence[str] = (),
    items: str | os.PathLike | None = None,
    streaming: bool = False,
    max_eval_samples: int | None = None,
    per_device_eval_batch_size: int = 64,
    use_cpu: bool = False,
    disable_tqdm: bool = False,
    report: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Compare two models on the same targets, user by user. No model folder is changed.

    Args:
        old: A model folder or Hub id.
        new: The model that may replace it.
        data: The prepared folder.
        part: "validation" or "test".
        anchor: A further model that "new" is compared with, which stays the same from day to day. It shows a decline
            in small steps, each of which is within the margin.
        margin: The loss of NDCG@10 that still counts as not worse, for example 0.01.
        slice_by: Columns whose values divide the users into groups: event columns of the prepared folder
            (`--event_columns` of prepare), with the value of the target's event, and columns of `items`, with the value
            of the target's item.
        items: The item table; see `ItemTable.read`. None: items.parquet of the new model, if it has one.
        streaming: Whether the histories stay on disk, for a log larger than memory.
        max_eval_samples: Maximum number of users to rank, drawn at random. None: all; with `streaming`, 50,000.
        per_device_eval_batch_size: Number of histories ranked at once.
        use_cpu: Whether to leave an accelerator unused.
        disable_tqdm: Whether to show no progress bar.
        report: A folder for comparison.json, comparison.md and comparison.png. None: no report.

    Returns:
        The record of `compare_ranks`, with source, protocol and the names of the models. Beside `slice_by`, the groups
        are by history length and by popularity of the target.

    Raises:
        ValueError: If a folder is not a model folder or a prepared folder, if a model has trained on the targets, if no
            user has a target, if the margin is negative, or if a column is missing.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be 0 or more, the loss of NDCG@10 that you accept; got {margin}")
    check_prepared(data)
    columns = _columns(data, new, slice_by, items)
    if report is not None:
        check_report_folder(report, COMPARISON_FILES, COMPARISON_KEYS)
    models = {"new": new, "old": old} | ({} if anchor is None else {"anchor": anchor})
    ranks, policies = {}, {}
    # The new model comes last, since its task says how the users are grouped. Only one model is in memory at a time.
    for name in reversed(models):
        task = ranking_task(models[name], data, part, streaming=streaming, max_eval_samples=max_eval_samples)
        (prediction,) = predict(
            task, task.rows, batch_size=per_device_eval_batch_size, use_cpu=use_cpu, disable_tqdm=disable_tqdm
        )
        ranks[name], policies[name] = prediction.predictions[0], task.model.config.filter_seen_items
    if len(set(policies.values())) > 1:
        logger.warning(
            "the models do not rank the same items: filter_seen_items is %s; each is judged by what it serves",
            ", ".join(f"{policies[name]} in {name}" for name in models),
        )
    groups = user_groups(task.rows, item_counts(task.histories, task.tokenizer.num_items)[FIRST_ITEM_ID:])
    for column, of_items in columns.items():
        groups[column] = value_groups(_values(task, data, column, of_items))
    record = {
        "source": os.path.basename(task.preparation["source"]),
        "protocol": str(task.protocol()),
        "models": {name: os.fspath(model) for name, model in models.items()},
        **compare_ranks({name: ranks[name] for name in models}, groups, margin),
    }
    if report is not None and PartialState().is_main_process:
        folder = Path(report)
        folder.mkdir(parents=True, exist_ok=True)
        # comparison.json is written first, because it identifies the folder as a report.
        write_file(folder / "comparison.json", json.dumps(record, indent=2) + "\n")
        write_file(folder / "comparison.md", format_comparison(record) + "\n![Differences](comparison.png)\n")
        write_file(folder / "comparison.png", plot_comparison(record))
    return record


def _columns(
    data: str | os.PathLike, model: str | os.PathLike, slice_by: Sequence[str], items: str | os.PathLike | None
) -> dict[str, list[Any] | None]:
    """For each column, its value for each item of a model's catalogue, or None for an event column of the data."""
    if items is not None and not slice_by:
        raise ValueError(f"--items is for --slice_by; got {items} alone: leave it out, or name columns")
    event_columns = read_preparation(data)["columns"].get("event_columns") or []
    table, of_items = None, [column for column in slice_by if column not in event_columns]
    if of_items:
        check_model(model)
        table = read_item_table(model, items)
    others = [] if table is None else [column for column in table.table.column_names if column != "item_id"]
    found: dict[str, list[Any] | None] = {}
    for column in slice_by:
        if column in event_columns:
            schema = pq.read_schema(histories_files(Path(data))[0])
            _check_type(column, schema.field(column).type.value_type)
            found[column] = None
        elif table is not None and column in others:
            _check_type(column, table.table.schema.field(column).type)
            found[column] = table.table[column].to_pylist()
        else:
            raise ValueError(
                f"there is no column {column} to slice by: the event columns of {data} are "
                f"{', '.join(event_columns) or '(none)'} (--event_columns of bert4rec prepare adds them)"
                + (
                    f", those of {table.source} are {', '.join(others)}"
                    if table is not None
                    else "; --items names a table"
                )
            )
    return found


def _check_type(column: str, kind: pa.DataType) -> None:
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise ValueError(f"cannot slice by {column}, whose values are {kind}; expected single values")


def _values(task: RankingTask, data: str | os.PathLike, column: str, of_items: list[Any] | None) -> list[Any]:
    """(users,) the value of a column for each target. None: the target has none."""
    if of_items is not None:
        targets = target_ids_of(task.rows).tolist()
        return [None if target == IGNORE_INDEX else of_items[target - FIRST_ITEM_ID] for target in targets]
    value_of: dict[str, Any] = {}
    for path in histories_files(Path(data)):
        table = pq.read_table(path, columns=["user_id", f"{task.part}_position", column])
        table = table.filter(pc.greater_equal(table[f"{task.part}_position"], 0))
        lists, positions = table[column].combine_chunks(), table[f"{task.part}_position"].to_numpy()
        values = lists.values.take(lists.offsets.to_numpy()[:-1] + positions)
        value_of.update(zip(pc.cast(table["user_id"], "string").to_pylist(), values.to_pylist(), strict=True))
    return [value_of.get(user) for user in task.rows["user_id"][:]]
