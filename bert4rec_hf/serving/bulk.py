"""Recommendations for files of histories, over one or several processes, and for the data frames of Spark."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import distributed
from tqdm.auto import tqdm
from transformers import pipeline

from ..data.duckdb_tables import LIBRARY_ERRORS
from ..files import file_beside, finished, folder_beside
from ..hub.load import load_model
from ..model.configuration_bert4rec import UNK_TOKEN_ID
from ..model.pipeline import UNKNOWN_SHOWN, SequentialRecommendationPipeline, warn_unknown
from ..model.pipeline_inputs import check_count, item_list
from .history_files import ROWS_PER_BATCH, Batch, Part, divide, history_files, read_frame, read_part
from .rules import Rules

logger = logging.getLogger(__name__)

COLUMNS = ["user_id", "item_id", "rank", "score"]
PART_NAME = re.compile(r"part-\d{5,}-of-\d{5,}\.parquet")
# A process that has written its parts waits this long for the others.
LONGEST_WAIT = timedelta(days=7)


def recommend_file(
    pipe: SequentialRecommendationPipeline,
    histories: str | os.PathLike,
    output: str | os.PathLike,
    *,
    batch_size: int = 64,
) -> int:
    """Write the recommendations for files of histories. The memory needed does not grow with their number.

    If `accelerate launch` or `torchrun` has started several processes, all of them call this function and divide the
    parts of the histories. The output is then a folder, and equals that of one process.

    Args:
        pipe: The pipeline, with `top_k`, `rules` and other options set.
        histories: A Parquet file, a file of JSON lines, a folder or a pattern of such files, or a prepared folder. Each
            row has user_id, and item_id or history, a list of item ids, oldest first. A row may also have lists of item
            ids in exclude (never to recommend to this user) and candidates (to choose from for this user). They are
            null where they are not given; `exclude` of `pipe` holds in any case. For a model of event types, a list
            event_type has the types of the items, or items are dictionaries with item_id and event_type. Only the
            other columns of a prepared folder may stand beside these.
        output: The name of a file, which ends in .parquet, or a folder with a file for each part of the histories. A
            part is a file, or 131,072 rows of a larger Parquet file. The columns are user_id, item_id, rank (from 1)
            and score, the rows are in the order of the input. The output is moved to its place when it is complete. The
            output of an earlier call is replaced; any other file or folder is an error.
        batch_size: Number of histories that the model reads at once.

    Returns:
        The number of histories, those of all processes.

    Raises:
        FileNotFoundError: If there are no histories.
        ValueError: If `batch_size` is below 1, or `pipe` has `explain=True`; if `histories` have another format, a
            missing or unknown column, or a value that is no list of item ids; if `output` holds the histories or files
            of others, or is a file and there are several processes; or if the catalogue has none of the items, or none
            of the candidates, of the first histories.
    """
    check_count("batch_size", batch_size)
    if getattr(pipe, "_forward_params", {}).get("explain"):
        raise ValueError(f"the output has only {', '.join(COLUMNS)}: leave explain=True out of the pipeline")
    number, num_processes, _ = launched_process()
    files = history_files(histories)
    output = Path(output).resolve()  # follows links
    is_folder = output.is_dir() or not (output.exists() or output.suffix == ".parquet")
    _check_output(output, histories, files)
    if num_processes > 1 and not is_folder:
        raise ValueError(
            f"{num_processes} processes write a folder, with a file for each part of the histories; got {output}: "
            "choose a name without .parquet"
        )
    parts, user_type = divide(files)
    run = _Run(pipe, batch_size, histories)
    schema = pa.schema(list(zip(COLUMNS, (user_type, pa.string(), pa.int32(), pa.float32()), strict=True)))
    sizes = [None if part.stop is None else part.stop - part.start for part in parts[number::num_processes]]
    total = None if None in sizes else sum(filter(None, sizes))
    with tqdm(total=total, desc="recommending", disable=number > 0 or None) as progress:

        def write(some: Sequence[Part], path: Path) -> None:
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for part in some:
                    for batch in read_part(part, user_type):
                        writer.write_table(run.answer(batch))
                        progress.update(len(batch.requests))
                        if number == 0 and run.counts["histories"] >= ROWS_PER_BATCH:
                            run.check_catalogue()

        if is_folder:
            _write_folder(run, parts, output, write)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            with file_beside(output) as beside:
                write(parts, beside)
                run.check_catalogue()
    if number == 0:
        run.warn()
    return run.counts["histories"]


def _write_folder(run: "_Run", parts: list[Part], output: Path, write: Callable[[Sequence[Part], Path], None]) -> None:
    """Write a file for each part. Several processes divide the parts; the first makes the folder and moves it."""
    number, num_processes, _ = launched_process()
    if number == 0 and len(parts) < num_processes:
        logger.warning("%d processes have nothing to do: the histories have %d parts, and a file of JSON lines is one",
                       num_processes - len(parts), len(parts))  # fmt: skip
    names = [f"part-{place:05d}-of-{len(parts):05d}.parquet" for place in range(len(parts))]
    with _process_group(num_processes), ExitStack() as stack:
        # All processes have checked the output before the first makes a folder there.
        if any(seen != parts for seen in _gather(parts, num_processes)):
            raise ValueError(f"the processes see different files in {run.histories}; expected a folder that they share")
        folder = None
        if number == 0:
            folder = stack.enter_context(folder_beside(output, last_file=names[-1], own_files=_earlier_parts))
        folder = _gather(folder, num_processes)[0]
        if not folder.is_dir():
            raise ValueError(f"this process cannot see {folder}; expected an --output that all processes share")
        for place in range(number, len(parts), num_processes):
            write(parts[place : place + 1], folder / names[place])
        found = _gather((run.counts, run.unknown), num_processes)
        run.counts = sum((counts for counts, _ in found), Counter())
        for name, items in run.unknown.items():
            items[:] = [item for _, unknown in found for item in unknown[name]]
        if number == 0:
            run.check_catalogue()


def recommend_batches(
    model: str | os.PathLike,
    *,
    top_k: int = 10,
    filter_seen_items: bool | None = None,
    exclude: Iterable[str | int] | None = None,
    candidates: Iterable[str | int] | None = None,
    rules: Rules | None = None,
    event_type: str | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """A function for `mapInPandas` of Spark: from data frames of histories to data frames of recommendations.

        schema = "user_id string, item_id string, rank int, score float"
        histories.mapInPandas(recommend_batches("/shared/model"), schema)

    Each Python worker of Spark loads the model once, when it gets its first rows, and computes with one thread, since
    Spark gives each core a task of its own. Workers need this package and the model.

    Args:
        model: A model folder that all workers see, or a Hub id.
        top_k: Number of items to recommend.
        filter_seen_items: Whether the items of the history are left out. None: the policy of the model folder.
        exclude: Item ids never to recommend.
        candidates: Item ids to choose from. None: the catalogue.
        rules: Rules of the catalogue, which go to the workers with their item table.
        event_type: The target type to recommend for. None: the first target type of the model.
        batch_size: Number of histories that the model reads at once.
        device: The device of the workers.

    Returns:
        A function of an iterator of pandas data frames with the columns that `recommend_file` reads. It yields data
        frames with user_id, item_id, rank and score, and raises `ValueError` as `recommend_file` does. It can be
        pickled.
    """
    check_count("top_k", top_k)
    check_count("batch_size", batch_size)
    options = {
        "model": os.path.abspath(model) if os.path.isdir(model) else os.fspath(model),
        "device": device,
        "top_k": top_k,
        "filter_seen_items": filter_seen_items,
        "event_type": event_type,
        "exclude": None if exclude is None else tuple(item_list("exclude", exclude)),
        "candidates": None if candidates is None else tuple(item_list("candidates", candidates)),
    }
    return partial(_recommend_frames, options, batch_size, rules)


def launched_process() -> tuple[int, int, int]:
    """Of a launch by torchrun or Accelerate: the number of this process, of all processes, and on this machine."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, 0
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ["LOCAL_RANK"])


