# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""`ExplanationMixin`: similar items, and the items of a history that carry a recommendation."""

from typing import Any

import torch
from torch import nn

from .configuration_bert4rec import FIRST_ITEM_ID
from .recommendation import CATALOGUE_CHUNK_SIZE, RecommendationMixin, best_of, gather_weights

# Number of newest items of a history that an explanation leaves out one by one.
NUM_EXPLAINED_ITEMS = 50
# An item vector that is nearer to the mean vector than this share of its length has no direction. The vectors of items
# that `add_items` has added are the mean, and differ from it by rounding errors only.
SHORTEST_DIRECTION = 0.02


class ExplanationMixin(RecommendationMixin):
    """Adds `similar_items` and `explain` to the methods of `RecommendationMixin`."""

    @torch.no_grad()
    def similar_items(
        self,
        item_ids: torch.Tensor,
        *,
        top_k: int = 10,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the items that are most similar to each of some items.

        The similarity of item b to item a is cos(w(a) - m, w(b) - m) + s(a, b) / S. Here, m is the mean of all item
        vectors w, s(a, b) is the successor score of b after a, and S is the highest successor score of the catalogue.
        So each part is at most 1. A model without transitions has the first part only.

        Args:
            item_ids: (batch,) token ids of items.
            top_k: Number of similar items, at most the number of token ids or candidates.
            candidate_ids: (C,) or (batch, C) token ids to choose from, each once, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) token ids to leave out, padded with 0, or (1, E) for all rows. An item is never
                similar to itself.

        Returns:
            scores: (batch, k) float32 similarities in descending order, -inf where no item is left.
            item_ids: (batch, k) int64 token ids, 0 where no item is left.

        Raises:
            ValueError: If `top_k` is below 1, `item_ids` has another shape or a special token, an id is beyond the
                vocabulary, or a weight is NaN.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        if item_ids.dim() != 1:
            raise ValueError(f"item_ids must have shape (batch,), one item a row; got {tuple(item_ids.shape)}")
        for ids in (item_ids, candidate_ids, exclude_ids):
            self._check_ids(ids)
        if (item_ids < FIRST_ITEM_ID).any():
            raise ValueError(
                f"item_ids must be items, whose token ids start at {FIRST_ITEM_ID}; got {int(item_ids.min())}, a "
                "special token"
            )
        gather_weights(self)
        itself = item_ids.unsqueeze(1)
        excluded = itself if exclude_ids is None else torch.cat((itself, exclude_ids.expand(len(itself), -1)), dim=1)
        pairs = self.history_scores.successors(item_ids)
        scores = torch.empty(len(item_ids), 0, device=item_ids.device)
        found = torch.empty(len(item_ids), 0, dtype=torch.long, device=item_ids.device)
        with torch.autocast(item_ids.device.type, enabled=False):
            mean = self._sum_of_vectors(range(FIRST_ITEM_ID, self.config.vocab_size))
            mean = mean / (self.config.vocab_size - FIRST_ITEM_ID)
            directions = self._directions(item_ids, mean).unsqueeze(1)
            chunks = self._chunks(
                directions,
                pairs,
                candidate_ids,
                excluded,
                scores_of=lambda rows, ids: rows @ self._directions(ids, mean).mT,
            )
            for chunk_scores, chunk_ids in chunks:
                scores, found = best_of(top_k, scores, found, chunk_scores, chunk_ids)
        return scores, found.masked_fill(scores.isneginf(), 0)

    @torch.no_grad()
    def explain(
        self,
        tokenizer: Any,
        history_ids: torch.Tensor,
        item_ids: torch.Tensor,
        *,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
        history_type_ids: torch.Tensor | None = None,
        target_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How much each item of a history carries the scores of some items.

        The contribution of an item has two parts, both in the unit of the scores.

        - The network's part comes from leaving the item out, as occlusion does for a region of an image (Zeiler &
          Fergus, ECCV 2014): the centred score for the history minus the centred score for the history without all
          occurrences of the item. The newest items of what is left are the input, as in serving. A centred score is the
          network's score minus the mean of the network's scores of all candidates, because a change of all scores alike
          changes no recommendation. The candidates are those of `recommend`; leaving an item out does not make it a
          candidate. The part is 0 for items that are older than the newest `NUM_EXPLAINED_ITEMS` of the history, and
          for items that the model does not read.
        - The part of the counted scores is exact, since they are sums over the items of the history: see
          `HistoryScores.contributions`.

        The network's parts do not sum to the score, because the network is no sum over items: of two items that say
        the same, each may contribute little.

        Args:
            tokenizer: The model's `Bert4RecTokenizer`, which appends the [MASK].
            history_ids: (batch, H) token ids of the uncut histories, oldest first, padded with 0 on either side.
                Special tokens are left out.
            item_ids: (batch, k) token ids of the items to explain, for example from `recommend`, padded with 0.
            candidate_ids: (C,) or (batch, C) token ids that were chosen from, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) token ids that are never recommended, padded with 0, or (1, E) for all rows.
            history_type_ids: (batch, H) types of the events of the histories. None: events have no types.
            target_type_ids: (batch,) the type that is recommended for. Needed with `history_type_ids`.

        Returns:
            source_ids: (batch, M) int64 token ids of the distinct items of each history, newest first, padded with 0.
            contributions: (batch, k, M) float32, 0 for padding. The contributions of a candidate that is the only one
                have no part of the network.

        Raises:
            ValueError: If the model is in training mode, the shapes do not match, or an id is beyond the vocabulary.
        """
        if history_ids.dim() != 2 or item_ids.dim() != 2 or len(history_ids) != len(item_ids):
            raise ValueError(
                "history_ids and item_ids must have shapes (batch, H) and (batch, k); got "
                f"{tuple(history_ids.shape)} and {tuple(item_ids.shape)}"
            )
        for ids in (history_ids, item_ids, candidate_ids, exclude_ids):
            self._check_ids(ids)
        gather_weights(self)
        histories = [[token_id for token_id in row if token_id >= FIRST_ITEM_ID] for row in history_ids.tolist()]
        sources = [torch.tensor(list(dict.fromkeys(reversed(history))), dtype=torch.long) for history in histories]
        source_ids = nn.utils.rnn.pad_sequence(sources, batch_first=True) if sources else torch.zeros(0, 0).long()
        source_ids = source_ids.to(history_ids.device)
        types, targets = None, [0] * len(histories)
        if history_type_ids is not None:
            if target_type_ids is None:
                raise ValueError("history_type_ids need target_type_ids, the types that are recommended for; got none")
            types = [
                [kind for item, kind in zip(*row, strict=True) if item >= FIRST_ITEM_ID]
                for row in zip(history_ids.tolist(), history_type_ids.tolist(), strict=True)
            ]
            targets = target_type_ids.tolist()
        of_types = history_type_ids, target_type_ids
        contributions = self.history_scores.contributions(history_ids, item_ids, source_ids, *of_types)
        catalogue = range(FIRST_ITEM_ID, self.config.vocab_size)
        total = self._sum_of_vectors(catalogue if candidate_ids is None else range(0))
        for row, history in enumerate(histories):
            excluded = item_ids[row, :0] if exclude_ids is None else exclude_ids.expand(len(histories), -1)[row]
            excluded = excluded[excluded >= FIRST_ITEM_ID].unique()
            if candidate_ids is None:
                mean = (total - self._sum_of_vectors(excluded)) / max(1, len(catalogue) - len(excluded))
            else:
                candidates = candidate_ids.expand(len(histories), -1)[row]
                candidates = candidates[(candidates >= FIRST_ITEM_ID) & ~torch.isin(candidates, excluded)]
                mean = self._sum_of_vectors(candidates) / max(1, len(candidates))
            of_row = None if types is None else types[row]
            changes = self._changes_without_items(tokenizer, history, history_ids.device, of_row, targets[row])
            with torch.autocast(history_ids.device.type, enabled=False):
                vectors = self._item_rows(item_ids[row])[0].float() - mean
                # The biases are the same with and without an item, so they cancel.
                contributions[row, :, : len(changes)] += vectors @ changes.mT
        return source_ids, contributions * (item_ids > 0).unsqueeze(2)

    def _changes_without_items(
        self,
        tokenizer: Any,
        history: list[int],
        device: torch.device,
        types: list[int] | None = None,
        target_type: int = 0,
    ) -> torch.Tensor:
        """(m, hidden size) float32: the state of a history minus its states without each of its newest distinct items.

        Args:
            tokenizer: The model's `Bert4RecTokenizer`.
            history: Token ids of items, oldest first.
            device: The device of the result.
            types: The types of the events. None: they have none.
            target_type: The type that is recommended for.
        """
        left_out = dict.fromkeys(reversed(history[-NUM_EXPLAINED_ITEMS:]))
        if not left_out:
            return torch.zeros(0, self.config.hidden_size, device=device)
        events = list(zip(history, types or [0] * len(history), strict=True))
        shortened = [[event for event in events if event[0] != item] for item in left_out]
        length = self.config.max_position_embeddings
        inputs = [
            (
                tuple(tokenizer.append_mask([item for item, _ in kept], length)),
                None
                if types is None
                else tuple(tokenizer.append_mask_type([kind for _, kind in kept], target_type, length)),
            )
            for kept in (events, *shortened)
        ]
        # An item that the model does not read changes no input. Equal inputs get one state, so that its change is 0.
        places = {row: place for place, row in enumerate(dict.fromkeys(inputs))}
        rows = nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in places], batch_first=True).to(device)
        event_type_ids = None
        if types is not None:
            of_rows = [torch.tensor(kinds) for _, kinds in places]
            event_type_ids = nn.utils.rnn.pad_sequence(of_rows, batch_first=True).to(device)
        states = self.mask_states(rows, event_type_ids=event_type_ids).squeeze(1).float()
        states = states[[places[row] for row in inputs]]
        return states[:1] - states[1:]

    def _sum_of_vectors(self, item_ids: torch.Tensor | range) -> torch.Tensor:
        """(hidden size,) float32 the sum of the item vectors of a range or of (C,) token ids."""
        starts = range(0, max(1, len(item_ids)), CATALOGUE_CHUNK_SIZE)
        chunks = (item_ids[start : start + CATALOGUE_CHUNK_SIZE] for start in starts)
        return torch.stack([self._item_rows(chunk)[0].float().sum(dim=0) for chunk in chunks]).sum(dim=0)

    def _directions(self, item_ids: torch.Tensor | range, mean: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) the item vectors minus their mean, scaled to length 1."""
        vectors = self._item_rows(item_ids)[0].float() - mean
        shortest = (SHORTEST_DIRECTION * mean.norm()).clamp(min=1e-12)
        return vectors.div_(vectors.norm(dim=-1, keepdim=True).maximum(shortest))
