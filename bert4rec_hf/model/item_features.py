# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Vectors of items from what is known about them: columns of an item table to numbers, and numbers to item vectors."""

import contextlib
import datetime
import json
import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .configuration_bert4rec import Bert4RecConfig

KINDS = ("category", "categories", "number", "boolean", "vector", "text")
# A value of a category counts if at least so many of the fitted items have it. Others share one number.
MIN_ITEMS_OF_A_VALUE = 2
# Numbers are written as logarithms if their skewness is above this limit and none is negative.
SKEWED_ABOVE = 2.0
# Standardised numbers are cut to this size, so that a typing error in a price has no vector of its own.
LARGEST_NUMBER = 5.0
# Longest vector of an item, far above those of text encoders.
LARGEST_WIDTH = 2**16

# An item with so many events has half the weight of one with many when the projection is learned.
EVENTS_OF_HALF_A_WEIGHT = 5.0
# Penalties of the ridge regression to choose from, in units of an item.
PENALTIES = (1.0, 4.0, 16.0, 64.0)

# Numbers of items in compressed rows: column indices int64, values float32, and (items + 1,) int64 starts of the rows.
SparseRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ItemFeatures:
    """Numbers from the columns of an item table, fitted on some items and then applied to any.

    - `category`: one number for each value. `categories`: the same for lists of values, or for text that a separator
      divides; the numbers of an item have length 1 together.
    - `number`: the standardised number, or its standardised logarithm ln(1 + x) if the numbers are skewed.
    - `boolean`: 1 or -1.
    - `vector`: as many numbers as the vector has, divided by their root mean square.
    - `text`: as `vector`, of the vectors that a text encoder has made.

    A missing value is a value: it has a number of its own in each column. The first number of all items is 1.

    Attributes:
        columns: For each column a mapping with its name and kind, and what was fitted, as JSON has it.
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]]):
        self.columns = [dict(column) for column in columns]
        for column in self.columns:
            if column.get("kind") not in KINDS:
                raise ValueError(
                    f"item features: expected a kind of {', '.join(KINDS)}; got {column.get('kind')!r:.80}"
                )
            _check_fitted(column)

    @property
    def size(self) -> int:
        """Number of numbers of an item."""
        return 1 + sum(_width(column) for column in self.columns)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [column["name"] for column in self.columns]

    def to_json(self) -> str:
        return json.dumps({"columns": self.columns}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ItemFeatures":
        content = json.loads(text)
        columns = content.get("columns") if isinstance(content, dict) else None
        if not isinstance(columns, list) or not all(isinstance(column, dict) for column in columns):
            raise ValueError(f"item features: expected an object with columns, a list of objects; got {text:.80}")
        return cls(columns)

    @classmethod
    def fit(cls, columns: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[Any]]) -> "ItemFeatures":
        """Find the vocabularies and the scales of columns.

        Args:
            columns: For each column a mapping with `name`, `kind` and, for text in `categories`, a `separator`.
            values: For each column, the values of the items to fit on; None where one is missing.

        Raises:
            ValueError: If a column has no value, or a value does not fit its kind.
        """
        fitted: list[dict[str, Any]] = []
        for column in columns:
            kept = {
                key: column[key]
                for key in ("name", "kind", "separator", "source", "encoder")
                if column.get(key) is not None
            }
            known = [value for value in map(_plain, values[column["name"]]) if value is not None]
            if not known:
                raise ValueError(f"item feature {column['name']!r} has no value for any item that trains: leave it out")
            fitted.append(kept | _fitted(kept, known))
        return cls(fitted)

    def rows(self, values: Mapping[str, Sequence[Any]], num_items: int) -> SparseRows:
        """The numbers of items.

        Args:
            values: For each column, (num_items,) values; None where one is missing. A column that is not there is
                missing for all items.
            num_items: Number of items.

        Raises:
            ValueError: If a value does not fit the kind of its column.
        """
        parts = [(torch.arange(num_items), torch.zeros(num_items, dtype=torch.long), torch.ones(num_items))]
        start = 1
        for column in self.columns:
            given = values.get(column["name"])
            given = [None] * num_items if given is None else list(map(_plain, given))
            owners, places, found = _numbers(column, given)
            parts.append((owners, places + start, found))
            start += _width(column)
        owners, places, found = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = owners.argsort(stable=True)
        sizes = torch.bincount(owners, minlength=num_items)
        return places[order], found[order], nn.functional.pad(sizes.cumsum(0), (1, 0))


class ItemProjection(nn.Module):
    """A linear map from the numbers of items (`ItemFeatures`) to item vectors and biases.

    The weights are a buffer (`config.num_item_features`, hidden size + 1) float32, the bias in the last column. They
    are computed from the vectors of the items that have trained; see `fit_projection`. None without features.
    """

    weight: torch.Tensor | None

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        shape = config.num_item_features, config.hidden_size + 1
        self.register_buffer("weight", torch.zeros(shape) if config.num_item_features else None)

    def forward(self, rows: SparseRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Item vectors (items, hidden size) and biases (items,), float32, from the numbers of items."""
        if self.weight is None:
            raise ValueError("the model makes no vectors from item features: train it with an item table")
        found = product(rows, self.weight.float().cpu())
        return found[:, :-1], found[:, -1]


