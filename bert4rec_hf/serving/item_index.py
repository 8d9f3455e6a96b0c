"""Approximate search over the item vectors, for catalogues that are too large for exact ranking in one request."""

import os
from typing import Any

import numpy as np
import torch

from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction


class ItemIndex:
    """An approximate nearest-neighbour index of `model.item_vectors()`: HNSW (Malkov & Yashunin 2016), by usearch.

        index = ItemIndex.build(model)
        recommend = pipeline("sequential-recommendation", model=folder, index=index)

    The index is a copy of the weights: build it again after training and after `add_items`.
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
        """Build an index of all items of a model.

        Args:
            model: The model, whose item vectors are copied.
            connectivity: Number of neighbours of an item in the graph.
            expansion_add: Number of items that are examined when an item is added. A larger number makes searches more
                accurate and building slower.
            expansion_search: Number of items that are examined in a search. A larger number makes searches more
                accurate and slower.

        Raises:
            ImportError: If usearch is not installed: `pip install 'bert4rec_hf[search]'`.
            ValueError: If an item vector is NaN.
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
        """Write the index to one file."""
        self.index.save(os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike, *, expansion_search: int = 256) -> "ItemIndex":
        """Read an index that `save` wrote.

        Args:
            path: The file.
            expansion_search: Number of items that are examined in a search; the file does not store it.

        Raises:
            ImportError: If usearch is not installed: `pip install 'bert4rec_hf[search]'`.
            ValueError: If the file does not exist, is damaged, or is not an index.
        """
        from usearch.index import Index

        try:
            index = Index.restore(os.fspath(path))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no index, or a damaged one ({error}): build and save it again") from error
        if index is None:
            raise ValueError(f"{path} is no index: expected a file from ItemIndex.save")
        index.expansion_search = expansion_search  # type: ignore[misc]  # its setter has no type
        return cls(index)

    def __len__(self) -> int:
        return len(self.index)

    def search(self, vectors: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find approximately the items with the highest scores.

        Args:
            vectors: (batch, hidden size + 1) from `model.user_vectors`.
            count: Number of items to find.

        Returns:
            scores: (batch, at most `count`) float32 logits in descending order, padded with -inf.
            item_ids: (batch, at most `count`) int64 token ids, padded with 0.

        Raises:
            ValueError: If the vectors have another width than the index, or are NaN.
        """
        if vectors.isnan().any():
            raise ValueError("a user vector is NaN: the weights are not finite, training has diverged")
        if vectors.shape[1] != self.index.ndim:
            raise ValueError(
                f"the index has vectors of width {self.index.ndim}, the model of width {vectors.shape[1]}: build it "
                "from this model"
            )
        found = self.index.search(vectors.cpu().numpy(), count)
        # For a single vector, usearch returns arrays without the batch dimension.
        keys, distances = np.atleast_2d(found.keys).astype(np.int64), np.atleast_2d(found.distances)
        counts: Any = getattr(found, "counts", [keys.shape[1]])
        is_found = np.arange(keys.shape[1]) < np.asarray(counts)[:, None]
        scores = np.where(is_found, 1 - distances, -np.inf).astype(np.float32)
        return torch.from_numpy(scores), torch.from_numpy(np.where(is_found, keys, 0))
