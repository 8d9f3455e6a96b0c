# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""`RecommendationMixin`: top-k recommendations and ranks over the catalogue, similar items, and explanations."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID
from .history_scores import HistoryScores, Pairs, add_to_scores, values_of
from .losses import IGNORE_INDEX

# Chunk size over the catalogue.
CATALOGUE_CHUNK_SIZE = 2**16
# Number of positions that are encoded at once on a CPU, so that the activations fit into its caches.
POSITIONS_ENCODED_AT_ONCE = 2**13
# Candidates given per row are chunked to this number of gathered values, a quarter of a GiB.
MAX_GATHERED_VALUES = 2**26
# Number of newest items of a history that an explanation leaves out one by one.
NUM_EXPLAINED_ITEMS = 50
# An item vector that is nearer to the mean vector than this share of its length has no direction. The vectors of items
# that `add_items` has added are the mean, and differ from it by rounding errors only.
SHORTEST_DIRECTION = 0.02


class RecommendationMixin:
    """Methods that use a trained model: `recommend`, `rank`, `search`, `explain`, `similar_items`, and vectors.

    The score of an item is the network's score, h · w(item) + b(item), plus the scores that the history adds to it
    (`HistoryScores`). The mixin is for a `PreTrainedModel` with `history_scores`, `_item_rows` and `_scores`, as
    `GenerationMixin` is for models that generate.
    """

    config: Any
    history_scores: HistoryScores
    training: bool
    __call__: Callable[..., Any]
    _item_rows: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    _scores: Callable[..., torch.Tensor]

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        history_ids: torch.Tensor | None = None,
        top_k: int = 10,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
        index: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the items with the highest scores at the [MASK] of each history.

        Args:
            input_ids: (batch, length) token ids with one [MASK] per row, the position to predict.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.
            history_ids: (batch, H) token ids of the uncut histories, padded with 0, for `HistoryScores`, which also
                reads items before the input. None: the items of `input_ids`.
            top_k: Number of items, at most the number of token ids or candidates.
            candidate_ids: (C,) or (batch, C) token ids to choose from, each once, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) token ids never to recommend, padded with 0, or (1, E) for all rows.
            index: An `ItemIndex` of the model, for approximate search. It is not used with candidates. The items that
                it finds, and the items that the history adds scores to, are scored exactly.

        Returns:
            scores: (batch, k) float32 logits in descending order, -inf where no item is left.
            item_ids: (batch, k) int64 token ids, 0 where no item is left.

        Raises:
            ValueError: If `top_k` is below 1, a history has no [MASK], an id is beyond the vocabulary, or a score
                is NaN; if the index has another number of items.
        """
        states = self.mask_states(input_ids, attention_mask)
        history_ids = _uncut(input_ids, attention_mask, history_ids)
        if index is not None and candidate_ids is None and len(states):
            candidate_ids = self._nearest(index, states, history_ids, top_k, exclude_ids)
        _, scores, item_ids = self.search(
            states, history_ids, top_k=top_k, candidate_ids=candidate_ids, exclude_ids=exclude_ids
        )
        return scores, item_ids

    @torch.no_grad()
    def rank(
        self,
        input_ids: torch.Tensor,
        target_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        history_ids: torch.Tensor | None = None,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rank of each target in the list of `recommend`, from 1. A tie counts against the target.

        Args:
            input_ids: (batch, length) token ids with one [MASK] per row, the position to predict.
            target_ids: (batch,) token ids, -100 for a target outside the catalogue.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.
            history_ids: (batch, H) token ids of the uncut histories, padded with 0. None: the items of `input_ids`.
            candidate_ids: (C,) or (batch, C) token ids to rank the target among, padded with 0. The target need not be
                one of them. None: the catalogue.
            exclude_ids: (batch, E) token ids never to recommend, padded with 0, or (1, E) for all rows.

        Returns:
            (batch,) int64 ranks; 0 for a target that is excluded or outside the catalogue.

        Raises:
            ValueError: If a history has no [MASK], an id is beyond the vocabulary, a score is NaN, or `target_ids` has
                another shape.
        """
        states = self.mask_states(input_ids, attention_mask)
        ranks, _, _ = self.search(
            states,
            _uncut(input_ids, attention_mask, history_ids),
            target_ids=target_ids,
            candidate_ids=candidate_ids,
            exclude_ids=exclude_ids,
        )
        return ranks

    @torch.no_grad()
    def search(
        self,
        prediction_states: torch.Tensor,
        history_ids: torch.Tensor | None = None,
        *,
        target_ids: torch.Tensor | None = None,
        top_k: int | None = None,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`rank` and `recommend` from encoded histories, in one pass over the catalogue.

        Args:
            prediction_states: (batch, 1, hidden size) states from `mask_states` or `forward`.
            history_ids: (batch, H) token ids of the uncut histories, padded with 0. None is allowed only for a model
                without `HistoryScores`.
            target_ids: (batch,) token ids, -100 for a target outside the catalogue. None: no ranks.
            top_k: Number of items. None: no items.
            candidate_ids: (C,) or (batch, C) token ids to choose from, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) token ids never to recommend, padded with 0, or (1, E) for all rows.

        Returns:
            ranks: (batch,) int64, all 0 without targets.
            scores: (batch, k) float32, with k = 0 without `top_k`.
            item_ids: (batch, k) int64 token ids.

        Raises:
            ValueError: If `top_k` is below 1, an id is beyond the vocabulary, `target_ids` has another shape, a score
                is NaN, or `history_ids` is missing.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        for ids in (exclude_ids, candidate_ids, history_ids):
            self._check_ids(ids)
        if history_ids is None and not self.history_scores.is_empty:
            raise ValueError("the model has transitions or repeats: give history_ids, whose items add to the scores")
        _gather_weights(self)
        device, batch_size = prediction_states.device, len(prediction_states)
        if exclude_ids is not None:
            exclude_ids = exclude_ids.expand(batch_size, -1)
        pairs = None if history_ids is None else self.history_scores(history_ids)
        ranks = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        target_scores = torch.full((batch_size, 1), -torch.inf, device=device)
        scores = torch.empty(batch_size, 0, device=device)
        item_ids = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        if target_ids is not None:
            if target_ids.shape != (batch_size,):
                raise ValueError(
                    f"target_ids must have shape ({batch_size},), one for each history; got {tuple(target_ids.shape)}"
                )
            self._check_ids(target_ids.masked_fill(target_ids == IGNORE_INDEX, 0))
            target_ids = target_ids.unsqueeze(1)
            if candidate_ids is not None:
                # The target becomes the first candidate, and occurs only there.
                others = candidate_ids.expand(batch_size, -1)
                others = others.masked_fill(others == target_ids, 0)
                candidate_ids = torch.cat((target_ids.clamp(min=0), others), dim=1)
            elif self.config.vocab_size > CATALOGUE_CHUNK_SIZE:
                # The target's score comes from the same product as the scores it is compared with, so that ties are
                # exact.
                for chunk_scores, chunk_ids in self._chunks(prediction_states, pairs, None, exclude_ids):
                    target_scores = _target_scores(target_scores, target_ids, chunk_scores, chunk_ids)
        chunks = self._chunks(prediction_states, pairs, candidate_ids, exclude_ids)
        for number, (chunk_scores, chunk_ids) in enumerate(chunks):
            if target_ids is not None:
                if candidate_ids is None or number == 0:
                    target_scores = _target_scores(target_scores, target_ids, chunk_scores, chunk_ids)
                # The comparison is stored as floats, since a sum of booleans would first copy them to int64.
                reached = torch.ge(chunk_scores, target_scores, out=torch.empty_like(chunk_scores))
                ranks += reached.sum(dim=1, keepdim=True).long()
            if top_k is not None:
                scores, item_ids = _best(top_k, scores, item_ids, chunk_scores, chunk_ids)
        ranks = ranks.masked_fill(target_scores.isneginf(), 0).squeeze(1)
        return ranks, scores, item_ids.masked_fill(scores.isneginf(), 0)

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
        _gather_weights(self)
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
                directions, pairs, candidate_ids, excluded, lambda rows, ids: rows @ self._directions(ids, mean).mT
            )
            for chunk_scores, chunk_ids in chunks:
                scores, found = _best(top_k, scores, found, chunk_scores, chunk_ids)
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
        _gather_weights(self)
        histories = [[token_id for token_id in row if token_id >= FIRST_ITEM_ID] for row in history_ids.tolist()]
        sources = [torch.tensor(list(dict.fromkeys(reversed(history))), dtype=torch.long) for history in histories]
        source_ids = nn.utils.rnn.pad_sequence(sources, batch_first=True) if sources else torch.zeros(0, 0).long()
        source_ids = source_ids.to(history_ids.device)
        contributions = self.history_scores.contributions(history_ids, item_ids, source_ids)
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
            changes = self._changes_without_items(tokenizer, history, history_ids.device)
            with torch.autocast(history_ids.device.type, enabled=False):
                vectors = self._item_rows(item_ids[row])[0].float() - mean
                # The biases are the same with and without an item, so they cancel.
                contributions[row, :, : len(changes)] += vectors @ changes.mT
        return source_ids, contributions * (item_ids > 0).unsqueeze(2)

    @torch.no_grad()
    def user_vectors(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, hidden size + 1) float32. Products with `item_vectors` are the scores without `HistoryScores`.

        Args:
            input_ids: (batch, length) token ids with one [MASK] per row.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.
        """
        return _with_one(self.mask_states(input_ids, attention_mask))

    @torch.no_grad()
    def item_vectors(self) -> torch.Tensor:
        """(number of items, hidden size + 1) float32. Row i belongs to token id i + 3; its last value is the bias."""
        _gather_weights(self)
        vectors, biases = self._item_rows(range(FIRST_ITEM_ID, self.config.vocab_size))
        return torch.cat((vectors, biases.unsqueeze(1)), dim=1).float()

    @torch.no_grad()
    def mask_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The states (batch, 1, hidden size) at the last [MASK] of each history, for `search`.

        Args:
            input_ids: (batch, length) token ids with one [MASK] per row.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.

        Raises:
            ValueError: If the model is in training mode, a history has no [MASK], or an id is beyond the vocabulary.
        """
        if self.training:
            raise ValueError("the model is in training mode, where dropout is active: call model.eval() first")
        if not len(input_ids):
            return torch.zeros(0, 1, self.config.hidden_size, device=input_ids.device)
        self._check_ids(input_ids)
        if not input_ids.eq(MASK_TOKEN_ID).any(dim=1).all():
            raise ValueError("every history needs a [MASK], the position to predict: see tokenizer.append_mask")
        at_once = len(input_ids)
        # With FSDP2, all processes must call the model equally often, so the batch is not split.
        if input_ids.device.type == "cpu" and not hasattr(self, "unshard"):
            at_once = max(1, POSITIONS_ENCODED_AT_ONCE // input_ids.shape[1])
        parts = input_ids.split(at_once)
        masks = [None] * len(parts) if attention_mask is None else attention_mask.split(at_once)
        states = [
            self(
                input_ids=part,
                attention_mask=mask,
                masked_positions=_mask_positions(part),
                skip_logits=True,
                return_dict=True,
            ).prediction_states
            for part, mask in zip(parts, masks, strict=True)
        ]
        return torch.cat(states) if len(states) > 1 else states[0]

    def _changes_without_items(self, tokenizer: Any, history: list[int], device: torch.device) -> torch.Tensor:
        """(m, hidden size) float32: the state of a history minus its states without each of its newest distinct items.

        Args:
            tokenizer: The model's `Bert4RecTokenizer`.
            history: Token ids of items, oldest first.
            device: The device of the result.
        """
        left_out = dict.fromkeys(reversed(history[-NUM_EXPLAINED_ITEMS:]))
        if not left_out:
            return torch.zeros(0, self.config.hidden_size, device=device)
        shortened = [[token_id for token_id in history if token_id != item] for item in left_out]
        length = self.config.max_position_embeddings
        inputs = [tuple(tokenizer.append_mask(items, length)) for items in (history, *shortened)]
        # An item that the model does not read changes no input. Equal inputs get one state, so that its change is 0.
        places = {row: place for place, row in enumerate(dict.fromkeys(inputs))}
        rows = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in places], batch_first=True)
        states = self.mask_states(rows.to(device)).squeeze(1).float()
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

    def _nearest(
        self,
        index: Any,
        states: torch.Tensor,
        history_ids: torch.Tensor,
        top_k: int,
        exclude_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """(batch, C) candidates, each once: the items that an index finds, and those in the history's pairs."""
        num_items = self.config.vocab_size - FIRST_ITEM_ID
        if len(index) != num_items:
            raise ValueError(f"the index has {len(index)} items, the catalogue {num_items}: build it from this model")
        # The index is asked for more items, so that enough are left after the exclusions.
        num_excluded = 0 if exclude_ids is None else exclude_ids.shape[1]
        _, found = index.search(_with_one(states), top_k + num_excluded)
        paired, _ = self.history_scores(history_ids)
        candidates = torch.cat((found.to(states.device), paired), dim=1).sort(dim=1).values
        is_first = candidates.diff(dim=1, prepend=candidates.new_zeros(len(candidates), 1)) > 0
        return candidates * is_first

    def _check_ids(self, ids: torch.Tensor | None) -> None:
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"token ids must lie between 0 and vocab_size - 1 = {self.config.vocab_size - 1}; got "
                f"{int(ids.min())} to {int(ids.max())}: the tokenizer must be the one of the model's folder"
            )

    def _chunks(
        self,
        states: torch.Tensor,
        pairs: Pairs | None,
        candidate_ids: torch.Tensor | None,
        exclude_ids: torch.Tensor | None,
        scores_of: Callable[..., torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield scores (batch, C) and their token ids (1 or batch, C). The score of an excluded item is -inf.

        Args:
            states: (batch, 1, hidden size).
            pairs: The values that are added to the scores of some items. None: nothing is added.
            candidate_ids: (C,) or (batch, C) token ids to choose from, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) token ids to leave out, padded with 0.
            scores_of: The scores of states and token ids, with the shapes of `_scores`. None: `_scores`.
        """
        scores_of = scores_of or self._scores
        if candidate_ids is not None:
            if exclude_ids is not None:
                exclude_ids = exclude_ids.sort(dim=1).values
            # Candidates given per row need one gathered vector each.
            at_once = CATALOGUE_CHUNK_SIZE
            if candidate_ids.dim() == 2:
                at_once = max(1, MAX_GATHERED_VALUES // (len(states) * states.shape[-1]))
            for item_ids in candidate_ids.split(at_once, dim=-1):
                scores = scores_of(states, item_ids).squeeze(1)
                item_ids = item_ids.expand(len(states), -1)
                if pairs is not None:
                    scores = scores + values_of(pairs, item_ids)
                forbidden = item_ids < FIRST_ITEM_ID
                if exclude_ids is not None and exclude_ids.shape[1]:
                    nearest = torch.searchsorted(exclude_ids, item_ids.contiguous()).clamp(max=exclude_ids.shape[1] - 1)
                    forbidden = forbidden | (exclude_ids.gather(1, nearest) == item_ids)
                _check_finite(scores)
                yield scores.masked_fill(forbidden, -torch.inf), item_ids
            return
        for start in range(0, self.config.vocab_size, CATALOGUE_CHUNK_SIZE):
            end = min(start + CATALOGUE_CHUNK_SIZE, self.config.vocab_size)
            chunk_ids = torch.arange(start, end, device=states.device)
            scores = scores_of(states, range(start, end)).squeeze(1)
            if pairs is not None:
                add_to_scores(scores, pairs, start)
            _check_finite(scores)
            if start < FIRST_ITEM_ID:
                scores[:, : FIRST_ITEM_ID - start] = -torch.inf
            if exclude_ids is not None:
                columns = exclude_ids - start
                inside = (columns >= 0) & (columns < end - start)
                ceiling = scores.new_full((), torch.inf).where(~inside, -torch.inf)
                scores.scatter_reduce_(1, columns.where(inside, 0), ceiling, "amin")
            yield scores, chunk_ids.unsqueeze(0)


def _best(
    top_k: int, scores: torch.Tensor, item_ids: torch.Tensor, chunk_scores: torch.Tensor, chunk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scores (batch, k) and token ids (batch, k) of those before and of a chunk from `_chunks`."""
    best, columns = chunk_scores.topk(min(top_k, chunk_scores.shape[1]))
    best_ids = chunk_ids.expand_as(chunk_scores).gather(1, columns)
    scores, item_ids = torch.cat((scores, best), dim=1), torch.cat((item_ids, best_ids), dim=1)
    scores, columns = scores.topk(min(top_k, scores.shape[1]))
    return scores, item_ids.gather(1, columns)


def _target_scores(
    target_scores: torch.Tensor, target_ids: torch.Tensor, scores: torch.Tensor, item_ids: torch.Tensor
) -> torch.Tensor:
    """Update target scores (batch, 1) for targets in this chunk, a range of token ids or with the target first."""
    columns = target_ids - item_ids[:, :1]
    inside = (columns >= 0) & (columns < scores.shape[1])
    found = scores.gather(1, columns.where(inside, 0)).masked_fill(~inside, -torch.inf)
    return torch.maximum(target_scores, found)


def _check_finite(scores: torch.Tensor) -> None:
    if scores.numel() and scores.amax().isnan():  # the maximum is NaN if any score is
        raise ValueError("a score is NaN: the weights are not finite, training has diverged")


def _mask_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """(batch, 1) the position of the last [MASK] of each row."""
    numbers = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (input_ids.eq(MASK_TOKEN_ID) * numbers).argmax(dim=1, keepdim=True)


def _uncut(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, history_ids: torch.Tensor | None
) -> torch.Tensor:
    """The histories for `HistoryScores`: `history_ids`, or without them the items of the input before the [MASK]."""
    if history_ids is not None or not input_ids.numel():
        return input_ids if history_ids is None else history_ids
    is_before = torch.arange(input_ids.shape[1], device=input_ids.device) < _mask_positions(input_ids)
    if attention_mask is not None and attention_mask.dim() == 2:
        is_before = is_before & (attention_mask != 0)
    return input_ids.where(is_before, PAD_TOKEN_ID)


def _with_one(states: torch.Tensor) -> torch.Tensor:
    """States (batch, 1, hidden size) with a 1 appended, (batch, hidden size + 1), which is multiplied by the bias."""
    states = states.squeeze(1).float()
    return torch.cat((states, states.new_ones(len(states), 1)), dim=1)


def _gather_weights(model: Any) -> None:
    """Gather the weights of a model that FSDP2 has sharded. FSDP2 itself does so only for `forward`."""
    if hasattr(model, "unshard"):
        # `forward` initialises lazily too. Without it, a separately sharded item table would take itself for the root.
        model._get_fsdp_state()._lazy_init()
        model.unshard()
