"""The evaluation protocol as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..data.histories import PARTS, Histories
from ..model.configuration_bert4rec import FIRST_ITEM_ID


@dataclass(frozen=True)
class Protocol:
    """How a number came about; none is stored or printed without it.

    Attributes:
        split: "leave-one-out" or "temporal", with its cuts, and whether there was no validation.
        part: "validation" or "test".
        candidates: What each target was ranked among.
        filter_seen_items: Whether a user's past items were left out, and a target among them a miss.
        num_users: Users with a target, all of them counted.
        num_users_without_past: Of these, those ranked from an empty history.
        share_seen_targets: Targets that the user has had before, and that the catalogue has.
        share_unknown_targets: Targets that the catalogue lacks; misses.
    """

    split: str
    part: str
    candidates: str
    filter_seen_items: bool
    num_users: int
    num_users_without_past: int
    share_seen_targets: float
    share_unknown_targets: float

    @classmethod
    def of(
        cls,
        histories: Histories,
        preparation: Mapping[str, Any],
        part: str,
        num_items: int,
        filter_seen_items: bool,
    ) -> "Protocol":
        """The protocol of `ranking_rows` over the whole catalogue."""
        users = np.flatnonzero(histories.target_positions[part] >= 0)
        positions = histories.target_positions[part][users]
        targets = histories.item_ids[histories.offsets[users] + positions]
        target_of = np.zeros(len(histories), np.int32)
        target_of[users] = targets
        lengths = np.diff(histories.offsets)
        before = histories.places() < np.repeat(histories.target_positions[part], lengths)
        is_target = (
            before & (histories.item_ids == np.repeat(target_of, lengths)) & (histories.item_ids >= FIRST_ITEM_ID)
        )
        num_seen = np.unique(np.repeat(np.arange(len(histories)), lengths)[is_target]).size
        split = preparation["split"]
        notes = [f"{name} from {split[f'{name}_cut']}" for name in PARTS if f"{name}_cut" in split]
        if not split.get("validation", True):
            notes.append("no validation targets, which train")
        return cls(
            split=split["name"] + (f" ({', '.join(notes)})" if notes else ""),
            part=part,
            candidates=f"all {num_items} items",
            filter_seen_items=filter_seen_items,
            num_users=len(users),
            num_users_without_past=int((positions == 0).sum()),
            share_seen_targets=num_seen / max(1, len(users)),
            share_unknown_targets=float(np.mean(targets < FIRST_ITEM_ID)) if len(users) else 0.0,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """One line for people."""
        filtered = "seen items filtered" if self.filter_seen_items else "seen items kept"
        return f"{self.split}, {self.part}; {self.candidates} ranked, {filtered}; {self.num_users:,} users"

    def describe_misses(self) -> str:
        """One line on the targets that no model can hit."""
        without_past = (
            f" {self.num_users_without_past:,} users were ranked from an empty history."
            if self.num_users_without_past
            else ""
        )
        return (
            f"{self.share_seen_targets:.1%} of the targets the user has had before"
            f"{' (misses)' if self.filter_seen_items else ''}, {self.share_unknown_targets:.1%} the catalogue "
            f"lacks (misses).{without_past}"
        )
