"""`bert4rec export-vectors`: vectors and successors as Parquet, for a vector database."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..files import finished, folder_beside
from ..hub.load import load_model
from ..model.configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID, UNK_TOKEN_ID
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .history_files import divide, history_files, read_part

VECTOR_FILES = ("items.parquet", "successors.parquet", "users.parquet")
# Number of items whose vectors are written at once.
ITEMS_PER_WRITE = 2**14


def export_vectors(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    histories: str | os.PathLike | None = None,
    batch_size: int = 64,
) -> dict[str, int]:
    """Write the vectors of items and users, and the successors of items, as Parquet.

    The product of a user's and an item's vector is the network's score. The counted scores come on top, and only items
    among the successors of the newest items, or in the history, have any. So the best items are among those with the
    largest products, these successors, and the history. The pipeline scores such a union exactly, as `candidates`.

    Args:
        model: A model folder or Hub id.
        output: The folder to write, which is missing, empty, or an earlier export.

            - items.parquet: item_id, and vector, (hidden size + 1) float32, whose last value is the item's bias.
            - successors.parquet: item_id; successors, a list of item ids; and the lists transition and next_item of
              their unweighted scores. The row whose item_id is null has the popular items, for empty histories.
            - users.parquet, with `histories`: user_id, and vector, (hidden size + 1) float32, whose last value is 1.
        histories: Files of histories, as for `recommend_file`. None: no vectors of users.
        batch_size: Number of histories that the model reads at once.

    Returns:
        The number of rows of each file.

    Raises:
        FileNotFoundError: If there are no histories.
        ValueError: If the model is no model folder, the histories have another format, or the output is another folder.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose a folder for --output")
    loaded, tokenizer = load_model(model).eval(), Bert4RecTokenizer.from_pretrained(model)
    files = None if histories is None else history_files(histories)
    written = [name for name in VECTOR_FILES if name != "users.parquet" or files is not None]
    numbers = {}
    with folder_beside(output, last_file=written[-1], own_files=_own_files) as folder:
        vectors = loaded.item_vectors().cpu()
        if not vectors.isfinite().all():
            raise ValueError(f"a vector of {model} is not finite: training has diverged")
        schema = pa.schema([("item_id", pa.string()), ("vector", pa.list_(pa.float32()))])
        with pq.ParquetWriter(folder / "items.parquet", schema, compression="zstd") as writer:
            for start in range(0, len(vectors), ITEMS_PER_WRITE):
                part = vectors[start : start + ITEMS_PER_WRITE]
                names = tokenizer.items[start : start + ITEMS_PER_WRITE]
                writer.write_table(pa.table([pa.array(names, pa.string()), _lists(part)], schema=schema))
        numbers["items.parquet"] = len(vectors)
        table = _successors(loaded, tokenizer)
        pq.write_table(table, folder / "successors.parquet", compression="zstd")
        numbers["successors.parquet"] = table.num_rows
        if files is not None:
            numbers["users.parquet"] = _write_users(loaded, tokenizer, files, folder / "users.parquet", batch_size)
    return numbers


def _write_users(
    model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, files: list[str], path: Path, batch_size: int
) -> int:
    parts, user_type = divide(files)
    schema = pa.schema([("user_id", user_type), ("vector", pa.list_(pa.float32()))])
    number, length = 0, model.config.max_position_embeddings
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in parts:
            for batch in read_part(part, user_type):
                rows, types = [], []
                for request in batch.requests:
                    token_ids = tokenizer.item_ids_to_token_ids(request["history"])
                    known = [token_id for token_id in token_ids if token_id != UNK_TOKEN_ID]
                    rows.append(torch.tensor(tokenizer.append_mask(known, length)))
                    if tokenizer.event_types is not None:
                        # A plain item counts as an event of the first target type, as in the pipeline.
                        target = tokenizer.target_event_type_id()
                        first = tokenizer.event_types[target - 1]
                        names = [first if name is None else name for name in request.get("event_type") or []]
                        of_events = tokenizer.event_type_ids(names or [first] * len(token_ids))
                        kept = zip(of_events, token_ids, strict=True)
                        kinds = [kind for kind, token_id in kept if token_id != UNK_TOKEN_ID]
                        types.append(torch.tensor(tokenizer.append_mask_type(kinds, target, length)))
                found = []
                for start in range(0, len(rows), batch_size):
                    input_ids = torch.nn.utils.rnn.pad_sequence(
                        rows[start : start + batch_size], batch_first=True, padding_value=PAD_TOKEN_ID
                    )
                    event_type_ids = None
                    if types:
                        event_type_ids = torch.nn.utils.rnn.pad_sequence(
                            types[start : start + batch_size], batch_first=True
                        ).to(model.device)
                    states = model.user_vectors(input_ids.to(model.device), event_type_ids=event_type_ids)
                    found.append(states.cpu())
                if found:
                    writer.write_table(pa.table([batch.users, _lists(torch.cat(found))], schema=schema))
                number += len(rows)
    return number


def _successors(model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer) -> pa.Table:
    """The successors of all items as a table. Padding is left out."""
    scores = model.history_scores
    names = ["item_id", "successors", "transition", "next_item"]
    types = [pa.string(), pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.float32())]
    if scores.successor_ids is None:
        return pa.table([pa.array([], kind) for kind in types], names=names)
    token_ids = torch.tensor([PAD_TOKEN_ID, *range(FIRST_ITEM_ID, model.config.vocab_size)])
    successors = scores.successor_ids.cpu()[token_ids].long()
    is_there = successors >= FIRST_ITEM_ID
    offsets = pa.array(torch.nn.functional.pad(is_there.sum(1).cumsum(0), (1, 0)).numpy(), pa.int32())
    items = pa.array(tokenizer.items, pa.string())
    columns = [
        pa.array([None, *tokenizer.items], pa.string()),
        pa.ListArray.from_arrays(offsets, items.take(pa.array((successors[is_there] - FIRST_ITEM_ID).numpy()))),
    ]
    for values in (scores.successor_scores, scores.next_item_scores):
        columns.append(
            pa.ListArray.from_arrays(offsets, pa.array(values.float().cpu()[token_ids][is_there].numpy(), pa.float32()))
        )
    return pa.table(columns, names=names)


def _lists(vectors: torch.Tensor) -> pa.ListArray:
    width = vectors.shape[1]
    offsets = pa.array(range(0, (len(vectors) + 1) * width, width), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.contiguous().view(-1).numpy(), pa.float32()))


def _own_files(folder: Path) -> list[str]:
    """The files of an earlier export. Raises ValueError if the folder has other files."""
    names = [path.name for path in finished(folder)]
    others = [name for name in names if name not in VECTOR_FILES]
    if others:
        raise ValueError(f"{folder} holds {others[0]}, which is no file of an export; choose another --output")
    return names
