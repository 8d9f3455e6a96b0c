# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""`pipeline("sequential-recommendation", model=folder)`: raw item ids in; raw item ids, titles and scores out."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines.base import pad_collate_fn

from .configuration_bert4rec import UNK_TOKEN_ID
from .pipeline_inputs import CALL_OPTIONS, check_count, check_keys, events_of, is_one_history, item_list, length_of
from .tokenization_bert4rec import Bert4RecTokenizer, is_history

logger = logging.getLogger(__name__)

# Number of unknown items that a warning names.
UNKNOWN_SHOWN = 3
# Number of items to recommend unless told otherwise.
TOP_K = 10
# Number of items of the history that an explanation names.
SOURCES_SHOWN = 3
# Number of items whose similar items are searched at once.
SIMILAR_BATCH_SIZE = 256
# Number of ids that an error about an unknown id names.
NEAREST_SHOWN = 3
# Largest catalogue that is searched for the ids nearest to an unknown one, which takes about 30 microseconds an id.
MAX_COMPARED_IDS = 10_000


class SequentialRecommendationPipeline(Pipeline):
    """Recommends items for histories of raw item ids.

        recommend = pipeline("sequential-recommendation", model="path-or-hub-id")
        recommend(["318", "50", "296"], top_k=5)

    The input is one history (a flat list of item ids, oldest first) or many histories. A list of lists gives a list of
    answers; a generator or a dataset gives an iterator. A history may also be a mapping with `history` (or `item_id`,
    as in histories.parquet). Its key `exclude` adds to that of the call, and its key `candidates` replaces that of the
    call. An empty list is a history without items. Lists may be tuples, arrays or columns of a data frame.

    With a model of event types, an item of a history may be a dictionary {"item_id", "event_type"}, or a mapping of a
    history has the types in its key `event_type`, a list beside the items, as in histories.parquet. An item without a
    type counts as an event of the first target type.

    The arguments are given to the call or to `pipeline(...)`.

    Args:
        top_k: Number of items to recommend, 10 by default.
        filter_seen_items: Whether the items of the whole history are left out. None: `config.filter_seen_items`.
        exclude: Item ids never to recommend.
        candidates: Item ids to choose from. Unknown ids are left out, with a warning. None: the catalogue.
        index: An `ItemIndex` of the model, for approximate search. Histories with candidates do not use it.
        rules: `Rules` of the catalogue: a condition on items, boosts, quotas and diversity. One warning for each call
            counts the histories for which they leave fewer than `top_k` items.
        event_type: The target type to recommend for, such as "purchase". None: the first target type of the model. Seen
            items are those that the history has with this type.
        explain: Whether to name the items of the history that carry each recommendation. The recommendations are the
            same, but the model also reads each history without each of its newest 50 items.
        batch_size: Number of histories that the model reads at once.
        shortages: A counter that the call adds to, in place of the warning of `rules`; see `count_short`. Only for the
            call.

    Returns:
        For each history, a list of {"item_id", "title" (if the catalogue has titles), "score" (a logit)}, best item
        first. The list is shorter than `top_k` if fewer items are left. With `rules`, the order is theirs, and the
        score is still the model's, without boosts.
        With `explain`, each entry also has "because",
        a list of at most three {"item_id", "title", "contribution"}, strongest first. They are items of the history
        with a positive contribution to the score, as `explain` of the model computes it.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If `top_k` or `batch_size` is below 1; if a history, `exclude` or `candidates` is not a list of item
            ids; if the catalogue has none of the candidates; if `index` or `rules` belong to another catalogue; or if a
            mapping has an unknown key. The message names the element of the input.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    tokenizer: Bert4RecTokenizer

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model.eval()  # a model that has just been trained is in training mode
        if not hasattr(self.tokenizer, "item_ids_to_token_ids"):
            raise ValueError(
                f"expected a Bert4RecTokenizer; got {type(self.tokenizer).__name__}: give the tokenizer of the model's "
                "folder, whose tokenizer_config.json names it"
            )
        if len(self.tokenizer) != self.model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} token ids, the model {self.model.config.vocab_size}: give "
                "the tokenizer of the model's folder; model.add_items(tokenizer, items) adds new items to both"
            )

    def __call__(self, inputs: Any, *, shortages: Counter[str] | None = None, **kwargs: Any) -> Any:
        check_count("batch_size", kwargs.get("batch_size"))
        unknown: list[str] = []  # the first unknown items, which `preprocess` collects
        if isinstance(inputs, Mapping) or is_one_history(inputs):
            outputs = iter([super().__call__(_AsOne(inputs, unknown), **kwargs)])
            (answer,) = self._answers(outputs, unknown, shortages, kwargs)
            return answer
        if not isinstance(inputs, list | tuple):
            return self._answers(super().__call__(_Stream(inputs, unknown), **kwargs), unknown, shortages, kwargs)
        # Sorting by length puts histories of similar length into a batch, which needs little padding.
        order = sorted(range(len(inputs)), key=lambda place: length_of(inputs[place]))
        rows = [_AsOne(inputs[place], unknown, place) for place in order]
        answers = self._answers(super().__call__(rows, **kwargs), unknown, shortages, kwargs)
        return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]

    def get_iterator(self, *args: Any, **kwargs: Any) -> Any:
        answers = super().get_iterator(*args, **kwargs)
        loader = answers.loader.loader  # it is inside the iterators over the answers and over the model's outputs
        if loader.num_workers:
            # Where workers are not forked, as on Linux since Python 3.14, their arguments are pickled. The local
            # function of Transformers that pads a batch cannot be pickled, and the model would fill shared memory.
            reader = copy(self)
            reader.model, reader._forward_params = SimpleNamespace(config=self.model.config), {}
            setattr(loader.dataset, "process" if hasattr(loader.dataset, "process") else "infer", reader.preprocess)
            if loader.batch_size > 1:
                loader.collate_fn = _PadBatch(self.tokenizer)
        return answers

    def _answers(
        self,
        outputs: Iterable[tuple[list[dict[str, Any]], int, int | None]],
        unknown: Sequence[str],
        shortages: Counter[str] | None,
        options: Mapping[str, Any],
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the answers, and warn at their end of what was left out and of short answers."""
        total, counts = 0, Counter() if shortages is None else shortages
        top_k = options.get("top_k") or self._forward_params.get("top_k", TOP_K)
        for answer, num_unknown, num_eligible in outputs:
            total += num_unknown
            if num_eligible is not None:
                count_short(counts, len(answer), num_eligible, min(top_k, self.tokenizer.num_items))
            yield answer
        warn_unknown(total, unknown)
        if shortages is None and counts["short"]:
            self.warn_short(counts, **options)

    def warn_short(self, counts: Mapping[str, int], **options: Any) -> None:
        """Warn of answers that the rules of a call made shorter than was asked for.

        Args:
            counts: What `count_short` counted.
            options: The arguments of the call.
        """
        given = self._forward_params | {name: value for name, value in options.items() if value is not None}
        given["rules"].warn(counts, given.get("top_k", TOP_K))

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        filter_seen_items: bool | None = None,
        exclude: Iterable[str | int] | None = None,
        candidates: Iterable[str | int] | None = None,
        index: Any = None,
        rules: Any = None,
        explain: bool | None = None,
        event_type: str | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in unknown:
            nearest = get_close_matches(name, CALL_OPTIONS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(CALL_OPTIONS)}"
            raise TypeError(f"unknown argument {name!r}: {hint}")
        check_count("top_k", top_k)
        for name, value in (("filter_seen_items", filter_seen_items), ("explain", explain)):
            if value not in (None, True, False):
                raise ValueError(f"{name} must be True, False or None; got {value!r}")
        if index is not None and not hasattr(index, "search"):
            raise ValueError(f"index must be an ItemIndex, for example ItemIndex.load(path); got {index!r:.80}")
        if rules is not None and not hasattr(rules, "choose"):
            raise ValueError(f"rules must be Rules, for example Rules(items, where=…); got {rules!r:.80}")
        forward = {
            "top_k": None if top_k is None else int(top_k),
            "index": index,
            "rules": rules,
            "explain": explain,
            "exclude_ids": None if exclude is None else torch.tensor([self._exclude_ids(exclude)], dtype=torch.long),
        }
        if candidates is not None:
            candidate_ids, lacking = self._candidate_ids(candidates)
            forward["candidate_ids"] = torch.tensor(candidate_ids)
            warn_unknown(len(lacking), lacking[:UNKNOWN_SHOWN])
        before: dict[str, Any] = {"filter_seen_items": filter_seen_items, "event_type": event_type}
        if event_type is not None:
            self.tokenizer.target_event_type_id(event_type)  # raises if the model does not recommend for it
        return (
            {name: value for name, value in before.items() if value is not None},
            {name: value for name, value in forward.items() if value is not None},
            {},
        )

    def preprocess(
        self, inputs: Any, filter_seen_items: bool | None = None, event_type: str | None = None
    ) -> dict[str, torch.Tensor]:
        if not isinstance(inputs, _AsOne):
            inputs = _AsOne(inputs, [])
        try:
            return self._preprocess(inputs.history, inputs.unknown, filter_seen_items, event_type)
        except ValueError as error:
            if inputs.place is None:
                raise
            raise ValueError(f"element {inputs.place} of the input (the first is 0): {error}") from error

    def _preprocess(
        self, inputs: Any, unknown: list[str], filter_seen_items: bool | None = None, event_type: str | None = None
    ) -> dict[str, torch.Tensor]:
        exclude_ids: list[int] = []
        candidate_ids: list[int] = []
        lacking: list[str] = []
        types: Any = None
        if isinstance(inputs, Mapping):
            names = [name for name in ("history", "item_id") if name in inputs]
            if not names:
                raise ValueError(
                    "a mapping needs the key history, a list of item ids; got the keys "
                    f"{', '.join(map(str, inputs)) or '(none)'}"
                )
            if len(names) > 1:
                raise ValueError(
                    "a mapping has the keys history and item_id, which mean the same: leave one of them out"
                )
            check_keys(inputs)
            if inputs.get("exclude") is not None:
                exclude_ids = self._exclude_ids(inputs["exclude"])
            if inputs.get("candidates") is not None:
                candidate_ids, lacking = self._candidate_ids(inputs["candidates"])
            types, inputs = inputs.get("event_type"), inputs[names[0]]
        if filter_seen_items is None:
            filter_seen_items = self.model.config.filter_seen_items
        given = item_list("the history", inputs)
        items, names_of_types = events_of(given, types)
        if self.tokenizer.event_types is None and all(name is None for name in names_of_types):
            items = given  # a model without event types takes plain ids
        items, token_ids = self._token_ids("the history", items)
        target_type = self.tokenizer.target_event_type_id(event_type)
        type_ids = self._type_ids(names_of_types)
        type_ids = [kind for kind, token_id in zip(type_ids, token_ids, strict=True) if token_id != UNK_TOKEN_ID]
        history = [token_id for token_id in token_ids if token_id != UNK_TOKEN_ID]
        if len(history) < len(items):
            lacking += [str(item) for item, token_id in zip(items, token_ids, strict=True) if token_id == UNK_TOKEN_ID]
        if lacking and len(unknown) < UNKNOWN_SHOWN:
            unknown[:] = list(dict.fromkeys([*unknown, *lacking]))[:UNKNOWN_SHOWN]
        excluded = set(exclude_ids)
        if filter_seen_items:
            excluded |= {token_id for token_id, kind in zip(history, type_ids, strict=True) if kind == target_type}
        of_types = {}
        if self.tokenizer.event_types is not None:
            length = self.model.config.max_position_embeddings
            of_types = {
                "event_type_ids": torch.tensor([self.tokenizer.append_mask_type(type_ids, target_type, length)]),
                "history_type_ids": torch.tensor([type_ids or [0]]),
                "target_type_ids": torch.tensor([target_type]),
            }
        input_ids = self.tokenizer.append_mask(history, self.model.config.max_position_embeddings)
        return {
            "input_ids": torch.tensor([input_ids]),
            "attention_mask": torch.ones(1, len(input_ids), dtype=torch.long),
            # Rows have at least one column, since Transformers cannot pad empty rows on the left.
            "history_ids": torch.tensor([history or [0]]),
            "exclude_ids": torch.tensor([sorted(excluded) or [0]]),
            "candidate_ids": torch.tensor([candidate_ids or [0]]),
            "num_unknown": torch.tensor([len(lacking)]),
            **of_types,
        }

    def _type_ids(self, names: list[Any]) -> list[int]:
        """The ids of the types of a history's events, the first target type for None; all 0 without event types."""
        if self.tokenizer.event_types is None and all(name is None for name in names):
            return [0] * len(names)
        default = None if self.tokenizer.target_event_types is None else self.tokenizer.target_event_types[0]
        return self.tokenizer.event_type_ids([default if name is None else name for name in names])

    def _token_ids(self, name: str, items: Any) -> tuple[list[str | int], list[int]]:
        """The items as a list, and their token ids. Raises ValueError if this is not a list of item ids."""
        items = item_list(name, items)
        try:
            return items, self.tokenizer.item_ids_to_token_ids(items)
        except TypeError:
            for place, item in enumerate(items):
                try:
                    self.tokenizer.item_ids_to_token_ids([item])
                except TypeError as error:
                    raise ValueError(f"item {place} of {name} (the first is 0): {error}") from error
            raise

    def _exclude_ids(self, exclude: Any) -> list[int]:
        # Unknown items need no warning here, since they are never recommended.
        return self._token_ids("exclude", exclude)[1]

    def _candidate_ids(self, candidates: Any) -> tuple[list[int], list[str]]:
        """The token ids of the known candidates, and the raw ids of the unknown ones."""
        candidates, token_ids = self._token_ids("candidates", candidates)
        lacking = [str(item) for item, token_id in zip(candidates, token_ids, strict=True) if token_id == UNK_TOKEN_ID]
        if not candidates:
            raise ValueError("candidates is empty; name at least one item, or None for the whole catalogue")
        if len(lacking) == len(candidates):
            raise ValueError(
                f"the catalogue has none of the {len(candidates)} candidates, the first is {lacking[0]!r}; the ids of "
                f"the catalogue look like {self.tokenizer.items[0]!r}"
            )
        return [token_id for token_id in dict.fromkeys(token_ids) if token_id != UNK_TOKEN_ID], lacking

    def _forward(
        self,
        model_inputs: dict[str, torch.Tensor],
        top_k: int = TOP_K,
        index: Any = None,
        rules: Any = None,
        explain: bool = False,
        exclude_ids: torch.Tensor | None = None,
        candidate_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Recommend for a batch. `exclude_ids` (1, E) and `candidate_ids` (C,) are those of the call."""
        inputs = dict(model_inputs)
        num_unknown = inputs.pop("num_unknown")
        device = num_unknown.device
        top_k = min(top_k, self.model.config.vocab_size)
        if exclude_ids is not None:
            shared = exclude_ids.to(device).expand(len(num_unknown), -1)
            inputs["exclude_ids"] = torch.cat((inputs["exclude_ids"], shared), dim=1)
        # Rows with and without candidates may share a batch.
        chooses = (inputs["candidate_ids"] > 0).any(dim=1)
        scores = torch.full((len(chooses), top_k), -torch.inf, device=device)
        item_ids = torch.zeros_like(scores, dtype=torch.long)
        num_eligible = torch.zeros_like(num_unknown)
        source_ids = item_ids.new_zeros(*item_ids.shape, SOURCES_SHOWN)
        contributions = scores.new_zeros(source_ids.shape)
        for rows in (chooses, ~chooses):
            if rows.any():
                part: dict[str, Any] = {name: values[rows] for name, values in inputs.items()}
                candidates = part.pop("candidate_ids")
                if rows is chooses:  # if all rows have the same candidates, their vectors are looked up once
                    part["candidate_ids"] = candidates[0] if (candidates == candidates[:1]).all() else candidates
                elif candidate_ids is not None:
                    part["candidate_ids"] = candidate_ids.to(device)
                of_target = {name: part.pop(name) for name in ("target_type_ids",) if name in part}
                if rules is None:
                    found_scores, found_ids = self.model.recommend(**part, top_k=top_k, index=index)
                else:
                    read = part.pop("input_ids"), part.pop("attention_mask"), part.pop("event_type_ids", None)
                    states = self.model.mask_states(*read)
                    found_scores, found_ids, num_eligible[rows] = self.model.search_by_rules(
                        states, **part, **of_target, rules=rules, top_k=top_k, index=index
                    )
                scores[rows, : found_scores.shape[1]] = found_scores
                item_ids[rows, : found_ids.shape[1]] = found_ids
                if explain:
                    found_sources, found_contributions = self._strongest_sources(found_ids, part | of_target, rules)
                    shape = (rows, slice(found_ids.shape[1]), slice(found_sources.shape[2]))
                    source_ids[shape], contributions[shape] = found_sources, found_contributions
        outputs = {"scores": scores, "item_ids": item_ids, "num_unknown": num_unknown}
        outputs |= {} if rules is None else {"num_eligible": num_eligible}
        return outputs | ({"source_ids": source_ids, "contributions": contributions} if explain else {})

    def _strongest_sources(
        self,
        item_ids: torch.Tensor,
        part: dict[str, Any],
        rules: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The strongest items of the histories behind recommended items (batch, k), and their contributions.

        Both are (batch, k, at most `SOURCES_SHOWN`), strongest first, with 0 in place of contributions that are not
        positive.
        """
        candidate_ids = part.get("candidate_ids")
        if rules is not None and rules.allowed is not None:
            allowed = rules.allowed.to(item_ids.device)
            if candidate_ids is None:
                candidate_ids = allowed.nonzero().squeeze(1)
            candidate_ids = candidate_ids.where(allowed[candidate_ids], 0)
        source_ids, contributions = self.model.explain(
            self.tokenizer,
            part["history_ids"],
            item_ids,
            candidate_ids=candidate_ids,
            exclude_ids=part["exclude_ids"],
            history_type_ids=part.get("history_type_ids"),
            target_type_ids=part.get("target_type_ids"),
        )
        # Of equal contributions, that of the newest item comes first.
        contributions, places = contributions.sort(dim=2, descending=True, stable=True)
        contributions, places = contributions[..., :SOURCES_SHOWN].clamp(min=0), places[..., :SOURCES_SHOWN]
        source_ids = source_ids.unsqueeze(1).expand(-1, item_ids.shape[1], -1).gather(2, places)
        return source_ids * (contributions > 0), contributions

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> tuple[list[dict[str, Any]], int, int | None]:
        """The recommendations for one history, the number of its unknown items, and of eligible items under rules."""
        shown = model_outputs["item_ids"][0] > 0
        answer = self._entries(model_outputs["item_ids"][0][shown], model_outputs["scores"][0][shown])
        if "source_ids" in model_outputs:
            found = (model_outputs[name][0][shown] for name in ("source_ids", "contributions"))
            for entry, source_ids, contributions in zip(answer, *found, strict=True):
                is_source = source_ids > 0
                entry["because"] = self._entries(source_ids[is_source], contributions[is_source], "contribution")
        num_eligible = model_outputs.get("num_eligible")
        return answer, int(model_outputs["num_unknown"]), None if num_eligible is None else int(num_eligible)

    def _entries(self, token_ids: torch.Tensor, values: torch.Tensor, name: str = "score") -> list[dict[str, Any]]:
        """Items as dictionaries with item_id, title if the catalogue has titles, and a value of that name."""
        items = self.tokenizer.token_ids_to_item_ids(token_ids.tolist())
        titles = [{} if self.tokenizer.titles is None else {"title": self.tokenizer.title(item)} for item in items]
        return [
            {"item_id": item, **title, name: value}
            for item, title, value in zip(items, titles, values.tolist(), strict=True)
        ]

    def similar(
        self,
        items: Any,
        top_k: int | None = None,
        exclude: Iterable[str | int] | None = None,
        candidates: Iterable[str | int] | None = None,
    ) -> list[Any]:
        """Find the items that are most similar to an item, or to each of a list of items.

            recommend.similar("50", top_k=5)

        `similar_items` of the model says what a similarity is.

        Args:
            items: An item id, or a list of item ids.
            top_k: Number of similar items. None: that of `pipeline(...)`, or 10.
            exclude: Item ids to leave out. None: those of `pipeline(...)`.
            candidates: Item ids to choose from. Unknown ids are left out, with a warning. None: those of
                `pipeline(...)`, or the catalogue.

        Returns:
            For an item id, a list of {"item_id", "title" (if the catalogue has titles), "score" (the similarity)}, most
            similar item first. It never has the item itself, and is shorter than `top_k` if fewer items are left. For a
            list of item ids, a list of such lists in its order.

        Raises:
            ValueError: If the catalogue lacks an item, or an argument is not of the kind above.
        """
        is_one = isinstance(items, str) or not is_history(items)
        item_ids, token_ids = self._token_ids("items", [items] if is_one else items)
        if UNK_TOKEN_ID in token_ids:
            raise ValueError(self._lacks(str(item_ids[token_ids.index(UNK_TOKEN_ID)])))
        _, given, _ = self._sanitize_parameters(top_k=top_k, exclude=exclude, candidates=candidates)
        options = self._forward_params | given
        limits = {name: options[name].to(self.device) for name in ("exclude_ids", "candidate_ids") if name in options}
        top_k = min(options.get("top_k", 10), self.model.config.vocab_size)
        answers = []
        for batch in torch.tensor(token_ids, dtype=torch.long).split(SIMILAR_BATCH_SIZE):
            found = self.model.similar_items(batch.to(self.device), top_k=top_k, **limits)
            for scores, similar_ids in zip(*found, strict=True):
                answers.append(self._entries(similar_ids[similar_ids > 0], scores[similar_ids > 0]))
        return answers[0] if is_one else answers

    def _lacks(self, item: str) -> str:
        """The message of an error about an item that the catalogue lacks."""
        known = self.tokenizer.items
        nearest = get_close_matches(item, known, n=NEAREST_SHOWN) if len(known) <= MAX_COMPARED_IDS else []
        return (
            f"the catalogue lacks the item {item!r}; expected one of its {len(known)} ids, such as "
            f"{', '.join(map(repr, nearest or known[:NEAREST_SHOWN]))}"
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the model and the tokenizer into a folder.

        The folder gets the code of model, tokenizer and pipeline only if they were loaded with trust_remote_code.
        Otherwise the code would make Transformers ask for trust_remote_code.

        Args:
            save_directory: The folder.
            kwargs: Further arguments of `save_pretrained` of model and tokenizer.
        """
        if self.model.config._auto_class is not None:
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(self, save_directory)
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory, **kwargs)


class _Stream(IterableDataset):
    """Requests that are read one after another. Transformers 5.13 may read all of a generator into memory first."""

    def __init__(self, requests: Iterable[Any], unknown: list[str]):
        self.requests, self.unknown = requests, unknown

    def __iter__(self) -> Iterator["_AsOne"]:
        return (_AsOne(request, self.unknown, place) for place, request in enumerate(self.requests))


class _PadBatch:
    """Pads a batch as `pad_collate_fn` of Transformers does, and can be pickled."""

    def __init__(self, tokenizer: Bert4RecTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return pad_collate_fn(self.tokenizer, None)(rows)


class _AsOne:
    """Wraps a history, because `Pipeline.__call__` would take a list for a batch.

    Args:
        history: The history as the user gave it.
        unknown: The first unknown items of the whole call, to which `preprocess` adds.
        place: The place of the history in the input, from 0. None: the history is the input.
    """

    def __init__(self, history: Any, unknown: list[str], place: int | None = None):
        self.history, self.unknown, self.place = history, unknown, place


def count_short(counts: Counter[str], num_shown: int, num_eligible: int, top_k: int) -> None:
    """Count an answer that was made under rules.

    Args:
        counts: The number of "answers"; of "short" ones, with fewer than `top_k` items; of "filtered" ones, for which
            the filters leave fewer, with the items "left by filters"; and of "limited" ones, for which the quotas leave
            fewer of the eligible items, with the items "left by quotas".
        num_shown: Number of items in the answer.
        num_eligible: Number of items that the filters leave.
        top_k: Number of items that were asked for.
    """
    counts["answers"] += 1
    counts["short"] += num_shown < top_k
    if num_eligible < top_k:
        counts["filtered"] += 1
        counts["left by filters"] += num_eligible
    if num_shown < min(top_k, num_eligible):
        counts["limited"] += 1
        counts["left by quotas"] += num_shown


def warn_unknown(num_unknown: int, unknown: Sequence[str]) -> None:
    """Warn that unknown items were left out, the first of which are `unknown`."""
    if num_unknown:
        # There are no examples if data-loader workers collected them in other processes.
        examples = f", such as {', '.join(map(repr, unknown))}" if unknown else ""
        logger.warning("left out %d items that the catalogue lacks%s", num_unknown, examples)
