"""`Rules` of a business: which items may be recommended, which are preferred, and how varied an answer is."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import cached_file

from ..hub.load import check_model
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .item_table import ItemTable

logger = logging.getLogger(__name__)

# The item table of a model folder.
ITEMS_FILE = "items.parquet"
# The keys of rules in a configuration.
RULE_KEYS = ("where", "boost", "max_per", "diversity")
# Largest number of standard deviations of a boost, which is above any difference of scores.
LARGEST_BOOST = 1e6
# Quotas and diversity choose from this number of best items for each item of the answer.
POOL_FACTOR = 20


@dataclass(frozen=True)
class Quota:
    """At most `limit` items of an answer have the same value in a column.

    Attributes:
        column: The column.
        limit: The number of items.
        values: (vocab size, W) int64 from `ItemTable.values_of`, for each token id.
        num_values: The largest of the values.
    """

    column: str
    limit: int
    values: torch.Tensor = field(repr=False)
    num_values: int


@dataclass(frozen=True, eq=False)
class Rules:
    """Rules for recommendations, checked against an item table once.

        rules = Rules(items, where="price < 50", boosts={"on_sale": 0.5}, max_per="category:2", diversity=0.3)
        recommend(["50", "172"], rules=rules)

    The rules apply in this order:

    1. Hard filters. Seen items, `exclude`, `candidates` and `where` leave the eligible items. Nothing overrides them.
    2. The model scores the eligible items.
    3. Boosts are added to the scores.
    4. The best 20 items for each item of the answer form the pool.
    5. One pass over the pool chooses the next item again and again: the one with the highest
       (1 - diversity) · standardised score - diversity · largest cosine to the items chosen so far, among the items
       that no quota forbids. The scores are standardised over the pool. The cosines are those of the item vectors.

    Steps 4 and 5 are left out without `max_per` and `diversity`. No rule yields to another: if the filters or the
    quotas leave too few items, the answer is shorter, and one warning for each call names the rule and the number.

    Attributes:
        items: The item table that the conditions and the quotas read. None is allowed without them.
        where: A condition that every recommended item meets. Null counts as false.
        boosts: Conditions, and for each the number of standard deviations that is added to the scores of the items that
            meet it. The deviation is that of the scores of the history's eligible items. It may be negative.
        max_per: "COLUMN:N", or a list of these: at most N items of an answer have the same value in the column. An item
            with a list of values counts for each of them, one with null for none.
        diversity: From 0 (the order of the scores) to 1 (of two items, the one less similar to those above it).
        allowed: (vocab size,) bool, the token ids that meet `where`. None: all do.
        boost_values: (vocab size,) float32, the number of standard deviations for each token id. None: no boosts.
        quotas: The quotas of `max_per`.

    Raises:
        ValueError: If a condition is wrong (see `ItemTable.mask`), a boost is not a finite number, a quota is not
            "COLUMN:N" or names an unknown column, `diversity` is not between 0 and 1, or `items` is missing.
    """

    items: ItemTable | None = None
    where: str | None = None
    boosts: Mapping[str, float] | None = None
    max_per: str | Sequence[str] | None = None
    diversity: float = 0.0
    allowed: torch.Tensor | None = field(init=False, repr=False, default=None)
    boost_values: torch.Tensor | None = field(init=False, repr=False, default=None)
    quotas: tuple[Quota, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        if isinstance(self.diversity, bool) or not isinstance(self.diversity, Real) or not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity must be a number from 0 to 1; got {self.diversity!r}")
        if self.items is not None and not isinstance(self.items, ItemTable):
            raise ValueError(f"expected an item table, ItemTable.read(path, tokenizer); got {self.items!r:.80}")
        if self.boosts is not None and not isinstance(self.boosts, Mapping):
            raise ValueError(f'boosts must be a mapping such as {{"on_sale": 0.5}}; got {self.boosts!r:.80}')
        if self.items is None and (self.where is not None or self.boosts or self.max_per):
            raise ValueError(
                "where, boosts and max_per read columns of an item table; got none: give one, as in "
                "Rules(ItemTable.read(path, tokenizer), …)"
            )
        if self.items is None:
            return
        if self.where is not None:
            self._set("allowed", _with_special_tokens(self.items.mask(self.where)))
        if self.boosts:
            total = np.zeros(len(self.items), np.float32)
            for condition, weight in self.boosts.items():
                if isinstance(weight, bool) or not isinstance(weight, Real) or not abs(weight) <= LARGEST_BOOST:
                    raise ValueError(
                        f"a boost must be a number of standard deviations, at most {LARGEST_BOOST:g}; got "
                        f"{weight!r} for {condition!r}"
                    )
                total += np.float32(weight) * self.items.mask(condition)
            self._set("boost_values", _with_special_tokens(total))
        texts = [self.max_per] if isinstance(self.max_per, str) else self.max_per or ()
        self._set("quotas", tuple(_quota(text, self.items) for text in texts))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def __str__(self) -> str:
        """The rules in words, for protocols and messages."""
        parts = [] if self.where is None else [f"where {self.where}"]
        parts += [f"boost {weight:g}: {condition}" for condition, weight in (self.boosts or {}).items()]
        parts += [f"max_per {quota.column}:{quota.limit}" for quota in self.quotas]
        parts += [f"diversity {self.diversity:g}"] if self.diversity else []
        return ", ".join(parts)

    @property
    def num_items(self) -> int | None:
        """Number of items in the catalogue. None: the rules suit any catalogue."""
        return None if self.items is None else len(self.items)

    @property
    def num_allowed(self) -> int | None:
        """Number of items that meet `where`. None: all do."""
        return None if self.allowed is None else int(self.allowed.sum())

    @property
    def chooses(self) -> bool:
        """Whether an answer is chosen from a pool, and is not the best items."""
        return bool(self.quotas or self.diversity)

    @property
    def reorders(self) -> bool:
        """Whether the order of an answer is not that of the scores."""
        return self.chooses or self.boost_values is not None

    def pool_size(self, top_k: int) -> int:
        """Number of best items that an answer is chosen from."""
        return POOL_FACTOR * top_k if self.chooses else top_k

    def values_per_row(self, pool_size: int) -> int:
        """Number of values in memory for a history, while its answer is chosen."""
        return max([1, *(max(pool_size * quota.values.shape[1], quota.num_values) for quota in self.quotas)])

    def choose(
        self, scores: torch.Tensor, item_ids: torch.Tensor, item_vectors: torch.Tensor | None, top_k: int
    ) -> torch.Tensor:
        """Choose answers from pools, as step 5 says.

        Args:
            scores: (batch, P) scores with boosts, in descending order, -inf where the pool has no item.
            item_ids: (batch, P) token ids.
            item_vectors: (batch, P, hidden size) vectors. None is allowed without `diversity`.
            top_k: Number of items to choose.

        Returns:
            (batch, at most `top_k`) int64 columns of the pools, in the order of the answers, -1 where nothing is left.
        """
        is_left = ~scores.isneginf()
        if item_vectors is None:  # the order is that of the scores
            relevance = -torch.arange(scores.shape[1], device=scores.device).expand_as(scores).float()
        else:
            item_vectors = nn.functional.normalize(item_vectors, dim=2)
            relevance = (1 - self.diversity) * _standardised(scores, is_left)
        nearest = None
        counted = [
            (
                quota.limit,
                quota.values[item_ids.cpu()].to(scores.device),
                scores.new_zeros(len(scores), quota.num_values + 1),
            )
            for quota in self.quotas
        ]
        columns = []
        for _ in range(min(top_k, scores.shape[1])):
            marginal = relevance if nearest is None else relevance - self.diversity * nearest
            column = marginal.masked_fill(~is_left, -torch.inf).argmax(dim=1, keepdim=True)
            is_found = is_left.gather(1, column)
            columns.append(column.masked_fill(~is_found, -1))
            is_left = is_left.scatter(1, column, False)
            for limit, values, counts in counted:
                chosen = values.gather(1, column.unsqueeze(2).expand(-1, -1, values.shape[2])).squeeze(1)
                counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
                counts[:, 0] = 0  # the padding
                is_full = counts.gather(1, values.flatten(1)) >= limit
                is_left = is_left & ~is_full.view_as(values).any(dim=2)
            if item_vectors is not None:
                chosen_vector = item_vectors.gather(1, column.unsqueeze(2).expand(-1, -1, item_vectors.shape[2]))
                similar = (item_vectors @ chosen_vector.mT).squeeze(2)
                nearest = similar if nearest is None else torch.maximum(nearest, similar)
        return torch.cat(columns, dim=1)

    def warn(self, counts: Mapping[str, int], top_k: int) -> None:
        """Warn of answers that the rules made shorter than `top_k`.

        Args:
            counts: The sums over the histories of a call that the pipeline counts; see `pipeline.count_short`.
            top_k: Number of items that were asked for.
        """
        parts = []
        if counts["filtered"] and self.where is not None:
            left = counts["left by filters"] / counts["filtered"]
            parts.append(
                f"where {self.where!r}, which {self.num_allowed:,} of {self.num_items:,} items meet, and the other "
                f"filters leave {left:.3g} on average for {counts['filtered']:,}"
            )
        if counts["limited"]:
            quotas = ", ".join(f"{quota.column}:{quota.limit}" for quota in self.quotas)
            left = counts["left by quotas"] / counts["limited"]
            parts.append(
                f"max_per {quotas} leaves {left:.3g} of the best {self.pool_size(top_k):,} on average for "
                f"{counts['limited']:,}"
            )
        if parts:
            logger.warning("%d of %d histories get fewer than %d items: %s",
                           counts["short"], counts["answers"], top_k, "; ".join(parts))  # fmt: skip


def read_rules(
    model: str | os.PathLike,
    *,
    items: str | os.PathLike | None = None,
    where: str | None = None,
    boost: Sequence[str] | None = None,
    max_per: Sequence[str] | None = None,
    diversity: float = 0.0,
) -> Rules | None:
    """The rules that a command line spells as texts.

    Args:
        model: A model folder or Hub id, whose catalogue the rules are for.
        items: The item table. None: items.parquet of the model, if it has one.
        where: See `Rules`.
        boost: Texts "WEIGHT: CONDITION", such as "0.5: on_sale".
        max_per: Texts "COLUMN:N".
        diversity: See `Rules`.

    Returns:
        The rules. None if all of them are left out.

    Raises:
        ValueError: If a text has another form, there is no such model or no item table, or there is one and nothing
            reads it; or as `Rules` and `ItemTable.read`.
    """
    if where is None and not boost and not max_per:
        if items is not None:
            raise ValueError(f"--items is for --where, --boost and --max_per; got {items} alone: leave it out")
        return Rules(diversity=diversity) if diversity else None
    boosts = _boosts(boost)
    check_model(model)
    table = read_item_table(model, items)
    if table is None:
        raise ValueError(
            f"--where, --boost and --max_per read an item table, and {model} has no {ITEMS_FILE}: give one with --items"
        )
    return Rules(table, where=where, boosts=boosts or None, max_per=max_per or None, diversity=diversity)


def read_item_table(model: str | os.PathLike, items: str | os.PathLike | None = None) -> ItemTable | None:
    """The item table for a model.

    Args:
        model: A model folder or Hub id.
        items: The file. None: items.parquet of the model.

    Returns:
        The table. None if no file is named and the model has none.

    Raises:
        ValueError: As `ItemTable.read`.
    """
    if items is None:
        items = cached_file(model, ITEMS_FILE, _raise_exceptions_for_missing_entries=False)
    return None if items is None else ItemTable.read(items, Bert4RecTokenizer.from_pretrained(model))


def named_rules(items: ItemTable | None, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Rules]:
    """The rules of a configuration, by name.

    Args:
        items: The item table that they read.
        texts: For each name, a mapping with some of where, boost, max_per and diversity; see `read_rules`.

    Raises:
        ValueError: If a value is no such mapping, or as `Rules`. The message names the rule.
    """
    found = {}
    for name, given in texts.items():
        try:
            if not isinstance(given, Mapping) or not given or given.keys() - set(RULE_KEYS):
                raise ValueError(f"expected a mapping with some of {', '.join(RULE_KEYS)}; got {given!r:.100}")
            boost, max_per = (_texts(key, given.get(key)) for key in ("boost", "max_per"))
            found[name] = Rules(
                items,
                where=given.get("where"),
                boosts=_boosts(boost) or None,
                max_per=max_per or None,
                diversity=given.get("diversity", 0.0),
            )
        except ValueError as error:
            raise ValueError(f"rules {name!r}: {error}") from error
    return found


def _texts(name: str, value: Any) -> list[str] | None:
    values = [value] if isinstance(value, str) else value
    if values is not None and not (isinstance(values, list) and all(isinstance(text, str) for text in values)):
        raise ValueError(f"{name} must be a text or a list of texts; got {value!r:.100}: quote it")
    return values


def _boosts(texts: Sequence[str] | None) -> dict[str, float]:
    """The weights of boosts by condition."""
    boosts: dict[str, float] = {}
    for text in texts or ():
        weight, _, condition = str(text).partition(":")
        condition = condition.strip()
        try:
            number = float(weight if condition else "")
        except ValueError:
            raise ValueError(f'a boost must be "WEIGHT: CONDITION", such as "0.5: on_sale"; got {text!r}') from None
        if condition in boosts:
            raise ValueError(f"the boost of {condition!r} is there twice; leave one of them out")
        boosts[condition] = number
    return boosts


def _quota(text: str, items: ItemTable) -> Quota:
    column, _, number = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not column.strip() or not number.strip().isdecimal() or int(number) < 1:
        raise ValueError(f'max_per must be "COLUMN:N" with N of at least 1, such as "category:2"; got {text!r}')
    values = items.values_of(column.strip())
    return Quota(column.strip(), int(number), _with_special_tokens(values), int(values.max(initial=0)))


def _with_special_tokens(values: np.ndarray) -> torch.Tensor:
    """Values of the items as values of the token ids. The special tokens have 0, or False."""
    return torch.from_numpy(np.concatenate((np.zeros((FIRST_ITEM_ID, *values.shape[1:]), values.dtype), values)))


def _standardised(scores: torch.Tensor, is_left: torch.Tensor) -> torch.Tensor:
    """Scores (batch, P) minus their mean over the items that are left, divided by their standard deviation."""
    number = is_left.sum(dim=1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~is_left, 0).sum(dim=1, keepdim=True) / number
    centred = (scores - mean).masked_fill(~is_left, 0)
    deviation = (centred.square().sum(dim=1, keepdim=True) / number).sqrt()
    return centred / deviation.where(deviation > 0, 1)
