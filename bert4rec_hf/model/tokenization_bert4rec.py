# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer: raw item ids to token ids and back, titles and training counts. Only `append_mask` appends [MASK]."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, UNK_TOKEN_ID
from .folder_checks import check_links
from .item_features import ItemFeatures, SparseRows, as_columns

logger = logging.getLogger(__name__)

# Special tokens in the order of their ids.
SPECIAL_TOKENS = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
# A raw id that is spelled like a special token, with or without leading backslashes, has one more backslash in the
# vocabulary.
SPELLED_LIKE_SPECIAL = re.compile(r"\\*\[(PAD|MASK|UNK)\]")

ItemId = str | int


class Bert4RecTokenizer(PreTrainedTokenizerFast):
    r"""
    The catalogue: maps raw item ids to token ids and back.

    [PAD] is 0, [MASK] is 1, [UNK] is 2, and items start at 3. The first items are sorted by raw id; items that are
    added later are appended. Raw ids are strings. Integers are accepted and come back as strings. A raw id is never
    split or normalised, so it may contain spaces, quotes and any Unicode.

        tokenizer = Bert4RecTokenizer.from_items(["50", "318", "296"], titles={"50": "Star Wars (1977)"})
        tokenizer([["318", "50"], ["296"]], padding=True, return_tensors="pt")  # ends with [MASK]: for `recommend`

    A flat list of ids is one history, a list of lists is a batch. Unknown items are left out, with one warning that
    counts them. By default, a call keeps the newest items that fit into `max_length` (default: `model_max_length`) and
    appends [MASK]. `truncation=False` keeps all items. With `add_special_tokens=False`, a call appends no [MASK], and
    truncates only with `truncation=True`.

    `item_features` turns the columns of an item table into numbers, from which the model makes vectors of new items.
    None: the catalogue has no item features.

    `event_types` are the types of events, such as view and purchase, in the order of their ids, which start at 1. The
    id 0 stands for no type and for an unknown one. `target_event_types` are those that the model recommends for; a
    plain item id stands for an event of the first of them. Both are None for a catalogue of a log without types.

    With `drop_oldest_item`, which is for converted models, the oldest item of a history is always dropped before the
    [MASK] is appended.
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        "items_file": "items.json",
        "item_features_file": "item_features.json",
    }
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: Mapping[str, int] | None = None,
        items_file: str | None = None,
        item_features_file: str | None = None,
        drop_oldest_item: bool = False,
        event_types: Sequence[str] | None = None,
        target_event_types: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        if vocab is None:
            raise ValueError(
                "expected a catalogue; got no vocabulary: create a tokenizer with Bert4RecTokenizer.from_items(items), "
                "or load a folder that tokenizer.save_pretrained(folder) wrote"
            )
        # Transformers passes `vocab` when it reads tokenizer.json.
        self._tokenizer = _backend(vocab)
        # auto_map names code in the folder that was read. A copy of the folder may lack that code. If the code is
        # copied too, Transformers writes auto_map again.
        kwargs.pop("auto_map", None)
        defaults = SPECIAL_TOKENS | {"truncation_side": "left", "padding_side": "right"}
        # Transformers writes what it gets here into tokenizer_config.json.
        types = {} if event_types is None else _checked_types(event_types, target_event_types)
        super().__init__(**(defaults | kwargs), drop_oldest_item=drop_oldest_item, **types)
        self.drop_oldest_item = drop_oldest_item
        self.event_types: list[str] | None = types.get("event_types")
        self.target_event_types: list[str] | None = types.get("target_event_types")
        content = json.loads(Path(items_file).read_text("utf-8")) if items_file else {}
        self._counts: list[int] | None = content.get("counts")
        self._titles: list[str | None] | None = content.get("titles")
        self.item_features: ItemFeatures | None = None
        if item_features_file:
            self.item_features = ItemFeatures.from_json(Path(item_features_file).read_text("utf-8"))
        self._read_vocabulary()
        _check_values("counts", self._counts, self.num_items, int)
        _check_values("titles", self._titles, self.num_items, str | None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a tokenizer, as in Transformers.

        Raises:
            OSError: If there is no tokenizer.
            ValueError: If a file is damaged, or is a link out of the folder.
        """
        name = pretrained_model_name_or_path
        if os.path.isdir(name):
            check_links(name)
        try:
            return super().from_pretrained(name, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:  # Transformers and tokenizers have errors of many types for damaged files
            problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"the tokenizer of {name} cannot be read: {problem}") from error

    @classmethod
    def from_items(
        cls,
        items: Iterable[ItemId],
        *,
        titles: Mapping[Any, str] | None = None,
        counts: Mapping[Any, int] | None = None,
        model_max_length: int | None = None,
        sort: bool = True,
        drop_oldest_item: bool = False,
        event_types: Sequence[str] | None = None,
        target_event_types: Sequence[str] | None = None,
    ) -> "Bert4RecTokenizer":
        """Create a tokenizer for a catalogue.

        Args:
            items: Raw ids, each once.
            titles: Titles by raw id, for items that have one.
            counts: Number of training events by raw id. Items that are not in the mapping have 0.
            model_max_length: Longest input of the model, the [MASK] included.
            sort: Whether token ids are assigned in the order of the raw ids. False: in the given order, as a converted
                model needs.
            drop_oldest_item: Whether `append_mask` always drops the oldest item, as RecBole does.
            event_types: Types of events. None: events have no types.
            target_event_types: Those that are recommended for. None: all of them.

        Raises:
            TypeError: If an id is neither a string nor an integer.
            ValueError: If there are no items, or one occurs twice; or if a target type is not among the types.
        """
        raw_ids = _raw_ids(items)
        if sort:
            raw_ids.sort()
        if not raw_ids:
            raise ValueError("a catalogue needs at least one item; got none")
        vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS.values())}
        for raw_id in raw_ids:
            vocabulary[_to_token(raw_id)] = len(vocabulary)
        if len(vocabulary) < len(raw_ids) + len(SPECIAL_TOKENS):
            twice = next(first for first, second in pairwise(sorted(raw_ids)) if first == second)
            raise ValueError(f"item {twice!r} occurs twice in the catalogue; raw ids must be unique")
        options: dict[str, Any] = {} if model_max_length is None else {"model_max_length": model_max_length}
        if event_types is not None:
            options |= {"event_types": event_types, "target_event_types": target_event_types}
        tokenizer = cls(vocabulary, drop_oldest_item=drop_oldest_item, **options)
        tokenizer._set(titles, counts)
        return tokenizer

    @property
    def num_items(self) -> int:
        """Number of items in the catalogue, without special tokens."""
        return len(self._raw_ids)

    @property
    def items(self) -> list[str]:
        """Raw ids in the order of their token ids. The first item has token id 3."""
        return list(self._raw_ids)

    @property
    def counts(self) -> list[int] | None:
        """Number of training events of each item, in the order of `items`; None if it was never counted."""
        return self._counts

    @property
    def titles(self) -> list[str | None] | None:
        """Title of each item, or None, in the order of `items`; None if no item has a title."""
        return self._titles

    def set_counts(self, counts: Mapping[Any, int]) -> None:
        """Replace the training counts.

        Args:
            counts: Number of training events by raw id. Items that are not in the mapping have 0.
        """
        self._set(None, counts)

    def add_items(self, items: Iterable[ItemId], titles: Mapping[Any, str] | None = None) -> int:
        """Append new items to the catalogue, sorted by raw id. The token ids of old items do not change.

        The model then needs `resize_token_embeddings(len(tokenizer))`; `model.add_items` does both.

        Args:
            items: Raw ids. Known items among them are ignored.
            titles: Titles by raw id, for new or old items.

        Returns:
            The number of new items.
        """
        new = sorted(set(_raw_ids(items)).difference(self._token_ids))
        vocabulary = self._tokenizer.get_vocab()
        for raw_id in new:
            vocabulary[_to_token(raw_id)] = len(vocabulary)
        self._tokenizer = _backend(vocabulary)
        self._tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
        self._read_vocabulary()
        if self._counts is not None:
            self._counts = self._counts + [0] * len(new)
        if self._titles is not None:
            self._titles = self._titles + [None] * len(new)
        self._set(titles or None, None)
        return len(new)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Accept the special tokens only, which Transformers adds itself. Items are added with `add_items`.

        Raises:
            ValueError: If a token is not a special token.
        """
        tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        others = [token for token in map(str, tokens) if token not in SPECIAL_TOKENS.values()]
        if others:
            raise ValueError(
                f"expected no tokens but {', '.join(SPECIAL_TOKENS.values())}; got {others[0]!r}: "
                "model.add_items(tokenizer, items) adds items to the catalogue and the model"
            )
        return super().add_tokens(new_tokens, special_tokens)

    def item_ids_to_token_ids(self, items: Iterable[ItemId]) -> list[int]:
        """Convert raw ids to token ids. The token id of an unknown item is 2, that of [UNK].

        Raises:
            TypeError: If an id is neither a string nor an integer, or `items` is a string.
        """
        _check_list(items)
        known, unknown = self._token_ids, UNK_TOKEN_ID
        return [known.get(item if type(item) is str else _raw_id(item), unknown) for item in items]

    def token_ids_to_item_ids(self, token_ids: Iterable[int]) -> list[str]:
        """Convert token ids to raw ids.

        Raises:
            ValueError: If a token id is not that of an item.
        """
        raw_ids, first = self._raw_ids, FIRST_ITEM_ID
        items = []
        for token_id in token_ids:
            if not first <= token_id < first + len(raw_ids):
                raise ValueError(
                    f"token id {token_id} is no item; items have token ids {first} to {first + len(raw_ids) - 1}"
                )
            items.append(raw_ids[token_id - first])
        return items

    @property
    def target_event_type_ids(self) -> list[int]:
        """Ids of the target types, the default first; empty if events have no types."""
        return [] if self.target_event_types is None else self.event_type_ids(self.target_event_types)

    def event_type_ids(self, names: Iterable[Any], of_what: str = "event_type") -> list[int]:
        """Convert the names of event types to ids.

        Args:
            names: Names, text or integers.
            of_what: What the names are, for the error.

        Raises:
            ValueError: If the catalogue has no event types, or lacks one. The message lists those known.
        """
        if self.event_types is None:
            raise ValueError(
                f"{of_what} is for a model that was trained with event types; this one was not: leave it out, or "
                "prepare the log with --event_type_column"
            )
        known = {name: number for number, name in enumerate(self.event_types, start=1)}
        found = []
        for place, name in enumerate(names):
            number = known.get(name if isinstance(name, str) else str(name))
            if number is None:
                raise ValueError(
                    f"{of_what} {name!r} of item {place} (the first is 0) is unknown; the types are "
                    f"{', '.join(self.event_types)}"
                )
            found.append(number)
        return found

    def target_event_type_id(self, name: Any = None) -> int:
        """The id of the type that is recommended for: the first target type, or the one with this name.

        Returns:
            0 if the catalogue has no event types.

        Raises:
            ValueError: If the name is not that of a target type.
        """
        if name is None:
            return self.target_event_type_ids[0] if self.event_types is not None else 0
        if self.target_event_types is not None and name not in self.target_event_types:
            raise ValueError(
                f"event_type {name!r} is not recommended for; expected one of {', '.join(self.target_event_types)}"
            )
        return self.event_type_ids([name])[0]

    def feature_rows(self, table: Any, items: Iterable[ItemId]) -> SparseRows:
        """The numbers of items from a table of items; see `ItemFeatures.rows`.

        Args:
            table: A mapping of columns, an Arrow table or a data frame, with the column item_id.
            items: Raw ids. An item that the table lacks has no value for any feature.

        Raises:
            ValueError: If the catalogue has no item features, the table has none of their columns, or a value does not
                fit.
        """
        if self.item_features is None:
            raise ValueError("the catalogue has no item features: prepare its log with --items and --item_features")
        columns = as_columns(table) or {}
        names = [name for name in self.item_features.names if name in columns]
        if not names:
            raise ValueError(
                f"expected a table with item_id and {', '.join(self.item_features.names)}; got the columns "
                f"{', '.join(map(str, columns)) or 'of no table'}"
            )
        row_of = {_raw_id(item): row for row, item in enumerate(columns["item_id"])}
        rows = [row_of.get(_raw_id(item)) for item in items]
        values = {name: [None if row is None else columns[name][row] for row in rows] for name in names}
        return self.item_features.rows(values, len(rows))

    def title(self, item: ItemId) -> str | None:
        """The title of an item, by its raw id; None if the item has no title or is unknown."""
        token_id = self._token_ids.get(_raw_id(item))
        return None if self._titles is None or token_id is None else self._titles[token_id - FIRST_ITEM_ID]

    def append_mask(self, token_ids: Sequence[int], max_length: int | None = None) -> list[int]:
        """Keep the newest items of a history and append [MASK]: the input of serving and evaluation.

        Args:
            token_ids: One history of any length, possibly empty, oldest item first.
            max_length: Longest result, the [MASK] included. None: `model_max_length`.

        Returns:
            At most `max_length` token ids, the last of which is [MASK].

        Raises:
            ValueError: If `max_length` is below 2.
        """
        return [*self._newest(token_ids, max_length), MASK_TOKEN_ID]

    def append_mask_type(
        self, event_type_ids: Sequence[int], target_type_id: int, max_length: int | None = None
    ) -> list[int]:
        """The types beside the result of `append_mask`: those of the newest items, and the type of the [MASK].

        Args:
            event_type_ids: The types of the events of one history, oldest first.
            target_type_id: The type of the event that is predicted.
            max_length: See `append_mask`.
        """
        return [*self._newest(event_type_ids, max_length), target_type_id]

    def _newest(self, values: Sequence[int], max_length: int | None) -> Sequence[int]:
        """What of a history fits before the [MASK]."""
        max_length = self.model_max_length if max_length is None else max_length
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, an item and the [MASK] after it; got {max_length}")
        return values[max(len(values) - max_length + 1, int(self.drop_oldest_item)) :]

    def __call__(self, text: Any = None, text_pair: None = None, **kwargs: Any) -> BatchEncoding:
        return super().__call__(text, text_pair, **_cut_by_default(kwargs))

    def encode(self, text: Any, text_pair: None = None, **kwargs: Any) -> list[int]:
        return super().encode(text, text_pair, **_cut_by_default(kwargs))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Number of tokens that a call appends: 1, the [MASK]."""
        return 1

    # This private method is overridden, since all public methods that encode text call it, and a history is no text.
    def _encode_plus(
        self,
        text: Any,
        text_pair: None = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        **kwargs: Any,
    ) -> BatchEncoding:
        for name in ("return_offsets_mapping", "return_overflowing_tokens", "return_token_type_ids"):
            if kwargs.get(name):
                raise ValueError(f"{name} is for text and does not apply to histories of item ids: leave it out")
        if isinstance(text, str) or text_pair is not None:
            raise TypeError(
                "expected a history, a list of item ids, or a list of histories; got "
                f"{text if text_pair is None else text_pair!r}"
            )
        text = list(text)
        is_batch = len(text) > 0 and is_history(text[0])
        for history in text if is_batch else ():
            if not is_history(history):
                raise TypeError(
                    f"expected a list of histories, each a list of item ids; got {history!r} among the histories"
                )
        histories = [self.item_ids_to_token_ids(history) for history in (text if is_batch else [text])]
        rows = self.without_unknown(histories)
        limit = self.model_max_length if max_length is None else max_length
        if truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE:
            limit = max([2, *(len(row) + 1 for row in rows)])  # all items and the [MASK]
        elif self.truncation_side != "left":
            raise ValueError(
                f"histories lose their oldest items; got truncation_side {self.truncation_side!r}: set it to 'left'"
            )
        if add_special_tokens:
            rows = [self.append_mask(row, limit) for row in rows]
        else:
            rows = [row[max(len(row) - limit, 0) :] for row in rows]
        encoding: dict[str, Any] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if return_attention_mask is False:
            del encoding["attention_mask"]
        if return_special_tokens_mask:
            encoding["special_tokens_mask"] = [[int(number < FIRST_ITEM_ID) for number in row] for row in rows]
        if return_length:
            encoding["length"] = [len(row) for row in rows]
        if not is_batch and return_tensors is None:
            encoding = {name: values[0] for name, values in encoding.items()}
        return self.pad(
            encoding,
            padding=padding_strategy,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def without_unknown(self, histories: Sequence[Sequence[int]]) -> list[list[int]]:
        """Remove [UNK] from histories of token ids, with one warning that counts the removed items."""
        known = [[token_id for token_id in row if token_id != UNK_TOKEN_ID] for row in histories]
        num_unknown = sum(map(len, histories)) - sum(map(len, known))
        if num_unknown:
            logger.warning("left out %d items of histories that the catalogue lacks", num_unknown)
        return known

    # This private method is overridden, since `decode` and `batch_decode` both call it.
    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        token_ids = [
            token_id for token_id in map(int, token_ids) if token_id >= FIRST_ITEM_ID or not skip_special_tokens
        ]
        tokens = self.convert_ids_to_tokens(token_ids)
        # A raw id that is spelled like a special token is shown without the backslash that it has in the vocabulary.
        names = [
            token if number < FIRST_ITEM_ID else _from_token(token)
            for number, token in zip(token_ids, tokens, strict=True)
        ]
        return " ".join(names)

    # This private method is overridden, since `save_pretrained` pushes the files before an override could add one.
    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        try:
            file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        except Exception as error:
            # The library tokenizers raises `Exception` itself for a full disk and the like.
            if type(error) is Exception and "(os error " in str(error):
                raise OSError(f"cannot write the tokenizer into {save_directory}: {error}") from error
            raise
        content = {"counts": self._counts, "titles": self._titles}
        contents = {"items.json": json.dumps(content, ensure_ascii=False)}
        if self.item_features is not None:
            contents["item_features.json"] = self.item_features.to_json()
        for name, text in contents.items():
            path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{name}"
            path.write_text(text, "utf-8")
            file_names = (*file_names, str(path))
        return file_names

    def _read_vocabulary(self) -> None:
        first = FIRST_ITEM_ID
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        expected = [*SPECIAL_TOKENS.values()]
        if [token for token, _ in vocabulary[:first]] != expected or any(
            number != place for place, (_, number) in enumerate(vocabulary)
        ):
            raise ValueError(
                f"token ids must be the numbers from 0 on, and the first {first} {', '.join(expected)}; got "
                f"{vocabulary[:4]!r:.80}"
            )
        self._raw_ids = [_from_token(token) for token, _ in vocabulary[first:]]
        self._token_ids = {raw_id: token_id for token_id, raw_id in enumerate(self._raw_ids, start=first)}

    def _set(self, titles: Mapping[Any, str] | None, counts: Mapping[Any, int] | None) -> None:
        if counts is not None:
            known = {_raw_id(item): int(count) for item, count in counts.items()}
            self._counts = [known.get(raw_id, 0) for raw_id in self._raw_ids]
        if titles is not None:
            # Data frames represent a missing title as NaN.
            named = {_raw_id(item): title for item, title in titles.items() if isinstance(title, str)}
            old = self._titles or [None] * self.num_items
            self._titles = [named.get(raw_id, title) for raw_id, title in zip(self._raw_ids, old, strict=True)]


def _check_values(name: str, values: Any, num_items: int, kind: Any) -> None:
    """Raise ValueError if a list of items.json is not one of a value for each item."""
    if values is None:
        return
    if not isinstance(values, list) or len(values) != num_items:
        got = f"{len(values)} values" if isinstance(values, list) else f"{values!r:.80}"
        raise ValueError(f"{name} of items.json must be a list of {num_items} values, one for each item; got {got}")
    wrong = next((value for value in values if not isinstance(value, kind) or isinstance(value, bool)), None)
    if wrong is not None or (kind is int and None in values):
        raise ValueError(
            f"{name} of items.json has {wrong!r:.80}; expected {'text' if kind is not int else 'integers'}"
        )


def _checked_types(event_types: Sequence[str], targets: Sequence[str] | None) -> dict[str, list[str]]:
    """The arguments of the tokenizer about event types. Raises if a target is not among the types."""
    for names in (event_types, () if targets is None else targets):
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"event types must be a list of texts; got {names!r:.80}")
    types = list(event_types)
    targets = types if targets is None else list(targets)
    missing = [name for name in targets if name not in types]
    if missing or not targets:
        raise ValueError(
            f"target_event_types must be among the event types {', '.join(types)}; got {', '.join(missing) or 'none'}"
        )
    return {"event_types": types, "target_event_types": targets}