def fit_projection(
    rows: SparseRows, targets: torch.Tensor, counts: torch.Tensor, *, folds: int = 5
) -> tuple[torch.Tensor, float, float]:
    """The linear map from numbers of items to their vectors and biases: ridge regression.

    An item with n events has the weight n / (n + 5), since the vector of a rare item is mostly noise. The penalty is
    the one of a grid with which the vectors of items that were left out are predicted best. The equations are solved by
    conjugate gradients, since the numbers are many and mostly 0.

    Args:
        rows: The numbers of the items that have trained.
        targets: (items, hidden size + 1) float32 vectors and biases.
        counts: (items,) number of training events.
        folds: Every so manieth item is left out to choose the penalty.

    Returns:
        weights: (numbers, hidden size + 1) float32.
        penalty: The penalty, in units of an item.
        explained: The share of the variance of the vectors of the items left out that is explained.
    """
    num_items, num_numbers = len(rows[2]) - 1, 1 + int(rows[0].max())
    shares = (counts / (counts + EVENTS_OF_HALF_A_WEIGHT)).unsqueeze(1)
    is_left_out = torch.arange(num_items) % folds == folds - 1
    best = (-math.inf, PENALTIES[0])
    if is_left_out.any() and not is_left_out.all():
        kept, left_out = select_rows(rows, ~is_left_out), select_rows(rows, is_left_out)
        centre = _mean(targets[~is_left_out], shares[~is_left_out])
        expected = (targets[is_left_out] - centre)[:, :-1]  # the vectors alone: a bias is not of their scale
        for penalty in PENALTIES:
            weights = _ridge(kept, targets[~is_left_out] - centre, shares[~is_left_out], penalty, num_numbers)
            errors = (product(left_out, weights)[:, :-1] - expected).square()
            of_all = (expected.square() * shares[is_left_out]).sum().clamp(min=1e-12)
            best = max(best, (float(1 - (errors * shares[is_left_out]).sum() / of_all), penalty))
    explained, penalty = best
    mean = _mean(targets, shares)
    weights = _ridge(rows, targets - mean, shares, penalty, num_numbers)
    weights[0] += mean
    return weights, penalty, explained


def select_rows(rows: SparseRows, is_wanted: torch.Tensor) -> SparseRows:
    """The rows of the items (items,) that are wanted."""
    places, values, starts = rows
    sizes = starts.diff()
    kept = torch.repeat_interleave(is_wanted, sizes)
    return places[kept], values[kept], nn.functional.pad(sizes[is_wanted].cumsum(0), (1, 0))


def product(rows: SparseRows, weights: torch.Tensor) -> torch.Tensor:
    """The product (items, columns) of the numbers of items with weights (numbers, columns)."""
    places, values, starts = rows
    return nn.functional.embedding_bag(places, weights, starts[:-1], mode="sum", per_sample_weights=values)


