"""Approximate search over the item table, for catalogues whose exact ranking takes too long for one request."""

import os
from typing import Any

import numpy as np
import torch

from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction


class ItemIndex:
    """An index of `model.item_vectors()` in a graph of neighbours (HNSW, Malkov & Yashunin 2016), by usearch.

        index = ItemIndex.build(model)
        recommend = pipeline("sequential-recommendation", model=folder, index=index)

    It is of one state of the weights: build it anew after training and after `add_items`.
    """

    def __init__(self, index: Any):
        self.index = index  # a usearch.index.Index, whose keys are token ids

    @classmethod
    def build(
        cls,
        model: Bert4RecForMaskedItemPrediction,
        *,
        connectivity: int = 32,
        expansion_add: int = 128,
        expansion_search: int = 256,
    ) -> "ItemIndex":
        """Put all items of a model into an index.

        Args:
            model: Its weights are copied.
            connectivity: Neighbours of an item in the graph.
            expansion_add, expansion_search: Items looked at when one is added, and in a search: more find more of the
                best, and take longer.

        Raises:
            ImportError: Without usearch, `pip install 'bert4rec_hf[search]'`.
            ValueError: If a weight is NaN.
        """
        from usearch.index import Index

        vectors = model.item_vectors().cpu().numpy()
        if np.isnan(vectors).any():
            raise ValueError("an item vector is NaN: the weights are not finite, training has diverged")
        index = Index(
            ndim=vectors.shape[1],
            metric="ip",
            dtype="f32",
            connectivity=connectivity,
            expansion_add=expansion_add,
            expansion_search=expansion_search,
        )
        index.add(np.arange(len(vectors)) + FIRST_ITEM_ID, vectors)
        return cls(index)

    def save(self, path: str | os.PathLike) -> None:
        """Write one file."""
        self.index.save(os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike, *, expansion_search: int = 256) -> "ItemIndex":
        """What `save` wrote.

        Args:
            path: The file.
            expansion_search: As in `build`; the file does not have it.

        Raises:
            ValueError: If there is no such file, or it is none of these.
        """
        from usearch.index import Index

        try:
            index = Index.restore(os.fspath(path))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no index, or a damaged one ({error}): build and save it again") from error
        if index is None:
            raise ValueError(f"{path} is no index: expected a file that ItemIndex.save has written")
        index.expansion_search = expansion_search  # type: ignore[misc]  # its setter has no type
        return cls(index)

    def __len__(self) -> int:
        return len(self.index)

    def search(self, vectors: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The items with nearly the highest scores.

        Args:
            vectors: (batch, width + 1), of `model.user_vectors`.
            count: Number of items.

        Returns:
            scores: (batch, at most count), logits in descending order; -inf where no item was found.
            item_ids: Likewise, token ids; 0 where none was found.

        Raises:
            ValueError: If the vectors are of a model of another width, or NaN.
        """
        if vectors.isnan().any():
            raise ValueError("a user vector is NaN: the weights are not finite, training has diverged")
        if vectors.shape[1] != self.index.ndim:
            raise ValueError(
                f"the index has vectors of width {self.index.ndim}, the model of width {vectors.shape[1]}: build it "
                "from this model"
            )
        found = self.index.search(vectors.cpu().numpy(), count)
        # Of a single vector usearch leaves the batch out.
        keys, distances = np.atleast_2d(found.keys).astype(np.int64), np.atleast_2d(found.distances)
        counts: Any = getattr(found, "counts", [keys.shape[1]])
        is_found = np.arange(keys.shape[1]) < np.asarray(counts)[:, None]
        scores = np.where(is_found, 1 - distances, -np.inf).astype(np.float32)
        return torch.from_numpy(scores), torch.from_numpy(np.where(is_found, keys, 0))