def _backend(vocabulary: Mapping[str, int]) -> Tokenizer:
    return Tokenizer(WordLevel(dict(vocabulary), unk_token=SPECIAL_TOKENS["unk_token"]))


def _raw_id(item: Any) -> str:
    if isinstance(item, str):
        return item
    # Integers of numpy and torch have __index__ as well. Booleans, floats and arrays have it too, but are not ids.
    is_bool = isinstance(item, bool) or str(getattr(item, "dtype", "")).endswith("bool")
    if hasattr(item, "__index__") and not is_bool and getattr(item, "ndim", 0) == 0:
        with contextlib.suppress(TypeError):
            return str(item.__index__())
    raise TypeError(f"an item id is a string or an integer; got {item!r} of type {type(item).__name__}")


def _raw_ids(items: Iterable[ItemId]) -> list[str]:
    _check_list(items)
    return list(map(_raw_id, items))


def _check_list(items: Any) -> None:
    if isinstance(items, str | bytes):
        raise TypeError(f"expected a list of item ids; got {items!r}: did you mean [{items!r}]?")


def _cut_by_default(options: dict[str, Any]) -> dict[str, Any]:
    """Turn truncation on for calls that append [MASK], unless they set it."""
    if options.get("truncation") is None and options.get("add_special_tokens", True):
        options["truncation"] = True
    return options


def is_history(value: Any) -> bool:
    """Whether a value is a history, not a single id."""
    # Strings are iterable, and tensors of a single number have __iter__. Both are single ids.
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def _to_token(raw_id: str) -> str:
    return "\\" + raw_id if SPELLED_LIKE_SPECIAL.fullmatch(raw_id) else raw_id


def _from_token(token: str) -> str:
    return token[1:] if SPELLED_LIKE_SPECIAL.fullmatch(token) else token