def as_columns(items: Any) -> dict[str, list[Any]] | None:
    """The columns of a table of items (a mapping, an Arrow table, a data frame) as lists; None for anything else."""
    if hasattr(items, "to_pydict"):
        return items.to_pydict()
    if hasattr(items, "columns") and hasattr(items, "to_dict"):
        return items.to_dict("list")
    return {name: list(values) for name, values in items.items()} if isinstance(items, Mapping) else None


def _mean(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    return (values * shares).sum(dim=0) / shares.sum()


def _ridge(
    rows: SparseRows, targets: torch.Tensor, shares: torch.Tensor, penalty: float, num_numbers: int
) -> torch.Tensor:
    """Solve (X'SX + penalty) W = X'SY by conjugate gradients, with the weights of the items on the diagonal of S.

    All columns of Y are solved at once. Returns (numbers, columns).
    """
    owners = torch.repeat_interleave(torch.arange(len(rows[2]) - 1), rows[2].diff())
    roots = shares.sqrt()
    values, targets = rows[1] * roots.squeeze(1)[owners], targets * roots
    size = (len(rows[2]) - 1, num_numbers)
    matrix = torch.sparse_coo_tensor(torch.stack((owners, rows[0])), values, size, check_invariants=False).coalesce()
    transposed = matrix.t().coalesce()
    # Jacobi's preconditioner: a frequent value has a large equation.
    scale = 1 / (torch.zeros(num_numbers).index_add_(0, rows[0], values.square()) + penalty).unsqueeze(1)
    residual = transposed @ targets
    smallest = 1e-4 * residual.norm(dim=0)
    weights = torch.zeros_like(residual)
    preconditioned = scale * residual
    direction, energy = preconditioned, (residual * preconditioned).sum(dim=0)
    for _ in range(100):
        product = transposed @ (matrix @ direction) + penalty * direction
        step = energy / (direction * product).sum(dim=0).clamp(min=1e-20)
        weights, residual = weights + step * direction, residual - step * product
        if (residual.norm(dim=0) <= smallest).all():
            break
        preconditioned = scale * residual
        previous, energy = energy, (residual * preconditioned).sum(dim=0)
        direction = preconditioned + energy / previous.clamp(min=1e-20) * direction
    return weights


def _plain(value: Any) -> Any:
    """A value as Python has it; None for one that is missing."""
    if value is None:
        return None
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, list | tuple) and all(part is None for part in value):
        return None
    return value


def _check_fitted(column: Mapping[str, Any]) -> None:
    """Raise ValueError if a column lacks what was fitted, as in a damaged file."""
    kind = column["kind"]
    is_right = isinstance(column.get("name"), str) and isinstance(column.get("separator") or "", str)
    if kind in ("category", "categories"):
        values = column.get("values")
        is_right &= isinstance(values, list) and all(isinstance(value, str) for value in values)
    elif kind == "number":
        is_right &= _is_finite(column.get("mean")) and _is_finite(column.get("deviation"))
        is_right &= isinstance(column.get("logarithm"), bool) and column["deviation"] != 0
    elif kind in ("vector", "text"):
        width = column.get("width")
        is_right &= type(width) is int and 1 <= width <= LARGEST_WIDTH
        is_right &= _is_finite(column.get("scale")) and column["scale"] != 0
    if not is_right:
        raise ValueError(f"item features: {column!r:.200} is no column of the kind {kind} that was fitted")


def _is_finite(value: Any) -> bool:
    # An integer of JSON may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _width(column: Mapping[str, Any]) -> int:
    """Number of numbers of a column, that of a missing value included."""
    if column["kind"] in ("category", "categories"):
        return len(column["values"]) + 2
    return column["width"] + 1 if column["kind"] in ("vector", "text") else 2


def _fitted(column: Mapping[str, Any], known: list[Any]) -> dict[str, Any]:
    kind = column["kind"]
    if kind in ("category", "categories"):
        found = Counter(value for given in known for value in set(_values_of(column, given)))
        return {"values": sorted(value for value, number in found.items() if number >= MIN_ITEMS_OF_A_VALUE)}
    if kind == "boolean":
        for value in known:
            _boolean(column, value)
        return {}
    if kind == "number":
        values = torch.tensor([_number(column, value) for value in known], dtype=torch.double)
        is_skewed = bool(values.min() >= 0) and _skewness(values) > SKEWED_ABOVE
        values = values.log1p() if is_skewed else values
        deviation = float(values.std(correction=0)) or 1.0
        return {"logarithm": is_skewed, "mean": float(values.mean()), "deviation": deviation}
    width = len(known[0]) if isinstance(known[0], list | tuple) else 0
    table = torch.stack([_vector(column, value, width) for value in known])
    return {"width": width, "scale": float(table.square().mean().sqrt()) or 1.0}


