# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Changes of a model's catalogue: new items, and vectors that are made from the features of items."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .configuration_bert4rec import FIRST_ITEM_ID, UNK_TOKEN_ID, Bert4RecConfig
from .item_features import ItemProjection, as_columns


class CatalogueMixin:
    """Adds `add_items` and `set_vectors_from_features` to a model with item vectors, biases and a projection."""

    config: Bert4RecConfig
    item_bias: Any
    item_projection: ItemProjection
    get_input_embeddings: Callable[[], Any]
    resize_token_embeddings: Callable[..., Any]

    @torch.no_grad()
    def add_items(self, tokenizer: Any, items: Any, titles: Mapping[Any, str] | None = None) -> int:
        """Add new items to the catalogue: to tokenizer, item vectors and biases together.

        If the model has item features and gets a table, the vector and the bias of a new item are made from its
        features, and `config.new_item_offset` is added to the bias. So it is recommended, and may be in histories, at
        once. Otherwise a new item gets the mean vector and the mean bias of the old items, so that before training it
        is recommended no more often than an average item. It has no transitions. Token ids, weights and counts of old
        items do not change.

        Args:
            tokenizer: The model's `Bert4RecTokenizer`.
            items: Raw ids, or a table of items: a mapping of columns, an Arrow table or a data frame, with the column
                item_id. Known items among them are ignored. A column title has titles.
            titles: Titles by raw id, for new or old items.

        Returns:
            The number of new items.

        Raises:
            ValueError: If the tokenizer is not the model's, or if the table has no column item_id or values that do not
                fit the features.
        """
        old_size = self.config.vocab_size
        if len(tokenizer) != old_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} token ids, the model {old_size}: give the tokenizer of the "
                "model's folder"
            )
        columns = as_columns(items)
        if columns is not None:
            if "item_id" not in columns:
                raise ValueError(f"a table of items needs the column item_id; got {', '.join(map(str, columns))}")
            items = columns["item_id"]
            titles = dict(zip(items, columns.get("title", ()), strict=False)) | dict(titles or {})
            token_ids = tokenizer.item_ids_to_token_ids(items)
            new = [item for item, token_id in zip(items, token_ids, strict=True) if token_id == UNK_TOKEN_ID]
            if self.config.num_item_features and new:  # values that do not fit are found before anything changes
                self._check_features(tokenizer)
                tokenizer.feature_rows(columns, new)
        num_new = tokenizer.add_items(items, titles)
        if num_new:
            self.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for table in (self.get_input_embeddings().weight, self.item_bias.weight):
                table[old_size:] = table[FIRST_ITEM_ID:old_size].mean(dim=0)
            if columns is not None and self.config.num_item_features:
                self.set_vectors_from_features(tokenizer, columns, range(old_size, len(tokenizer)))
        return num_new

    @torch.no_grad()
    def set_vectors_from_features(self, tokenizer: Any, table: Any, token_ids: Iterable[int]) -> None:
        """Set the vectors and biases of items to what their features give; see `add_items`.

        Args:
            tokenizer: The model's `Bert4RecTokenizer`.
            table: A table of items with the column item_id. Items that it lacks have no value for any feature.
            token_ids: Token ids of the items.
        """
        places = torch.as_tensor(list(token_ids))
        if not len(places):
            return
        self._check_features(tokenizer)
        vectors, biases = self.item_projection(
            tokenizer.feature_rows(table, tokenizer.token_ids_to_item_ids(places.tolist()))
        )
        for parameter, values in (
            (self.get_input_embeddings().weight, vectors),
            (self.item_bias.weight, biases + self.config.new_item_offset),
        ):
            parameter[places.to(parameter.device)] = values.to(parameter)

    def _check_features(self, tokenizer: Any) -> None:
        """Raise ValueError if the features of a tokenizer are not those of the model."""
        features = tokenizer.item_features
        if features is not None and features.size != self.config.num_item_features:
            raise ValueError(
                f"the item features of the tokenizer make {features.size} numbers of an item, the model reads "
                f"{self.config.num_item_features}: give the tokenizer of the model's folder"
            )
