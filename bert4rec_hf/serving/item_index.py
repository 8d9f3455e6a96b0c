"""Approximate search over the item vectors, for catalogues that are too large for exact ranking in one request."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import file_beside
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction

# Number of lists that a search reads. benchmarks/results/serving.md has its recall.
NUM_PROBES = 64
# A list has a centre that is the mean of some of its items, at most this number. All items would take longer, and the
# centres would hardly differ.
ITEMS_PER_CENTRE = 64
# Number of steps of k-means.
CLUSTERING_STEPS = 10


class ItemIndex:
    """An approximate nearest-neighbour index of `model.item_vectors()`: an inverted file, by faiss.

        index = ItemIndex.build(model)
        recommend = pipeline("sequential-recommendation", model=folder, index=index)

    The items are divided into lists by k-means (Sivic & Zisserman 2003), and a search reads the lists whose centres are
    nearest to the user's vector. The index is a copy of the weights: build it again after training and after
    `add_items`.
    """

    def __init__(self, index: Any, num_probes: int = NUM_PROBES):
        self.index = index  # a faiss.IndexIVFFlat, whose ids are token ids
        self.num_probes = num_probes

    @classmethod
    def build(
        cls, model: Bert4RecForMaskedItemPrediction, *, num_lists: int | None = None, num_probes: int = NUM_PROBES
    ) -> "ItemIndex":
        """Build an index of all items of a model.

        Args:
            model: The model, whose item vectors are copied.
            num_lists: Number of lists. None: twice the square root of the number of items.
            num_probes: Number of lists that a search reads. A larger number makes searches more accurate and slower.

        Raises:
            ImportError: If faiss is not installed: `pip install 'bert4rec_hf[search]'`.
            ValueError: If an item vector is NaN, or a number is below 1.
        """
        import faiss

        vectors = model.item_vectors().cpu().numpy()
        if np.isnan(vectors).any():
            raise ValueError("an item vector is NaN: the weights are not finite, training has diverged")
        num_lists = round(2 * len(vectors) ** 0.5) if num_lists is None else num_lists
        _check_probes(num_probes)
        if not 1 <= num_lists <= len(vectors):
            raise ValueError(f"num_lists must lie between 1 and the number of items, {len(vectors)}; got {num_lists}")
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = ITEMS_PER_CENTRE, 1
        index.cp.niter = CLUSTERING_STEPS
        index.train(vectors)
        index.add_with_ids(vectors, np.arange(len(vectors)) + FIRST_ITEM_ID)
        return cls(index, num_probes)

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to one file."""
        import faiss

        with file_beside(Path(path)) as beside:
            faiss.write_index(self.index, os.fspath(beside))

    @classmethod
    def load(cls, path: str | os.PathLike, *, num_probes: int = NUM_PROBES) -> "ItemIndex":
        """Read an index that `save` wrote.

        Args:
            path: The file.
            num_probes: Number of lists that a search reads; the file does not store it.

        Raises:
            ImportError: If faiss is not installed: `pip install 'bert4rec_hf[search]'`.
            ValueError: If the file does not exist, is damaged, or is not an index, or the number is below 1.
        """
        import faiss

        _check_probes(num_probes)
        try:
            index = faiss.read_index(os.fspath(path))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is no index, or a damaged one ({reason}): build and save it again") from error
        if not isinstance(index, faiss.IndexIVFFlat):
            raise ValueError(f"{path} is no index of this kind: expected a file from ItemIndex.save")
        return cls(index, num_probes)

    def __len__(self) -> int:
        return self.index.ntotal

    def search(self, vectors: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find approximately the items with the highest scores.

        Args:
            vectors: (batch, hidden size + 1) from `model.user_vectors`.
            count: Number of items to find.

        Returns:
            scores: (batch, `count`) float32 logits in descending order, padded with -inf.
            item_ids: (batch, `count`) int64 token ids, padded with 0.

        Raises:
            ValueError: If the vectors have another width than the index, or are NaN.
        """
        import faiss

        if vectors.isnan().any():
            raise ValueError("a user vector is NaN: the weights are not finite, training has diverged")
        if vectors.shape[1] != self.index.d:
            raise ValueError(
                f"the index has vectors of width {self.index.d}, the model of width {vectors.shape[1]}: build it from "
                "this model"
            )
        queries = vectors.cpu().float().numpy()
        parameters: Any = faiss.SearchParametersIVF  # its annotations lack the arguments
        scores, item_ids = self.index.search(
            queries, count, params=parameters(nprobe=min(self.num_probes, self.index.nlist))
        )
        # The lists that are read may have fewer items than are asked for. All lists are read then.
        is_short = item_ids[:, min(count, len(self)) - 1] < 0
        if is_short.any():
            scores[is_short], item_ids[is_short] = self.index.search(
                queries[is_short], count, params=parameters(nprobe=self.index.nlist)
            )
        is_found = item_ids >= 0
        return (
            torch.from_numpy(np.where(is_found, scores, -np.inf).astype(np.float32)),
            torch.from_numpy(np.where(is_found, item_ids, 0)),
        )


def _check_probes(num_probes: int) -> None:
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1; got {num_probes}")