class _Run:
    """The answers for the batches of one call, and what is counted in it for checks and warnings."""

    def __init__(
        self,
        pipe: SequentialRecommendationPipeline,
        batch_size: int,
        histories: str | os.PathLike,
        rules: Rules | None = None,
    ):
        self.pipe, self.batch_size, self.histories = pipe, batch_size, histories
        self.rules = rules  # None: those of the pipeline
        self.counts: Counter[str] = Counter()
        self.unknown: dict[str, list[str]] = {"history": [], "candidates": []}  # the first unknown items

    def answer(self, batch: Batch) -> pa.Table:
        """The recommendations for a batch, in its order."""
        requests = [
            {
                name: items if name in ("exclude", "event_type") else self._known(name, items)
                for name, items in self._with_known_types(request).items()
            }
            for request in batch.requests
        ]
        has_choice = [request.get("candidates") != [] for request in requests]
        asked = [request for request, chooses in zip(requests, has_choice, strict=True) if chooses]
        # Given a list, the pipeline forms batches of histories of similar length.
        options: dict[str, Any] = {"batch_size": self.batch_size, "shortages": self.counts, "rules": self.rules}
        found = iter(self.pipe(asked, **options) if asked else ())
        answers = [next(found) if chooses else [] for chooses in has_choice]
        self.counts["histories"] += len(requests)
        self.counts["without candidates"] += len(requests) - len(asked)
        lengths = np.array([len(answer) for answer in answers], dtype=np.int64)
        entries = [entry for answer in answers for entry in answer]
        ranks = [rank for length in lengths for rank in range(1, length + 1)]
        columns = [
            batch.users.take(pa.array(np.repeat(np.arange(len(lengths)), lengths))),
            pa.array([entry["item_id"] for entry in entries], pa.string()),
            pa.array(ranks, pa.int32()),
            pa.array([entry["score"] for entry in entries], pa.float32()),
        ]
        return pa.table(columns, names=COLUMNS)

    def _with_known_types(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request with the types of known items only, since `_known` leaves out the other items."""
        if request.get("event_type") is None:
            return request
        token_ids = self.pipe.tokenizer.item_ids_to_token_ids(request["history"])
        types = zip(request["event_type"], token_ids, strict=True)
        return request | {"event_type": [kind for kind, token_id in types if token_id != UNK_TOKEN_ID]}

    def _known(self, name: str, items: list[str | int]) -> list[str | int]:
        token_ids = self.pipe.tokenizer.item_ids_to_token_ids(items)
        known = [item for item, token_id in zip(items, token_ids, strict=True) if token_id != UNK_TOKEN_ID]
        self.counts[f"known {name}"] += len(known)
        self.counts[f"unknown {name}"] += len(items) - len(known)
        if len(known) < len(items) and len(self.unknown[name]) < UNKNOWN_SHOWN:
            unknown = [str(item) for item, token_id in zip(items, token_ids, strict=True) if token_id == UNK_TOKEN_ID]
            self.unknown[name] = list(dict.fromkeys([*self.unknown[name], *unknown]))[:UNKNOWN_SHOWN]
        return known

    def check_catalogue(self) -> None:
        """Raise ValueError if the catalogue has none of the items, or none of the candidates, so far."""
        for name, of_what in (("history", "items"), ("candidates", "candidates")):
            if self.counts[f"unknown {name}"] and not self.counts[f"known {name}"]:
                raise ValueError(
                    f"the catalogue has none of the {of_what} of the first {self.counts['histories']:,} histories of "
                    f"{self.histories}, such as {self.unknown[name][0]!r}; the ids of the catalogue look like "
                    f"{self.pipe.tokenizer.items[0]!r}"
                )

    def warn(self) -> None:
        """Warn of what was left out."""
        unknown = list(dict.fromkeys([*self.unknown["history"], *self.unknown["candidates"]]))[:UNKNOWN_SHOWN]
        warn_unknown(self.counts["unknown history"] + self.counts["unknown candidates"], unknown)
        if self.counts["without candidates"]:
            logger.warning(
                "%d histories get no recommendations, since the catalogue has none of their candidates",
                self.counts["without candidates"],
            )
        if self.counts["short"]:
            self.pipe.warn_short(self.counts, rules=self.rules)


def _check_output(output: Path, histories: str | os.PathLike, files: Sequence[str]) -> None:
    """Raise ValueError unless the output is missing or an earlier output, and apart from the histories."""
    inputs = [Path(path).resolve() for path in files]
    if any(output == path or output in path.parents for path in inputs):
        raise ValueError(f"{output} holds the histories themselves; choose another --output")
    if Path(histories).expanduser().resolve() in output.parents:
        raise ValueError(f"{output} is in the folder of the histories, {histories}; choose an --output outside of it")
    if output.is_dir():
        _earlier_parts(output)
        return
    if not output.exists():
        if output.suffix in (".csv", ".json", ".jsonl", ".tsv"):
            raise ValueError(
                f"the recommendations are a Parquet file; got the name {output}: choose a name that ends in .parquet"
            )
        return
    if not output.is_file() or not _is_output(output):
        raise ValueError(
            f"{output} exists and is no Parquet file of {', '.join(COLUMNS)} from an earlier call; choose another "
            "--output"
        )


def _earlier_parts(folder: Path) -> Collection[str]:
    """The names of the files of an earlier output. Raises ValueError if the folder has other files."""
    names = {path.name for path in finished(folder)}
    for name in sorted(names):
        if not PART_NAME.fullmatch(name) or not _is_output(folder / name):
            raise ValueError(
                f"{folder} holds {name}, which is no Parquet file of {', '.join(COLUMNS)} from an earlier call; choose "
                "another --output"
            )
    return names


def _is_output(path: Path) -> bool:
    try:
        return pq.read_schema(path).names == COLUMNS
    except LIBRARY_ERRORS:
        return False


@contextmanager
def _process_group(num_processes: int) -> Iterator[None]:
    """The group of the processes of a launch, in which they wait for one another."""
    if num_processes == 1 or distributed.is_initialized():
        yield
        return
    try:
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot join the {num_processes} processes of this launch: {error}; start them with one torchrun or "
            "accelerate launch"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _gather(value: Any, num_processes: int) -> list[Any]:
    """The values of all processes. Waits until each of them has come here."""
    if num_processes == 1:
        return [value]
    values = [None] * num_processes
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise OSError(f"another process has failed, and nothing is written; its message says why: {error}") from error
    return values


@lru_cache(maxsize=1)
def _load(model: str, device: str, **options: Any) -> SequentialRecommendationPipeline:
    return pipeline("sequential-recommendation", model=load_model(model), tokenizer=model, device=device, **options)


def _recommend_frames(
    options: dict[str, Any], batch_size: int, rules: Rules | None, frames: Iterator[Any]
) -> Iterator[Any]:
    run = None
    for frame in frames:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            run = run or _Run(_load(**options), batch_size, "the data frames", rules)
            answer = run.answer(read_frame(frame)).to_pandas()
        finally:
            torch.set_num_threads(num_threads)
        yield answer
    if run is not None:
        run.warn()
