"""A model as an ONNX graph: token ids in, the best token ids and their scores out, for runtimes without Python."""

import os
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from ..files import files_beside
from ..model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID
from ..model.history_scores import add_to_scores
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction


class Recommender(nn.Module):
    """`recommend` as one graph without a loop or a check, for `torch.export` and ONNX.

    Args:
        model: In evaluation mode.
        top_k: Number of items, at most as many as the catalogue has.
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length) twice, (batch, H), (batch, E), (batch, C) -> scores and token ids (batch, top_k).

        The arguments are those of `recommend`. Widths are at least 1. Histories, exclusions and candidates are padded
        with 0; a row without candidates chooses from the catalogue. Where no item is left, the score is -inf.
        """
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = (input_ids.eq(MASK_TOKEN_ID) * numbers).argmax(dim=1, keepdim=True)
        scores = self.model(
            input_ids=input_ids, attention_mask=attention_mask, masked_positions=positions
        ).logits.squeeze(1)
        scores = add_to_scores(scores, self.model.history_scores(history_ids))
        chosen = torch.zeros_like(scores).scatter(1, candidate_ids, 1.0)
        anything = candidate_ids.amax(dim=1, keepdim=True) == 0
        allowed = (chosen > 0) | anything
        allowed = allowed & ~(torch.zeros_like(scores).scatter(1, exclude_ids, 1.0) > 0)
        scores = scores.masked_fill(~allowed, -torch.inf)[:, FIRST_ITEM_ID:]
        best, columns = scores.topk(self.top_k, dim=1)
        return best, columns + FIRST_ITEM_ID


def export_onnx(
    model: Bert4RecForMaskedItemPrediction, output: str | os.PathLike, *, top_k: int = 10
) -> torch.onnx.ONNXProgram:
    """Write `Recommender` as an ONNX file of any batch size and any length up to the model's.

    Inputs: input_ids, attention_mask, history_ids, exclude_ids, candidate_ids (int64), as in `Recommender`; outputs:
    scores (float32), item_ids.

    Args:
        model: A trained model.
        output: The file; written beside and moved there. Weights of 2 GB and more go into a file next to it. A file
            that is there already is replaced if its name ends in .onnx.
        top_k: Number of items.

    Raises:
        ImportError: Without the packages onnx and onnxscript: `pip install 'bert4rec_hf[export]'`.
        ValueError: If `output` is a folder, or a file of another name.
    """
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name a file, for example {output / 'model.onnx'}")
    if output.exists() and output.suffix != ".onnx":
        raise ValueError(f"{output} exists and its name does not end in .onnx; choose another --output")
    if model.dtype != torch.float32:
        model = deepcopy(model).float()  # runtimes on a CPU have no half-precision multiplication
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.max_position_embeddings)
    num_excluded, num_candidates = torch.export.Dim("excluded"), torch.export.Dim("candidates")
    history = torch.export.Dim("history")
    input_ids = torch.full((2, min(3, model.config.max_position_embeddings)), MASK_TOKEN_ID)
    nothing = torch.zeros(2, 2, dtype=torch.long)
    was_training = model.training
    try:
        program = torch.onnx.export(
            Recommender(model, top_k).eval(),
            (input_ids, torch.ones_like(input_ids), nothing, nothing.clone(), nothing.clone()),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask", "history_ids", "exclude_ids", "candidate_ids"],
            output_names=["scores", "item_ids"],
            dynamic_shapes=(
                {0: batch, 1: length}, {0: batch, 1: length}, {0: batch, 1: history}, {0: batch, 1: num_excluded},
                {0: batch, 1: num_candidates},
            ),
        )  # fmt: skip
    finally:
        model.train(was_training)
    assert program is not None  # it is one where dynamo=True
    with files_beside(output.parent) as folder:
        program.save(folder / output.name)
    return program
