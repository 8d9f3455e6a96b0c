"""Vectors of texts, by any model of sentence-transformers."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

logger = logging.getLogger(__name__)


def with_text_vectors(
    table: pa.Table, columns: Sequence[dict[str, Any]], encoder: str | None
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Add a column of vectors for each feature of the kind text.

    Args:
        table: The item table.
        columns: The features. A feature `title` of the kind text becomes `title_vector`, whose `source` is `title`, and
            is computed unless the table has that column.
        encoder: Name or folder of the model. None: that of the features.

    Returns:
        The table and the features.

    Raises:
        ImportError: If sentence-transformers is not installed.
        ValueError: If there is no encoder, or it cannot be loaded, or a column is not text.
    """
    described = []
    for column in columns:
        if column["kind"] != "text":
            described.append(dict(column))
            continue
        source = column.get("source", column["name"])
        name, used = f"{source}_vector", encoder or column.get("encoder")
        # A path would not be the same on another machine, and is nobody else's business.
        kept = used if used is None or not os.path.exists(used) else os.path.basename(os.path.abspath(used))
        described.append({"name": name, "kind": "text", "source": source, "encoder": kept})
        if name in table.column_names or source not in table.column_names:
            continue
        if used is None:
            raise ValueError(f"item feature {source}:text needs an encoder: name one with --text_encoder")
        texts = table[source].cast(pa.string()).to_pylist()
        table = table.append_column(name, encode(texts, used))
    if encoder is not None and not any(column["kind"] == "text" for column in described):
        raise ValueError(f"text_encoder is for item features of the kind text; got {encoder} and none of them")
    return table, described


def encode(texts: Sequence[str | None], encoder: str) -> pa.Array:
    """The vector of each text, null where there is no text, as lists of float32."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "features of the kind text need sentence-transformers: pip install 'bert4rec_hf[text]'"
        ) from error
    try:
        model = SentenceTransformer(encoder)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the text encoder {encoder}: {error}") from error
    is_there = np.array([bool(text and text.strip()) for text in texts], bool)
    known = [text for text, there in zip(texts, is_there, strict=True) if there]
    logger.info("encoding %d texts with %s", len(known), encoder)
    vectors = np.asarray(model.encode(known, show_progress_bar=False), np.float32)
    lists: list[Any] = [None] * len(texts)
    for place, vector in zip(np.flatnonzero(is_there), vectors, strict=True):
        lists[place] = vector
    return pa.array(lists, pa.list_(pa.float32()))
