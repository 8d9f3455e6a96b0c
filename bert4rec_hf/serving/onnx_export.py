"""Exporting a model as an ONNX graph, for runtimes without Python: token ids in, recommendations and scores out."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import files_beside
from ..model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID
from ..model.history_scores import add_to_scores
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction


class Recommender(nn.Module):
    """`recommend` as one graph without loops and checks, for `torch.export` and ONNX.

    Args:
        model: The model, which is put into evaluation mode.
        top_k: Number of items to recommend, at most the number of items in the catalogue.

    Raises:
        ValueError: If `top_k` is below 1 or exceeds the number of items.
    """

    def __init__(self, model: Bert4RecForMaskedItemPrediction, top_k: int = 10):
        super().__init__()
        num_items = model.config.vocab_size - FIRST_ITEM_ID
        if not 1 <= top_k <= num_items:
            raise ValueError(f"top_k must lie between 1 and the number of items, {num_items}; got {top_k}")
        self.model, self.top_k = model.eval(), top_k

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        history_ids: torch.Tensor,
        exclude_ids: torch.Tensor,
        candidate_ids: torch.Tensor,
        event_type_ids: torch.Tensor | None = None,
        history_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend items.

        Args:
            input_ids: (batch, length) token ids with one [MASK] per row.
            attention_mask: (batch, length), 0 for padding.
            history_ids: (batch, H) token ids of the whole history, padded with 0. H is at least 1.
            exclude_ids: (batch, E) token ids never to recommend, padded with 0. E is at least 1.
            candidate_ids: (batch, C) token ids to choose from, padded with 0. C is at least 1. A row of zeros chooses
                from the whole catalogue.
            event_type_ids: (batch, length) types of the events, for a model of event types; the type of the [MASK] is
                the target type. None: the model has no types.
            history_type_ids: (batch, H) types of the events of history_ids.

        Returns:
            scores (batch, top_k) float32, in descending order, -inf where no item is left; and item_ids
            (batch, top_k) int64 token ids.
        """
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = (input_ids.eq(MASK_TOKEN_ID) * numbers).argmax(dim=1, keepdim=True)
        scores = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            masked_positions=positions,
            event_type_ids=event_type_ids,
        ).logits.squeeze(1)
        target_type_ids = None if event_type_ids is None else event_type_ids.gather(1, positions).squeeze(1)
        pairs = self.model.history_scores(history_ids, None, history_type_ids, target_type_ids)
        scores = add_to_scores(scores, pairs)
        chosen = torch.zeros_like(scores).scatter(1, candidate_ids, 1.0)
        anything = candidate_ids.amax(dim=1, keepdim=True) == 0
        allowed = (chosen > 0) | anything
        if self.model.config.withdrawn_item_ids:
            allowed = allowed & self.model.is_recommended(scores.device)
        allowed = allowed & ~(torch.zeros_like(scores).scatter(1, exclude_ids, 1.0) > 0)
        scores = scores.masked_fill(~allowed, -torch.inf)[:, FIRST_ITEM_ID:]
        best, columns = scores.topk(self.top_k, dim=1)
        return best, columns + FIRST_ITEM_ID


def export_onnx(
    model: Bert4RecForMaskedItemPrediction, output: str | os.PathLike, *, top_k: int = 10
) -> torch.onnx.ONNXProgram:
    """Write a model as an ONNX file, for any batch size and any length up to the model's maximum.

    The inputs are input_ids, attention_mask, history_ids, exclude_ids and candidate_ids (int64), as in
    `Recommender.forward`, and event_type_ids and history_type_ids for a model of event types. The outputs are scores
    (float32) and item_ids (int64).

    Args:
        model: A trained model.
        output: The file, which is written atomically. Weights of 2 GB and more go into a file next to it. An existing
            file is replaced if its name ends in .onnx.
        top_k: Number of items to recommend.

    Returns:
        The exported program.

    Raises:
        ImportError: If onnx or onnxscript is not installed: `pip install 'bert4rec_hf[export]'`.
        ValueError: If `output` is a folder or an existing file with another ending, or if `top_k` is out of range.
    """
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name a file, for example {output / 'model.onnx'}")
    if output.exists() and output.suffix != ".onnx":
        raise ValueError(f"{output} exists and its name does not end in .onnx; choose another --output")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        # Runtimes on a CPU have no half-precision multiplication, and the example inputs are on the CPU.
        model = deepcopy(model).to("cpu", torch.float32)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.max_position_embeddings)
    num_excluded, num_candidates = torch.export.Dim("excluded"), torch.export.Dim("candidates")
    history = torch.export.Dim("history")
    input_ids = torch.full((2, min(3, model.config.max_position_embeddings)), MASK_TOKEN_ID)
    nothing = torch.zeros(2, 2, dtype=torch.long)
    names = ["input_ids", "attention_mask", "history_ids", "exclude_ids", "candidate_ids"]
    inputs = [input_ids, torch.ones_like(input_ids), nothing, nothing.clone(), nothing.clone()]
    shapes: list[dict[int, Any]] = [
        {0: batch, 1: length}, {0: batch, 1: length}, {0: batch, 1: history}, {0: batch, 1: num_excluded},
        {0: batch, 1: num_candidates},
    ]  # fmt: skip
    if model.config.num_event_types:
        names += ["event_type_ids", "history_type_ids"]
        inputs += [torch.ones_like(input_ids), nothing.clone()]
        shapes += [{0: batch, 1: length}, {0: batch, 1: history}]
    was_training = model.training
    try:
        program = torch.onnx.export(
            Recommender(model, top_k).eval(),
            tuple(inputs),
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=["scores", "item_ids"],
            dynamic_shapes=tuple(shapes),
        )
    finally:
        model.train(was_training)
    assert program is not None  # for the type checker: with dynamo=True there always is a program
    with files_beside(output.parent) as folder:
        program.save(folder / output.name)
    return program