def _numbers(column: Mapping[str, Any], given: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The items, the places within the column, and the values that are not 0."""
    kind, width = column["kind"], _width(column)
    if kind in ("vector", "text"):
        table = torch.zeros(len(given), width)
        for item, value in enumerate(given):
            if value is None:
                table[item, -1] = 1
            else:
                table[item, :-1] = _vector(column, value, column["width"]) / column["scale"]
        rows, columns = table.nonzero(as_tuple=True)
        return rows, columns, table[rows, columns]
    owners: list[int] = []
    places: list[int] = []
    values: list[float] = []
    place_of = {value: place for place, value in enumerate(column.get("values", ()))}
    for item, value in enumerate(given):
        if value is None:
            found: Iterable[tuple[int, float]] = [(width - 1, 1.0)]
        elif kind == "number":
            number = math.log1p(max(_number(column, value), 0)) if column["logarithm"] else _number(column, value)
            number = (number - column["mean"]) / column["deviation"]
            found = [(0, min(max(number, -LARGEST_NUMBER), LARGEST_NUMBER))]
        elif kind == "boolean":
            found = [(0, 1.0 if _boolean(column, value) else -1.0)]
        else:
            several = sorted({place_of.get(one, width - 2) for one in _values_of(column, value)})
            found = [(place, len(several) ** -0.5) for place in several] or [(width - 1, 1.0)]
        for place, size in found:
            owners.append(item)
            places.append(place)
            values.append(size)
    return torch.tensor(owners, dtype=torch.long), torch.tensor(places, dtype=torch.long), torch.tensor(values)


def _values_of(column: Mapping[str, Any], value: Any) -> list[str]:
    """The values of a category or of several as text, as JSON can keep them."""
    if column["kind"] == "categories":
        separator = column.get("separator")
        if isinstance(value, str) and separator:
            return [part.strip() for part in value.split(separator) if part.strip()]
        if isinstance(value, list | tuple):
            return [str(part) for part in value if part is not None]
        if separator is None or not isinstance(value, str):
            raise ValueError(f"item feature {column['name']!r}: expected a list of values; got {value!r:.80}")
    elif isinstance(value, list | tuple | dict):
        raise ValueError(f"item feature {column['name']!r}: expected one value; got {value!r:.80}")
    return [str(value)]


def _number(column: Mapping[str, Any], value: Any) -> float:
    found = math.nan
    if isinstance(value, datetime.date):
        found = value.toordinal()
    elif isinstance(value, numbers.Real | str) or hasattr(value, "__float__"):
        with contextlib.suppress(ValueError):
            found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"item feature {column['name']!r}: expected finite numbers; got {value!r:.80}")
    return found


def _boolean(column: Mapping[str, Any], value: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "yes": True, "no": False}
    found = known.get(str(value).lower())
    if found is None:
        raise ValueError(f"item feature {column['name']!r}: expected true or false; got {value!r:.80}")
    return found


def _vector(column: Mapping[str, Any], value: Any, width: int) -> torch.Tensor:
    try:
        found = torch.tensor(value, dtype=torch.float)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(0)
    if width < 1 or found.shape != (width,) or not found.isfinite().all():
        wanted = f"lists of {width} finite numbers" if width else "lists of numbers"
        hint = ": encode the text first, as `bert4rec prepare` does" if isinstance(value, str) else ""
        raise ValueError(f"item feature {column['name']!r}: expected {wanted}; got {value!r:.80}{hint}")
    return found


def _skewness(values: torch.Tensor) -> float:
    deviation = values.std(correction=0)
    return 0.0 if deviation == 0 else float((((values - values.mean()) / deviation) ** 3).mean())
