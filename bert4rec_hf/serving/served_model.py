"""A model folder that is served: its pipeline, and the version by which answers name it."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import pipeline

from ..hub.load import load_model
from ..model.pipeline import SequentialRecommendationPipeline
from .item_table import ItemTable
from .rules import Rules, named_rules, read_item_table

# A folder takes the place of another only if its catalogue has at least this share of the other's items.
MIN_SHARED_ITEMS = 0.5
READ_SIZE = 2**20
# The files of a model folder that are loaded, beside the weights.
LOADED_FILES = ("config.json", "items.json", "items.parquet", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ServedModel:
    """A loaded model.

    Attributes:
        source: The folder or Hub id as it was given, such as a symbolic link.
        place: What the source stood for when it was loaded; see `place_of`.
        version: The name of the folder and a checksum of its weights, which answers and logs name.
        pipe: The pipeline.
        items: The item table. None: there is none.
        rules: The rules that requests may name.
    """

    source: str
    place: tuple[Any, ...]
    version: str
    pipe: SequentialRecommendationPipeline
    items: ItemTable | None = None
    rules: Mapping[str, Rules] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        source: str,
        device: str | None = None,
        *,
        items: str | None = None,
        rules: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "ServedModel":
        """Load a model folder or Hub id, and answer a request with it, also under each of the rules.

        Args:
            source: The folder or Hub id.
            device: The device, such as "cuda:0". None: the one that Transformers chooses.
            items: The item table. None: items.parquet of the model, if it has one.
            rules: The rules by name, each as arguments of `read_rules`. They apply to the catalogue of this model.

        Raises:
            OSError, ValueError: If this is no model folder, or a damaged one, or the rules do not fit the item table.
        """
        place = place_of(source)
        folder = os.path.realpath(source) if os.path.isdir(source) else source
        model = load_model(folder)
        pipe: Any = pipeline("sequential-recommendation", model=model, tokenizer=folder, device=device)
        table = read_item_table(folder, items)
        named = named_rules(table, rules or {})
        # The first answer is slow, and what is damaged fails here and not at a user's request.
        for one in (None, *named.values()):
            pipe([], rules=one)
        name = Path(folder).name
        weights = Path(folder) / "model.safetensors"
        if weights.is_file():
            name += f"-{_checksum(weights)}"
        return cls(source, place, name, pipe, table, named)

    def check_successor(self, other: "ServedModel") -> None:
        """Raise ValueError if another model's catalogue is not one that can take this one's place."""
        items = set(self.pipe.tokenizer.items)
        shared = len(items.intersection(other.pipe.tokenizer.items))
        if shared < MIN_SHARED_ITEMS * len(items):
            raise ValueError(
                f"{other.source} has {shared:,} of the {len(items):,} items that are served, which is another "
                f"catalogue (expected at least {MIN_SHARED_ITEMS:.0%}): start another server for it"
            )


def place_of(source: str) -> tuple[Any, ...]:
    """What a model folder stands for at present: it differs after another folder has taken its place."""
    if not os.path.isdir(source):
        return (source,)
    found = []
    for path in sorted(Path(source).iterdir()):
        if path.name in LOADED_FILES or path.suffix == ".safetensors":
            status = path.stat()
            found.append((path.name, status.st_ino, status.st_mtime_ns, status.st_size))
    return (os.path.realpath(source), *found)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(READ_SIZE):
            digest.update(content)
    return digest.hexdigest()[:8]
