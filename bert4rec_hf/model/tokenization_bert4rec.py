# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Raw item ids <-> token ids, titles and training counts, and the one function that appends [MASK]."""

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

logger = logging.getLogger(__name__)

# In the order of their ids.
SPECIAL_TOKENS = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
# A raw id that is spelled like a special token gets a backslash more in the vocabulary, and loses it on the way out.
SPELLED_LIKE_SPECIAL = re.compile(r"\\*\[(PAD|MASK|UNK)\]")

ItemId = str | int


class Bert4RecTokenizer(PreTrainedTokenizerFast):
    r"""
    The catalogue: raw item ids <-> token ids.

    [PAD] is 0, [MASK] 1, [UNK] 2; items follow, sorted by raw id when the catalogue is made, and in the order of
    their arrival afterwards. Raw ids are strings (integers are taken too and come back as strings) and are mapped
    whole, whatever spaces, quotes or unicode they hold.

        tokenizer = Bert4RecTokenizer.from_items(["50", "318", "296"], titles={"50": "Star Wars (1977)"})
        tokenizer([["318", "50"], ["296"]], padding=True, return_tensors="pt")  # ends with [MASK]: for `recommend`

    It keeps the newest items that fit into `max_length` (default: `model_max_length`) beside the [MASK];
    `truncation=False` keeps all items. Called with `add_special_tokens=False` it appends no [MASK], and cuts only with
    `truncation=True`. A flat list is one history, a list of lists a batch; unknown items are left out, with one warning
    that names how many. With `drop_oldest_item`, which is for converted models, the oldest item of a history is always
    left out before the [MASK] is appended.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "items_file": "items.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: Mapping[str, int] | None = None,
        items_file: str | None = None,
        drop_oldest_item: bool = False,
        **kwargs: Any,
    ):
        if vocab is None:
            raise ValueError(
                "expected a catalogue: Bert4RecTokenizer.from_items(items) makes one, and "
                "tokenizer.save_pretrained(folder) puts it beside its model"
            )
        # transformers hands over `vocab` when it reads tokenizer.json.
        self._tokenizer = _backend(vocab)
        # It names code in the folder that was read, and would be wrong in a copy without it; where the code comes
        # along, Transformers writes it anew.
        kwargs.pop("auto_map", None)
        defaults = SPECIAL_TOKENS | {"truncation_side": "left", "padding_side": "right"}
        super().__init__(**(defaults | kwargs), drop_oldest_item=drop_oldest_item)
        self.drop_oldest_item = drop_oldest_item
        content = json.loads(Path(items_file).read_text("utf-8")) if items_file else {}
        self._counts: list[int] | None = content.get("counts")
        self._titles: list[str | None] | None = content.get("titles")
        self._read_vocabulary()

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
    ) -> "Bert4RecTokenizer":
        """A tokenizer for a catalogue.

        Args:
            items: Raw ids, each once.
            titles: By raw id, for as many items as have one.
            counts: How often each item occurs in the training data; an item not named occurs 0 times.
            model_max_length: Longest input of the model, the [MASK] included.
            sort: Whether token ids go by raw id; False: in the given order, which a converted model has learnt.
            drop_oldest_item: Whether `append_mask` always leaves out the oldest item, as RecBole does.

        Raises:
            ValueError: If there are no items, or one occurs twice.
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
        tokenizer = cls(vocabulary, drop_oldest_item=drop_oldest_item, **options)
        tokenizer._set(titles, counts)
        return tokenizer

    @property
    def num_items(self) -> int:
        return len(self._raw_ids)

    @property
    def items(self) -> list[str]:
        """Raw ids in the order of their token ids, the first of which is 3."""
        return list(self._raw_ids)

    @property
    def counts(self) -> list[int] | None:
        """How often each item occurs in the training data, in the order of `items`."""
        return self._counts

    @property
    def titles(self) -> list[str | None] | None:
        """In the order of `items`; None where an item has none."""
        return self._titles

    def set_counts(self, counts: Mapping[Any, int]) -> None:
        """Replace the training counts; an item that is not named occurs 0 times."""
        self._set(None, counts)

    def add_items(self, items: Iterable[ItemId], titles: Mapping[Any, str] | None = None) -> int:
        """Append the items that are new, sorted by raw id; nothing is renumbered.

        Returns:
            How many were new. The model then needs `resize_token_embeddings(len(tokenizer))`.
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
        """Of the special tokens alone, for Transformers' own calls; a catalogue grows by `add_items`."""
        tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        others = [token for token in map(str, tokens) if token not in SPECIAL_TOKENS.values()]
        if others:
            raise ValueError(
                f"expected no tokens but {', '.join(SPECIAL_TOKENS.values())}; got {others[0]!r}: "
                "model.add_items(tokenizer, items) adds items to catalogue and model"
            )
        return super().add_tokens(new_tokens, special_tokens)

    def item_ids_to_token_ids(self, items: Iterable[ItemId]) -> list[int]:
        """Token ids of raw ids; 2, that of [UNK], for an item that the catalogue lacks."""
        _check_list(items)
        known, unknown = self._token_ids, UNK_TOKEN_ID
        return [known.get(item if type(item) is str else _raw_id(item), unknown) for item in items]

    def token_ids_to_item_ids(self, token_ids: Iterable[int]) -> list[str]:
        """Raw ids of token ids.

        Raises:
            ValueError: If a token id is no item's.
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

    def title(self, item: ItemId) -> str | None:
        """The title of a raw id, None if it has none."""
        token_id = self._token_ids.get(_raw_id(item))
        return None if self._titles is None or token_id is None else self._titles[token_id - FIRST_ITEM_ID]

    def append_mask(self, token_ids: Sequence[int], max_length: int | None = None) -> list[int]:
        """The newest items with one [MASK] behind them: what serving and evaluation predict from.

        Args:
            token_ids: One history of any length, possibly empty.
            max_length: Of the result; None: `model_max_length`.

        Raises:
            ValueError: If `max_length` is below 2.
        """
        max_length = self.model_max_length if max_length is None else max_length
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, an item and the [MASK] after it; got {max_length}")
        newest = token_ids[max(len(token_ids) - max_length + 1, int(self.drop_oldest_item)) :]
        return [*newest, MASK_TOKEN_ID]

    def __call__(self, text: Any = None, text_pair: None = None, **kwargs: Any) -> BatchEncoding:
        return super().__call__(text, text_pair, **_cut_by_default(kwargs))

    def encode(self, text: Any, text_pair: None = None, **kwargs: Any) -> list[int]:
        return super().encode(text, text_pair, **_cut_by_default(kwargs))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """1, the [MASK]."""
        return 1

    # Private, since all public ways to encode text end here; a history is no text.
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
                raise ValueError(f"{name} is for text; a history of item ids has no such thing: leave it out")
        if isinstance(text, str) or text_pair is not None:
            raise TypeError(
                "expected a history, a list of item ids, or a list of histories; got "
                f"{text if text_pair is None else text_pair!r}"
            )
        text = list(text)
        is_batch = len(text) > 0 and is_history(text[0])
        for history in text if is_batch else ():
            if not is_history(history):
                raise TypeError(f"expected a list of histories, lists of item ids; got {history!r} among them")
        histories = [self.item_ids_to_token_ids(history) for history in (text if is_batch else [text])]
        rows = self.without_unknown(histories)
        limit = self.model_max_length if max_length is None else max_length
        if truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE:
            limit = max([2, *(len(row) + 1 for row in rows)])  # all items and the [MASK]
        elif self.truncation_side != "left":
            raise ValueError(f"histories lose their oldest items; got truncation_side {self.truncation_side!r}")
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
        """Histories of token ids without [UNK]; one warning names how many were left out."""
        known = [[token_id for token_id in row if token_id != UNK_TOKEN_ID] for row in histories]
        num_unknown = sum(map(len, histories)) - sum(map(len, known))
        if num_unknown:
            logger.warning("left out %d items of histories that the catalogue lacks", num_unknown)
        return known

    # Private, since `decode` and `batch_decode` both end here.
    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        token_ids = [
            token_id for token_id in map(int, token_ids) if token_id >= FIRST_ITEM_ID or not skip_special_tokens
        ]
        tokens = self.convert_ids_to_tokens(token_ids)
        # A raw id that is spelled like a special token is shown as it is, not as the vocabulary escapes it.
        names = [
            token if number < FIRST_ITEM_ID else _from_token(token)
            for number, token in zip(token_ids, tokens, strict=True)
        ]
        return " ".join(names)

    # Private, since `save_pretrained` pushes what it has written before an override of it could add a file.
    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}items.json"
        content = {"counts": self._counts, "titles": self._titles}
        path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        return (*file_names, str(path))

    def _read_vocabulary(self) -> None:
        first = FIRST_ITEM_ID
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        self._raw_ids = [_from_token(token) for token, _ in vocabulary[first:]]
        self._token_ids = {raw_id: token_id for token_id, raw_id in enumerate(self._raw_ids, start=first)}

    def _set(self, titles: Mapping[Any, str] | None, counts: Mapping[Any, int] | None) -> None:
        if counts is not None:
            known = {_raw_id(item): int(count) for item, count in counts.items()}
            self._counts = [known.get(raw_id, 0) for raw_id in self._raw_ids]
        if titles is not None:
            # A missing title of a data frame is NaN.
            named = {_raw_id(item): title for item, title in titles.items() if isinstance(title, str)}
            old = self._titles or [None] * self.num_items
            self._titles = [named.get(raw_id, title) for raw_id, title in zip(self._raw_ids, old, strict=True)]


def _backend(vocabulary: Mapping[str, int]) -> Tokenizer:
    return Tokenizer(WordLevel(dict(vocabulary), unk_token=SPECIAL_TOKENS["unk_token"]))


def _raw_id(item: Any) -> str:
    if isinstance(item, str):
        return item
    # numpy's and torch's integers have __index__ as well; booleans do, but are no ids.
    is_bool = isinstance(item, bool) or str(getattr(item, "dtype", "")).endswith("bool")
    if hasattr(item, "__index__") and not is_bool:
        return str(item.__index__())
    raise TypeError(f"an item id is a string or an integer; got {item!r} of type {type(item).__name__}")


def _raw_ids(items: Iterable[ItemId]) -> list[str]:
    _check_list(items)
    return list(map(_raw_id, items))


def _check_list(items: Any) -> None:
    if isinstance(items, str | bytes):
        raise TypeError(f"expected a list of item ids; got {items!r}: did you mean [{items!r}]?")


def _cut_by_default(options: dict[str, Any]) -> dict[str, Any]:
    """Cut a history that is to end with [MASK], unless the call says otherwise."""
    if options.get("truncation") is None and options.get("add_special_tokens", True):
        options["truncation"] = True
    return options


def is_history(value: Any) -> bool:
    """Whether a value is a history, not an id."""
    # A string can be iterated over as well, and a tensor of one number says so; either is one id.
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def _to_token(raw_id: str) -> str:
    return "\\" + raw_id if SPELLED_LIKE_SPECIAL.fullmatch(raw_id) else raw_id


def _from_token(token: str) -> str:
    return token[1:] if SPELLED_LIKE_SPECIAL.fullmatch(token) else token
