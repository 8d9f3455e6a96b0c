"""The evaluation protocol as data, which is stored with every metric."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ..data.histories import PARTS, Histories
from ..model.configuration_bert4rec import FIRST_ITEM_ID

# The targets of the metrics HR@k, NDCG@k and MRR.
ONE_TARGET = "the next event of each user"

# A protocol in a JSON file; see `read_json`.
PROTOCOL_FORM = {
    "split": str,
    "part": str,
    "candidates": str,
    "filter_seen_items": bool,
    "num_users": int,
    "num_users_without_past": int,
    "share_seen_targets": float,
    "share_unknown_targets": float,
    "calibrated?": bool,
    "targets?": str,
}


@dataclass(frozen=True)
class Protocol:
    """How a metric was computed. No metric is stored or printed without its protocol.

    Attributes:
        split: "leave-one-out" or "temporal", with the cuts in time, and notes if there was no validation part or if not
            all users were ranked.
        part: "validation" or "test".
        candidates: The items that each target was ranked among, in words.
        filter_seen_items: Whether a user's past items were excluded. A target among them is then a miss.
        num_users: Number of users with a target. All of them count.
        num_users_without_past: Number of these users that were ranked from an empty history.
        share_seen_targets: Share of targets that are in the catalogue and in the user's history. With event types, in
            the history with the target's type.
        share_unknown_targets: Share of targets that are not in the catalogue. They are misses.
        calibrated: Whether the weights of the model's counted scores were chosen on these targets.
        targets: What the targets are, in words.
    """

    split: str
    part: str
    candidates: str
    filter_seen_items: bool
    num_users: int
    num_users_without_past: int
    share_seen_targets: float
    share_unknown_targets: float
    calibrated: bool = False
    targets: str = ONE_TARGET

    @classmethod
    def of(
        cls,
        histories: Histories,
        preparation: Mapping[str, Any],
        part: str,
        num_items: int,
        filter_seen_items: bool,
        num_targets: int | None = None,
    ) -> "Protocol":
        """The protocol of ranking the rows of `ranking_rows` among the whole catalogue.

        Args:
            histories: Histories from `read_prepared`.
            preparation: The content of preparation.json.
            part: "validation" or "test".
            num_items: Number of items in the catalogue.
            filter_seen_items: Whether a user's past items are excluded.
            num_targets: Number of users with a target, if `histories` are a sample of them. None: they are all.
        """
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
        if histories.event_type_ids is not None:
            type_of = np.zeros(len(histories), np.int32)
            type_of[users] = histories.event_type_ids[histories.offsets[users] + positions]
            is_target &= histories.event_type_ids == np.repeat(type_of, lengths)
        num_seen = np.unique(np.repeat(np.arange(len(histories)), lengths)[is_target]).size
        split = preparation["split"]
        notes = [f"{name} from {split[f'{name}_cut']}" for name in PARTS if f"{name}_cut" in split]
        if not split.get("validation", True):
            notes.append("no validation targets, which train")
        if num_targets is not None and len(users) < num_targets:
            notes.append(f"{len(users):,} of {num_targets:,} users drawn at random")
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

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Protocol":
        """A protocol of a JSON file, which has been read with `PROTOCOL_FORM`. Other keys are left out."""
        return cls(**{field.name: content[field.name] for field in fields(cls) if content.get(field.name) is not None})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """The protocol in one line."""
        filtered = "seen items filtered" if self.filter_seen_items else "seen items kept"
        calibrated = "; weights of counted scores chosen on these targets" if self.calibrated else ""
        users = f"{self.num_users:,} users" + ("" if self.targets == ONE_TARGET else f" with {self.targets}")
        return f"{self.split}, {self.part}; {self.candidates} ranked, {filtered}; {users}{calibrated}"

    def describe_misses(self) -> str:
        """One line about the targets that no model can rank."""
        without_past = (
            f" {self.num_users_without_past:,} users were ranked from an empty history."
            if self.num_users_without_past
            else ""
        )
        return (
            f"{self.share_seen_targets:.1%} of the targets are items that the user had before"
            f"{' (misses)' if self.filter_seen_items else ''}, {self.share_unknown_targets:.1%} are not in the "
            f"catalogue (misses).{without_past}"
        )
