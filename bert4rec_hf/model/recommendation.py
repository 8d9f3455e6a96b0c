# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""`RecommendationMixin`: top-k recommendations and ranks over the catalogue."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID
from .history_scores import HistoryScores, Pairs, add_to_scores, values_of
from .losses import IGNORE_INDEX

# Chunk size over the catalogue.
CATALOGUE_CHUNK_SIZE = 2**16
# Number of positions that are encoded at once on a CPU, so that the activations fit into its caches.
POSITIONS_ENCODED_AT_ONCE = 2**13
# Candidates given per row are chunked to this number of gathered values, a quarter of a GiB.
MAX_GATHERED_VALUES = 2**26
# Bias of withdrawn items in `item_vectors`. It outweighs any score, and is finite in half precision.
BIAS_OF_WITHDRAWN_ITEMS = -1e4
# A list of allowed items for all histories is long if it has this share of the catalogue. The vectors of a shorter list
# are gathered, and an index is not used with one. A longer list is a mask over the scores of the catalogue.
LEAST_SHARE_OF_A_LONG_LIST = 1 / 8


class RecommendationMixin:
    """Methods that use a trained model: `recommend`, `rank`, `search`, and vectors of users and items.

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
        event_type_ids: torch.Tensor | None = None,
        history_type_ids: torch.Tensor | None = None,
        index: Any = None,
        rules: Any = None,
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
            event_type_ids: (batch, length) types of the events beside `input_ids`; see `forward`.
            history_type_ids: (batch, H) types of the events of `history_ids`. None: those of `event_type_ids` if there
                are no `history_ids`, otherwise all are of the type that is recommended for, that of the [MASK].
            index: An `ItemIndex` of the model, for approximate search. It is not used with candidates. The items that
                it finds, and the items that the history adds scores to, are scored exactly.
            rules: `Rules` of the catalogue; see `search_by_rules`. None: the items with the highest scores.

        Returns:
            scores: (batch, k) float32 logits, -inf where no item is left. They are in descending order, unless the
                rules have another order.
            item_ids: (batch, k) int64 token ids, 0 where no item is left.

        Raises:
            ValueError: If `top_k` is below 1, a history has no [MASK], an id is beyond the vocabulary, or a score
                is NaN; if the index or the rules have another number of items.
        """
        states = self.mask_states(input_ids, attention_mask, event_type_ids)
        types = self._types_of(input_ids, history_ids, event_type_ids, history_type_ids)
        history_ids = _uncut(input_ids, attention_mask, history_ids)
        if rules is not None:
            limits = {"candidate_ids": candidate_ids, "exclude_ids": exclude_ids, **types}
            return self.search_by_rules(states, history_ids, rules=rules, top_k=top_k, index=index, **limits)[:2]
        if index is not None and candidate_ids is None and len(states):
            candidate_ids = self._nearest(index, states, history_ids, top_k, exclude_ids, **types)
        candidate_ids, allowed = self._limits(candidate_ids, None)
        _, scores, item_ids = self.search(
            states,
            history_ids,
            top_k=top_k,
            candidate_ids=candidate_ids,
            exclude_ids=exclude_ids,
            allowed=allowed,
            **types,
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
        event_type_ids: torch.Tensor | None = None,
        history_type_ids: torch.Tensor | None = None,
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
            event_type_ids: (batch, length) types of the events beside `input_ids`; see `forward`.
            history_type_ids: (batch, H) types of the events of `history_ids`. None: those of `event_type_ids` if there
                are no `history_ids`, otherwise all are of the type that is recommended for, that of the [MASK].

        Returns:
            (batch,) int64 ranks; 0 for a target that is excluded or outside the catalogue.

        Raises:
            ValueError: If a history has no [MASK], an id is beyond the vocabulary, a score is NaN, or `target_ids` has
                another shape.
        """
        states = self.mask_states(input_ids, attention_mask, event_type_ids)
        types = self._types_of(input_ids, history_ids, event_type_ids, history_type_ids)
        ranks, _, _ = self.search(
            states,
            _uncut(input_ids, attention_mask, history_ids),
            target_ids=target_ids,
            candidate_ids=candidate_ids,
            exclude_ids=exclude_ids,
            **types,
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
        history_type_ids: torch.Tensor | None = None,
        target_type_ids: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
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
            history_type_ids: (batch, H) types of the events of `history_ids`. None: all are of the type that is
                recommended for.
            target_type_ids: (batch,) the type that is recommended for. None: the first target type.
            allowed: (vocab size,) bool, the token ids that may be recommended. None: all.

        Returns:
            ranks: (batch,) int64, all 0 without targets.
            scores: (batch, k) float32, with k = 0 without `top_k`.
            item_ids: (batch, k) int64 token ids.

        Raises:
            ValueError: If `top_k` is below 1, an id is beyond the vocabulary, `target_ids` has another shape, a score
                is NaN, or `history_ids` is missing.
        """
        device, batch_size = prediction_states.device, len(prediction_states)
        types = history_type_ids, target_type_ids
        pairs, exclude_ids = self._checked(batch_size, history_ids, top_k, candidate_ids, exclude_ids, *types)
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
                for chunk_scores, chunk_ids in self._chunks(prediction_states, pairs, None, exclude_ids, allowed):
                    target_scores = _target_scores(target_scores, target_ids, chunk_scores, chunk_ids)
        chunks = self._chunks(prediction_states, pairs, candidate_ids, exclude_ids, allowed)
        for number, (chunk_scores, chunk_ids) in enumerate(chunks):
            if target_ids is not None:
                if candidate_ids is None or number == 0:
                    target_scores = _target_scores(target_scores, target_ids, chunk_scores, chunk_ids)
                # The comparison is stored as floats, since a sum of booleans would first copy them to int64.
                reached = torch.ge(chunk_scores, target_scores, out=torch.empty_like(chunk_scores))
                ranks += reached.sum(dim=1, keepdim=True).long()
            if top_k is not None:
                scores, item_ids = best_of(top_k, scores, item_ids, chunk_scores, chunk_ids)
        ranks = ranks.masked_fill(target_scores.isneginf(), 0).squeeze(1)
        return ranks, scores, item_ids.masked_fill(scores.isneginf(), 0)

    @torch.no_grad()
    def search_by_rules(
        self,
        prediction_states: torch.Tensor,
        history_ids: torch.Tensor,
        *,
        rules: Any,
        top_k: int = 10,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
        history_type_ids: torch.Tensor | None = None,
        target_type_ids: torch.Tensor | None = None,
        index: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The answers of `recommend` under the rules of a business, from encoded histories.

        An index is used if there are neither boosts, which may raise any item, nor candidates, and if at least
        `LEAST_SHARE_OF_A_LONG_LIST` of the items meet `where`. It is then asked for as many more items as `where`
        leaves out. If it finds too few of them for a history, the batch is searched exactly.

        Args:
            prediction_states: (batch, 1, hidden size) states from `mask_states` or `forward`.
            history_ids: (batch, H) token ids of the uncut histories, padded with 0.
            rules: `Rules` of the catalogue, which say in which order the rules apply.
            top_k: Number of items.
            candidate_ids: (C,) or (batch, C) token ids to choose from, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) token ids never to recommend, padded with 0, or (1, E) for all rows.
            history_type_ids: (batch, H) types of the events of `history_ids`. None: all are of the type that is
                recommended for.
            target_type_ids: (batch,) the type that is recommended for. None: the first target type.
            index: An `ItemIndex` of the model.

        Returns:
            scores: (batch, k) float32 logits without boosts, in the order of the rules; -inf where no item is left.
            item_ids: (batch, k) int64 token ids, 0 where no item is left.
            num_eligible: (batch,) int64 number of items that the filters leave, at most `rules.pool_size(top_k)`.

        Raises:
            ValueError: As `search`, or if the rules or the index have another number of items.
        """
        num_items = self.config.vocab_size - FIRST_ITEM_ID
        if rules.num_items not in (None, num_items):
            raise ValueError(
                f"the rules are for {rules.num_items} items, the catalogue has {num_items}: read the item table with "
                "the tokenizer of this model"
            )
        states, size = prediction_states, rules.pool_size(top_k)
        types = history_type_ids, target_type_ids
        pairs, exclude_ids = self._checked(len(states), history_ids, top_k, candidate_ids, exclude_ids, *types)
        allowed, boosts = (
            None if values is None else values.to(states.device) for values in (rules.allowed, rules.boost_values)
        )
        share = 1.0 if allowed is None else rules.num_allowed / num_items
        pool = None
        if index is not None and candidate_ids is None and boosts is None and share >= LEAST_SHARE_OF_A_LONG_LIST:
            number = math.ceil(size / share)
            nearest = self._nearest(index, states, history_ids, number, exclude_ids, *types)
            pool = self._pool(states, pairs, size, nearest, exclude_ids, allowed)
            if pool[0].shape[1] < size or pool[0].isneginf().any():
                pool = None
        if pool is None:
            candidate_ids, allowed = self._limits(candidate_ids, allowed)
            pool = self._pool(states, pairs, size, candidate_ids, exclude_ids, allowed, boosts)
        keys, scores, item_ids = pool
        num_eligible = (~keys.isneginf()).sum(dim=1)
        if not rules.chooses or not keys.numel():
            return scores, item_ids, num_eligible
        width = self.config.hidden_size if rules.diversity else 1
        values_per_row = max(rules.values_per_row(keys.shape[1]), keys.shape[1] * width)
        at_once = max(1, MAX_GATHERED_VALUES // values_per_row)
        columns = []
        for start in range(0, len(keys), at_once):
            part = slice(start, start + at_once)
            vectors = self._item_rows(item_ids[part])[0].float() if rules.diversity else None
            columns.append(rules.choose(keys[part], item_ids[part], vectors, top_k))
        chosen = torch.cat(columns)
        scores = scores.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, -torch.inf)
        return scores, item_ids.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0), num_eligible

    @torch.no_grad()
    def user_vectors(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        event_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, hidden size + 1) float32. Products with `item_vectors` are the scores without `HistoryScores`.

        Args:
            input_ids: (batch, length) token ids with one [MASK] per row.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.
            event_type_ids: (batch, length) types of the events; see `forward`.
        """
        return _with_one(self.mask_states(input_ids, attention_mask, event_type_ids))

    @torch.no_grad()
    def item_vectors(self) -> torch.Tensor:
        """(number of items, hidden size + 1) float32. Row i belongs to token id i + 3; its last value is the bias.

        The bias of a withdrawn item is `BIAS_OF_WITHDRAWN_ITEMS`, so that no search by vectors finds it.
        """
        gather_weights(self)
        vectors, biases = self._item_rows(range(FIRST_ITEM_ID, self.config.vocab_size))
        biases = biases.float()
        if self.config.withdrawn_item_ids:
            biases = biases.masked_fill(~self.is_recommended(biases.device)[FIRST_ITEM_ID:], BIAS_OF_WITHDRAWN_ITEMS)
        return torch.cat((vectors.float(), biases.unsqueeze(1)), dim=1)

    def is_recommended(self, device: torch.device | str | None = None) -> torch.Tensor:
        """(vocab size,) bool: whether a token id is that of an item that has not been withdrawn."""
        found = torch.ones(self.config.vocab_size, dtype=torch.bool, device=device)
        found[:FIRST_ITEM_ID] = False
        found[torch.tensor(self.config.withdrawn_item_ids or [], dtype=torch.long, device=device)] = False
        return found

    @torch.no_grad()
    def mask_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        event_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states (batch, 1, hidden size) at the last [MASK] of each history, for `search`.

        Args:
            input_ids: (batch, length) token ids with one [MASK] per row.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.
            event_type_ids: (batch, length) types of the events; see `forward`.

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
        types = [None] * len(parts) if event_type_ids is None else event_type_ids.split(at_once)
        states = [
            self(
                input_ids=part,
                attention_mask=mask,
                masked_positions=_mask_positions(part),
                **({} if of_part is None else {"event_type_ids": of_part}),
                skip_logits=True,
                return_dict=True,
            ).prediction_states
            for part, mask, of_part in zip(parts, masks, types, strict=True)
        ]
        return torch.cat(states) if len(states) > 1 else states[0]

    def _nearest(
        self,
        index: Any,
        states: torch.Tensor,
        history_ids: torch.Tensor,
        top_k: int,
        exclude_ids: torch.Tensor | None,
        history_type_ids: torch.Tensor | None,
        target_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """(batch, C) candidates, each once: the items that an index finds, and those in the history's pairs."""
        num_items = self.config.vocab_size - FIRST_ITEM_ID
        if len(index) != num_items:
            raise ValueError(f"the index has {len(index)} items, the catalogue {num_items}: build it from this model")
        # The index is asked for more items, so that enough are left after the exclusions.
        num_excluded = 0 if exclude_ids is None else exclude_ids.shape[1]
        _, found = index.search(_with_one(states), top_k + num_excluded)
        paired, _ = self.history_scores(history_ids, None, history_type_ids, target_type_ids)
        candidates = torch.cat((found.to(states.device), paired), dim=1).sort(dim=1).values
        is_first = candidates.diff(dim=1, prepend=candidates.new_zeros(len(candidates), 1)) > 0
        return candidates * is_first

    def _types_of(
        self,
        input_ids: torch.Tensor,
        history_ids: torch.Tensor | None,
        event_type_ids: torch.Tensor | None,
        history_type_ids: torch.Tensor | None,
    ) -> dict[str, Any]:
        """`history_type_ids` and `target_type_ids` of `search`, from the types beside the input."""
        if history_type_ids is None and history_ids is None:
            history_type_ids = event_type_ids
        target_type_ids = None
        if event_type_ids is not None:
            target_type_ids = event_type_ids.gather(1, _mask_positions(input_ids)).squeeze(1)
        return {"history_type_ids": history_type_ids, "target_type_ids": target_type_ids}

    def _pool(
        self,
        states: torch.Tensor,
        pairs: Pairs | None,
        size: int,
        candidate_ids: torch.Tensor | None,
        exclude_ids: torch.Tensor | None,
        allowed: torch.Tensor | None,
        boosts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best items of each history: scores with boosts, in descending order; scores without; and token ids."""
        limits = (candidate_ids, exclude_ids, allowed)
        deviation = torch.zeros(())
        if boosts is not None:
            deviation = _deviation(scores for scores, _ in self._chunks(states, pairs, *limits))
        best = [torch.empty(len(states), 0, device=states.device) for _ in range(2)]
        best.append(torch.empty(len(states), 0, dtype=torch.long, device=states.device))
        for scores, item_ids in self._chunks(states, pairs, *limits):
            keys = scores if boosts is None else scores + deviation * boosts[item_ids]
            keys, columns = keys.topk(min(size, scores.shape[1]))
            found = (keys, scores.gather(1, columns), item_ids.expand_as(scores).gather(1, columns))
            best = [torch.cat(parts, dim=1) for parts in zip(best, found, strict=True)]
            columns = best[0].topk(min(size, best[0].shape[1])).indices
            best = [values.gather(1, columns) for values in best]
        keys, scores, item_ids = best
        return keys, scores, item_ids.masked_fill(keys.isneginf(), 0)

    def _limits(
        self, candidate_ids: torch.Tensor | None, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Write what all rows may choose from in the faster way: short lists as candidates, long ones as a mask.

        Args:
            candidate_ids: (C,) or (batch, C) token ids, padded with 0, or None. Lists of the rows stay as they are.
            allowed: (vocab size,) bool, or None.

        Returns:
            `candidate_ids` and `allowed`, of which at least one is None if all rows have the same.
        """
        if (candidate_ids is None and allowed is None) or (candidate_ids is not None and candidate_ids.dim() == 2):
            return candidate_ids, allowed
        if candidate_ids is None:
            candidate_ids = allowed.nonzero().squeeze(1)  # type: ignore[union-attr]
        self._check_ids(candidate_ids)
        if allowed is not None:
            candidate_ids = candidate_ids[allowed[candidate_ids]]
        if len(candidate_ids) < LEAST_SHARE_OF_A_LONG_LIST * self.config.vocab_size:
            return candidate_ids, None
        mask = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=candidate_ids.device)
        mask[candidate_ids] = True
        return None, mask

    def _checked(
        self,
        batch_size: int,
        history_ids: torch.Tensor | None,
        top_k: int | None,
        candidate_ids: torch.Tensor | None,
        exclude_ids: torch.Tensor | None,
        history_type_ids: torch.Tensor | None,
        target_type_ids: torch.Tensor | None,
    ) -> tuple[Pairs | None, torch.Tensor | None]:
        """Check the arguments of a search. Returns the pairs of the histories, and `exclude_ids` for each row."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        for ids in (exclude_ids, candidate_ids, history_ids):
            self._check_ids(ids)
        if history_ids is None and not self.history_scores.is_empty:
            raise ValueError("the model has transitions or repeats: give history_ids, whose items add to the scores")
        if history_type_ids is not None and (history_ids is None or history_type_ids.shape != history_ids.shape):
            shape = None if history_ids is None else tuple(history_ids.shape)
            raise ValueError(
                f"history_type_ids must have the shape of history_ids, {shape}; got {tuple(history_type_ids.shape)}"
            )
        num_types = self.config.num_event_types
        for types in (history_type_ids, target_type_ids):
            if types is not None and types.numel() and not 0 <= int(types.min()) <= int(types.max()) <= num_types:
                raise ValueError(
                    f"types of events must lie between 0 and num_event_types = {num_types}; got {int(types.min())} to "
                    f"{int(types.max())}: the tokenizer must be the one of the model's folder"
                )
        gather_weights(self)
        if history_ids is None:
            pairs = None
        else:
            pairs = self.history_scores(history_ids, None, history_type_ids, target_type_ids)
        return pairs, None if exclude_ids is None else exclude_ids.expand(batch_size, -1)

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
        allowed: torch.Tensor | None = None,
        scores_of: Callable[..., torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield scores (batch, C) and their token ids (1 or batch, C). The score of a forbidden item is -inf.

        Args:
            states: (batch, 1, hidden size).
            pairs: The values that are added to the scores of some items. None: nothing is added.
            candidate_ids: (C,) or (batch, C) token ids to choose from, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) token ids to leave out, padded with 0.
            allowed: (vocab size,) bool, the token ids to choose from. None: all.
            scores_of: The scores of states and token ids, with the shapes of `_scores`. None: `_scores`.
        """
        scores_of = scores_of or self._scores
        if self.config.withdrawn_item_ids:
            recommended = self.is_recommended(states.device)
            allowed = recommended if allowed is None else allowed & recommended
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
                if allowed is not None:
                    forbidden = forbidden | ~allowed[item_ids]
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
            if allowed is not None:
                scores.masked_fill_(~allowed[start:end], -torch.inf)
            yield scores, chunk_ids.unsqueeze(0)


def best_of(
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


def _deviation(chunks: Iterator[torch.Tensor]) -> torch.Tensor:
    """(batch, 1) the standard deviation of scores (batch, C) in chunks, without those that are -inf."""
    number = mean = squares = torch.zeros(())  # the squares are those of the distances from the mean, summed
    for scores in chunks:
        is_eligible = ~scores.isneginf()
        number_here = is_eligible.sum(dim=1, keepdim=True)
        mean_here = scores.masked_fill(~is_eligible, 0).sum(dim=1, keepdim=True) / number_here.clamp(min=1)
        distances = (scores - mean_here).masked_fill(~is_eligible, 0)
        # The chunks are combined without a loss of digits (Chan, Golub & LeVeque 1979).
        share = number_here / (number + number_here).clamp(min=1)
        squares = squares + distances.square().sum(dim=1, keepdim=True) + (mean_here - mean).square() * number * share
        mean = mean + (mean_here - mean) * share
        number = number + number_here
    return (squares / number.clamp(min=1)).sqrt()


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


def gather_weights(model: Any) -> None:
    """Gather the weights of a model that FSDP2 has sharded. FSDP2 itself does so only for `forward`."""
    if hasattr(model, "unshard"):
        # `forward` initialises lazily too. Without it, a separately sharded item table would take itself for the root.
        model._get_fsdp_state()._lazy_init()
        model.unshard()
