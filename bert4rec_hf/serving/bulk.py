"""Recommendations for whole files of histories, streamed from Parquet to Parquet."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..files import file_beside
from ..model.configuration_bert4rec import UNK_TOKEN_ID
from ..model.pipeline import SequentialRecommendationPipeline
from ..model.tokenization_bert4rec import Bert4RecTokenizer

# Number of histories that are read, and of recommendations that are written, at once.
ROWS_PER_BATCH = 8192
COLUMNS = ["user_id", "item_id", "rank", "score"]


def recommend_file(
    pipe: SequentialRecommendationPipeline,
    histories: str | os.PathLike,
    output: str | os.PathLike,
    *,
    batch_size: int = 64,
) -> int:
    """Write the recommendations for a file of histories. The memory needed does not grow with their number.

    Args:
        pipe: The pipeline, with `top_k` and other options set.
        histories: Parquet file with one history per row: user_id, and item_id, a list of item ids, oldest first. Nulls
            in the list are left out. Or a pattern of such files, which are read in the order of their names.
        output: Parquet file with the columns user_id, item_id, rank (from 1) and score, in the order of the input. It
            is written atomically. The output of an earlier call is replaced; any other file is an error.
        batch_size: Number of histories that the model reads at once.

    Returns:
        The number of histories.

    Raises:
        ValueError: If `batch_size` is below 1; if `histories` is not a Parquet file, lacks a column, or a column has
            the wrong type, or another type than in the first file; if `output` is a folder, is one of the `histories`
            itself, or exists and is not an earlier output; or if the catalogue has none of the items of the first
            histories.
    """
    output = Path(output).resolve()  # follows links
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    files = [os.fspath(histories)] if os.path.exists(histories) else sorted(glob.glob(os.fspath(histories)))
    # A path without a file fails in Parquet with an error that names the path.
    sources = [_source(file) for file in files or [os.fspath(histories)]]
    _check_output(output, files)
    user_types = [source.schema_arrow.field("user_id").type for source in sources]
    if len(set(user_types)) > 1:
        raise ValueError(
            f"expected one type of user_id in all files of {histories}; got {', '.join(map(str, set(user_types)))}"
        )
    kinds = (user_types[0], pa.string(), pa.int32(), pa.float32())
    result = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    num_histories = sum(source.metadata.num_rows for source in sources)
    batches = (batch for source in sources for batch in source.iter_batches(ROWS_PER_BATCH, columns=COLUMNS[:2]))

    def answers() -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        with tqdm(total=num_histories, desc="recommending", disable=None) as progress:
            for part, batch in enumerate(batches):
                rows = [[item for item in items or () if item is not None] for items in batch["item_id"].to_pylist()]
                if part == 0:
                    _check_items(pipe.tokenizer, rows, histories)
                # Given a list, the pipeline forms batches of histories of similar length.
                yield from zip(batch["user_id"].to_pylist(), pipe(rows, batch_size=batch_size), strict=True)
                progress.update(len(rows))

    output.parent.mkdir(parents=True, exist_ok=True)
    with file_beside(output) as beside, pq.ParquetWriter(beside, result, compression="zstd") as writer:
        columns: list[list[Any]] = [[], [], [], []]
        for user, answer in answers():
            for rank, entry in enumerate(answer, start=1):
                for column, value in zip(columns, (user, entry["item_id"], rank, entry["score"]), strict=True):
                    column.append(value)
            if len(columns[0]) >= ROWS_PER_BATCH:
                writer.write_table(pa.table(columns, schema=result))
                columns = [[], [], [], []]
        writer.write_table(pa.table(columns, schema=result))
    return num_histories


def _source(file: str) -> pq.ParquetFile:
    """A file of histories. Raises ValueError if it is none."""
    try:
        source = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file: {error}") from error
    schema = source.schema_arrow
    for name in ("user_id", "item_id"):
        if name not in schema.names:
            raise ValueError(f"{file} has no column {name}; expected user_id and item_id, got {schema.names}")
        if schema.names.count(name) > 1:
            raise ValueError(f"{file} has the column {name!r} twice; rename one of them")
    if not (pa.types.is_list(schema.field("item_id").type) or pa.types.is_large_list(schema.field("item_id").type)):
        raise ValueError(
            f"item_id of {file} must be a list, one history per row; got {schema.field('item_id').type}: make "
            "histories from a log with bert4rec prepare"
        )
    return source


def _check_items(tokenizer: Bert4RecTokenizer, rows: list[list[Any]], histories: str | os.PathLike) -> None:
    """Raise if the catalogue has none of the items of the first histories."""
    shown = list(dict.fromkeys(item for items in rows for item in items))
    if shown and set(tokenizer.item_ids_to_token_ids(shown)) == {UNK_TOKEN_ID}:
        raise ValueError(
            f"the catalogue has none of the items of the first {len(rows):,} histories of {histories}, such as "
            f"{shown[0]!r}; the ids of the catalogue look like {tokenizer.items[0]!r}"
        )


def _check_output(output: Path, files: Sequence[str]) -> None:
    """Raise ValueError unless the file is missing or an earlier output."""
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name a file, for example {output / 'recommendations.parquet'}")
    if not output.exists():
        if output.suffix in (".csv", ".json", ".jsonl", ".tsv"):
            raise ValueError(
                f"the recommendations are a Parquet file; got the name {output}: choose a name that ends in .parquet"
            )
        return
    if any(output.samefile(file) for file in files):
        raise ValueError(f"{output} holds the histories themselves; choose another --output")
    try:
        names = pq.read_schema(output).names if output.is_file() else None
    except pa.ArrowInvalid:
        names = None
    if names != COLUMNS:
        raise ValueError(
            f"{output} exists and is no Parquet file of {', '.join(COLUMNS)} from an earlier call; choose another "
            "--output"
        )
