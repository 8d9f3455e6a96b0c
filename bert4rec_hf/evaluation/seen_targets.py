"""Checks whether a model may have trained on the targets that it is evaluated on."""

import logging
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa
from transformers.utils import cached_file

from ..data.histories import PREPARATION_FILE, PREPARATION_FORM, check_period, time_type
from ..reading import read_json

logger = logging.getLogger(__name__)


def json_of_model(model: str | os.PathLike, name: str, form: Any) -> dict[str, Any] | None:
    """A JSON file of a model folder or Hub id. None without the file.

    Args:
        model: The model folder or Hub id.
        name: The name of the file.
        form: What it holds; see `read_json`.

    Raises:
        ValueError: If the file is damaged.
    """
    problems = ("gated_repo", "missing_entries", "connection_errors")
    path = cached_file(model, name, **{f"_raise_exceptions_for_{problem}": False for problem in problems})
    return read_json(path, form) if path is not None else None


def trained_preparation(model: str | os.PathLike) -> dict[str, Any] | None:
    """preparation.json of a model folder or Hub id. None without the file, as for a converted model."""
    preparation = json_of_model(model, PREPARATION_FILE, PREPARATION_FORM)
    return None if preparation is None else check_period(preparation)


def last_trained_time(model: str | os.PathLike, data: str | os.PathLike) -> float | None:
    """The time of the last event that a model was trained on, as a number in the unit of a prepared folder.

    None if it is not known, or of another kind than the times of the folder.

    Args:
        model: The model folder or Hub id.
        data: The prepared folder.
    """
    last = ((trained_preparation(model) or {}).get("trained_period") or [None])[-1]
    kind = time_type(data)
    is_timestamp = kind is not None and pa.types.is_timestamp(kind)
    if last is None or kind is None or isinstance(last, str) != is_timestamp:
        return None
    return pa.scalar(datetime.fromisoformat(last), kind).value if isinstance(last, str) else last


def check_targets(
    model: str | os.PathLike, preparation: Mapping[str, Any], part: str, *, is_trained_further: bool = False
) -> None:
    """Check that a model has not trained on the targets of a preparation.

    - With a temporal split, the first target must be later than the last event that the model was trained on.
    - With leave-one-out, the checksums say whether the model was trained on the same preparation. If not, or if the
      split or the filters differ, there is a warning, since the model may have trained on these targets. File names are
      not compared: a growing log may keep its name or get a new one.

    Args:
        model: The model folder.
        preparation: The content of preparation.json of the data.
        part: The part whose targets are ranked, "validation" or "test".
        is_trained_further: Whether the model is trained further on the data. These then are usually a grown log, so
            another checksum alone is no reason for a warning.

    Raises:
        ValueError: If the targets lie in the period that the model was trained on.
    """
    trained = trained_preparation(model)
    if trained is None or preparation["split"]["name"] == "none":
        return
    cut, last = preparation["split"].get(f"{part}_cut"), (trained.get("trained_period") or [None])[-1]
    # Times are dates in ISO format or numbers.
    if cut is not None and last is not None and isinstance(cut, str) == isinstance(last, str):
        if cut <= last:
            raise ValueError(
                f"{model} was trained on events up to {last}, and the {part} targets begin at {cut}: they are no test "
                f"of this model; prepare with a later --{part}_cut, or evaluate a model that was trained before it"
            )
        return
    source = os.path.basename(preparation["source"])
    if trained["split"]["name"] == "none":
        logger.warning(
            "%s was trained on all events of %s: targets of %s among these events are no test of this model, nor of a "
            "model that is trained further from it", model, trained["source"], source,
        )  # fmt: skip
        return
    # An older version of this package stored fewer options. Those that it lacks had no effect, as None has.
    used = [{name: {key: value for key, value in record[name].items() if value is not None}
             for name in ("split", "filters")} for record in (trained, preparation)]  # fmt: skip
    other = [f"{name} {used[0][name]}, here {used[1][name]}" for name in used[0] if used[0][name] != used[1][name]]
    checksums = trained.get("checksum"), preparation.get("checksum")
    if not other and not is_trained_further and None not in checksums and checksums[0] != checksums[1]:
        other = ["other histories, by the checksum of preparation.json"]
    if other:
        logger.warning(
            "%s was trained on another preparation, of %s (%s): if both are of the same or a growing log, the model "
            "may have trained on targets of this one", model, trained["source"], "; ".join(other),
        )  # fmt: skip


def with_period_of(preparation: Mapping[str, Any], origin: str | os.PathLike) -> dict[str, Any]:
    """A preparation whose trained period includes that of the model that training continues from."""
    before = (trained_preparation(origin) or {}).get("trained_period")
    own = preparation.get("trained_period")
    if before is None or own is None or isinstance(before[0], str) != isinstance(own[0], str):
        return dict(preparation)
    return dict(preparation) | {"trained_period": [min(before[0], own[0]), max(before[1], own[1])]}
