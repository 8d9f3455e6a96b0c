"""The options of all commands, as dataclasses."""

import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass, field
from typing import Any

from ..defaults import STREAMED_EVAL_SAMPLES, default_architecture
from ..evaluation.compare import REQUIREMENTS
from ..model.configuration_bert4rec import DERIVED_FIELDS, Bert4RecConfig


@dataclass
class PrepareArguments:
    """Where `prepare` reads and writes, and its memory. The other options are in `PrepareOptions`."""

    output: str = field(metadata={"help": "The prepared folder to write."})
    sql: str | None = field(default=None, metadata={"help": "Query whose rows are the log, with --database."})
    database: str | None = field(
        default=None,
        metadata={
            "help": "Database of --sql, as a URL: sqlite:///shop.db, duckdb:///shop.duckdb, "
            "postgres://user:password@host/name."
        },
    )
    memory_limit: str | None = field(
        default=None,
        metadata={
            "help": "Memory that DuckDB may use, for example 4GB; what does not fit is in temporary files (TMPDIR); "
            "four fifths of the machine's memory if left out."
        },
    )


@dataclass
class TrainArguments:
    """The options of `train`, except training arguments and architecture."""

    data: str = field(
        metadata={
            "help": "A folder that bert4rec prepare has written; or a log, which is prepared with the defaults of "
            "bert4rec prepare into the folder OUTPUT_DIR-data."
        }
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Train this model (a folder or Hub id) further; its token ids stay the same."}
    )
    publish_code: bool = field(
        default=False,
        metadata={
            "help": "Copy the model's code into the folder, so that trust_remote_code loads it without bert4rec_hf."
        },
    )


@dataclass
class TuneArguments:
    """The options of `tune`."""

    data: str = field(metadata={"help": "A folder that bert4rec prepare has written, with validation targets."})
    output_dir: str = field(metadata={"help": "The folder to write the recipe, the trials and their picture to."})
    minutes: float = field(default=60.0, metadata={"help": "Time of the search."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})
    seed: int = field(default=42, metadata={"help": "Seed of the search and of every trial."})


@dataclass
class RankingArguments:
    """The options of `evaluate` and `compare`: what is ranked, and how."""

    data: str = field(metadata={"help": "A folder that bert4rec prepare has written."})
    part: str = field(default="test", metadata={"choices": ["validation", "test"], "help": "Which targets to rank."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Leave the histories on disk and read only the users who are ranked, for a large log."},
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of users to rank, drawn at random. All if left out; with streaming, "
            f"{STREAMED_EVAL_SAMPLES}."
        },
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Number of histories ranked at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})
    disable_tqdm: bool = field(
        default=False, metadata={"help": "Show no progress bar. Without a terminal, there is never one."}
    )


@dataclass
class EvaluateArguments(RankingArguments):
    """The options of `evaluate`."""

    protocol: str = field(
        default="full",
        metadata={
            "choices": ["full", "paper"],
            "help": "What each target is ranked among. full: all items; paper: 100 items drawn by popularity, to "
            "compare with older publications.",
        },
    )
    targets: str = field(
        default="next",
        metadata={
            "choices": ["next", "all"],
            "help": "The targets of a user. next: the next event; all: in addition, metrics with all events of the "
            "part of a temporal split, or with all held-out items of the basket with leave-one-out.",
        },
    )
    horizon: str | None = field(
        default=None,
        metadata={
            "help": "With --targets all and a temporal split: how long after the cut an event is a target, for "
            "example 7d or 12h, or a number in the unit of the log's times; no limit if left out."
        },
    )
    report: str | None = field(
        default=None,
        metadata={
            "help": "A folder for a report. report.json, report.md and report.png have metrics by history length and "
            "by popularity of the target, and the popularity of the recommendations; ranks.parquet has each user's "
            "rank."
        },
    )


@dataclass
class CompareArguments(RankingArguments):
    """The options of `compare`."""

    margin: float = field(
        default=0.01,
        metadata={"help": "The loss of NDCG@10 that still counts as not worse, for example 0.01 from 0.13 to 0.12."},
    )
    require: str | None = field(
        default=None,
        metadata={
            "choices": [*REQUIREMENTS],
            "help": "End with exit status 1 unless the new model is better (the 95 %% interval of the difference lies "
            "above 0), or not worse (it lies above minus the margin), than the old model and the anchor.",
        },
    )
    anchor: str | None = field(
        default=None,
        metadata={
            "help": "A further model (a folder or Hub id) to compare the new one with, which stays the same from day "
            "to day, so that small losses do not add up unseen."
        },
    )
    slice_by: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Columns to divide the users by: event columns of the prepared folder, or columns of --items, with "
            "the values of the target. Groups by history length and popularity are there in any case.",
        },
    )
    items: str | None = field(
        default=None,
        metadata={
            "help": "Item table for --slice_by: Parquet, CSV or JSON lines with item_id and any columns; default: "
            "items.parquet of the new model."
        },
    )
    report: str | None = field(
        default=None,
        metadata={"help": "A folder for the comparison: comparison.json, comparison.md and comparison.png."},
    )


@dataclass
class CalibrateArguments:
    """The options of `calibrate`."""

    data: str = field(metadata={"help": "A folder that bert4rec prepare has written, with validation targets."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Leave the histories on disk and read only the users who are ranked, for a large log."},
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Number of histories ranked at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use an accelerator."})


@dataclass
class UpdateItemsArguments:
    """The options of `update-items`."""

    items: str | None = field(
        default=None,
        metadata={
            "help": "CSV, JSON lines or Parquet with item_id and a row for each item to add, to change or, in a column "
            "withdrawn, to withdraw; the table of the model folder if left out."
        },
    )
    output: str | None = field(default=None, metadata={"help": "The folder to write; the model folder if left out."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "A prepared folder with item features, from which the model learns anew to make vectors of new "
            "items."
        },
    )
    new_item_offset: float | None = field(
        default=None,
        metadata={
            "help": "Added to the scores of items without training events: the higher, the more often they are "
            "recommended."
        },
    )
    text_encoder: str | None = field(
        default=None,
        metadata={"help": "Name or folder of the encoder of features of the kind text; as in prepare if left out."},
    )


@dataclass
class RecommendArguments:
    """The options of `recommend`."""

    top_k: int = field(default=10, metadata={"help": "Number of items to recommend."})
    exclude: list[str] | None = field(
        default=None, metadata={"action": "extend", "help": "Item ids never to recommend."}
    )
    candidates: list[str] | None = field(
        default=None, metadata={"action": "extend", "help": "Item ids to choose from; the catalogue if left out."}
    )
    filter_seen_items: bool | None = field(
        default=None,
        metadata={"help": "Never recommend items of the history; default: the policy of the model folder."},
    )
    event_type: str | None = field(
        default=None,
        metadata={
            "help": "The target type of events to recommend for, such as purchase; the first target type of the model "
            "if left out."
        },
    )
    explain: bool = field(
        default=False,
        metadata={"help": "Print, for each recommendation, the items of the history that carry it. Not for files."},
    )
    exclude_file: str | None = field(
        default=None,
        metadata={
            "help": "File of item ids never to recommend: text with one id per line, or CSV (.csv, .tsv) or Parquet "
            "with the column item_id. They are added to those of --exclude."
        },
    )
    candidates_file: str | None = field(
        default=None,
        metadata={
            "help": "File of item ids to choose from, as --exclude_file. They are added to those of --candidates."
        },
    )
    histories: str | None = field(
        default=None,
        metadata={
            "help": "Histories, one per row: a Parquet file, JSON lines, or a folder or pattern of such files, with "
            "user_id, item_id (a list) and, if you like, the lists exclude, candidates and event_type."
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "With --histories: the Parquet file (.parquet) or the folder of Parquet files to write, with "
            "user_id, item_id, rank and score. Several processes write a folder."
        },
    )
    batch_size: int = field(
        default=64, metadata={"help": "With --histories: number of histories that the model reads at once."}
    )
    device: str | None = field(default=None, metadata={"help": "Device to run on, for example cpu or cuda:0."})


@dataclass
class ServeArguments:
    """The options of `serve`."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all of the machine."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for any free one."})
    store: str = field(
        default="sqlite:///bert4rec-events.db",
        metadata={
            "help": "Database of the users' events, as a URL of SQLAlchemy: sqlite:///events.db or "
            "postgresql+psycopg://user:password@host/name."
        },
    )
    histories: str | None = field(
        default=None, metadata={"help": "A folder that bert4rec prepare has written, to fill an empty database from."}
    )
    challenger: str | None = field(
        default=None, metadata={"help": "A further model (a folder or Hub id), for a share of the users."}
    )
    share: float | None = field(
        default=None, metadata={"help": "With --challenger: share of the users, by a hash of their ids; default: 0.1."}
    )
    served_log: str | None = field(
        default=None,
        metadata={"help": "A folder for Parquet files of what was recommended: request id, model, items and ranks."},
    )
    admin_port: int | None = field(
        default=None,
        metadata={
            "help": "Port of this machine alone for POST /reload. A model folder that is replaced is taken over in any "
            "case."
        },
    )
    max_waiting: int = field(
        default=256, metadata={"help": "Number of requests that may wait for the model; further ones get status 503."}
    )
    timeout: float = field(default=10.0, metadata={"help": "Seconds after which a request is given up."})
    max_batch_size: int = field(
        default=32, metadata={"help": "Number of requests that the model reads at once, if so many wait."}
    )
    device: str | None = field(default=None, metadata={"help": "Device to run on, for example cpu or cuda:0."})
    items: str | None = field(
        default=None,
        metadata={
            "help": "Item table: Parquet, CSV or JSON lines, with item_id; default: items.parquet of the model folder."
        },
    )
    rules: str | None = field(
        default=None,
        metadata={"help": "YAML file of rules by name, with where, boost, max_per and diversity; requests name them."},
    )
    allow_where: bool = field(
        default=False, metadata={"help": "Allow requests to have conditions on the item table of their own."}
    )


@dataclass
class RuleArguments:
    """The rules of a business, for `recommend` and `evaluate`."""

    where: str | None = field(
        default=None,
        metadata={
            "help": "Condition that every recommended item meets, such as \"category = 'shoes' AND price < 50\"."
        },
    )
    boost: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": 'Boosts "WEIGHT: CONDITION", such as "0.5: on_sale": number of standard deviations that are added '
            "to the scores of the items that meet the condition.",
        },
    )
    max_per: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": "Quotas COLUMN:N, such as category:2: at most N items of an answer have the same value.",
        },
    )
    diversity: float = field(
        default=0.0,
        metadata={"help": "How varied an answer is, from 0 (the order of the scores) to 1; for example 0.3."},
    )
    items: str | None = field(
        default=None,
        metadata={
            "help": "Item table of these rules: Parquet, CSV or JSON lines with item_id and any columns; default: "
            "items.parquet of the model folder."
        },
    )


@dataclass
class SimilarArguments:
    """The options of `similar`."""

    top_k: int = field(default=10, metadata={"help": "Number of similar items for each item."})


@dataclass
class DemoArguments:
    """The options of `demo`."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all of the machine."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    items: str | None = field(
        default=None,
        metadata={
            "help": "Item table: Parquet, CSV or JSON lines, with item_id; default: items.parquet of the model folder."
        },
    )
    space: str | None = field(
        default=None, metadata={"help": "Show no page; write a folder that a Hugging Face Space runs as it is."}
    )


@dataclass
class ExportArguments:
    """The options of `export`."""

    output: str = field(metadata={"help": "The ONNX file to write."})
    top_k: int = field(default=10, metadata={"help": "Number of items that the graph recommends."})


@dataclass
class ExportVectorsArguments:
    """The options of `export-vectors`."""

    output: str = field(
        metadata={"help": "The folder to write: items.parquet, successors.parquet; with --histories, users.parquet."}
    )
    histories: str | None = field(
        default=None, metadata={"help": "Histories whose vectors are written too, as for bert4rec recommend."}
    )
    batch_size: int = field(default=64, metadata={"help": "Number of histories that the model reads at once."})


@dataclass
class ConvertArguments:
    """The options of `convert`."""

    output: str = field(metadata={"help": "The model folder to write; with --to recbole, the file."})
    to: str = field(
        default="bert4rec_hf",
        metadata={
            "choices": ["bert4rec_hf", "recbole"],
            "help": "Format to write. bert4rec_hf: a model folder; recbole: a file that RecBole 1.2 and hopwise load.",
        },
    )
    items: str | None = field(
        default=None,
        metadata={
            "help": "File with the raw item ids, which a checkpoint lacks: RecBole's saved dataset (.pth), its atomic "
            "file (.inter), or a list in the order of the internal ids (.json, or text with one id per line)."
        },
    )
    item_titles: str | None = field(
        default=None,
        metadata={"help": "File of titles (CSV, JSON lines, Parquet), with the columns item_id and title."},
    )
    drop_oldest_item: bool = field(
        default=True,
        metadata={"help": "Drop the oldest item of a history even if there is room, as RecBole does."},
    )


@dataclass
class ConvertConfigArguments:
    """The options of `convert-config`."""

    output: str | None = field(
        default=None, metadata={"help": "The recipe to write; written to standard output if left out."}
    )


def architecture_arguments() -> type:
    """A dataclass of the fields of `Bert4RecConfig`. A field that the command line does not set is None."""
    # `inspect.getdoc` gives all versions of Python the same indentation; from 3.13 on, `__doc__` has none.
    described = re.findall(r"^ {4}(\w+) \(.*\):((?:\n {8}.*)+)", inspect.getdoc(Bert4RecConfig) or "", re.MULTILINE)
    sentences = {name: " ".join(text.split()).split(". ")[0].rstrip(".") for name, text in described}
    chosen = default_architecture(1, 1, {})  # the keys are the fields that are chosen from the log
    fields = []
    for name, annotation in Bert4RecConfig.__annotations__.items():
        if name in DERIVED_FIELDS:
            continue
        default = getattr(Bert4RecConfig, name)
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else None
        kind = str if choices else type(default)
        description = f"Architecture. {sentences.get(name, '')}"
        metadata: dict[str, Any] = {"help": f"{description}; default {default}."}
        if name in ("max_position_embeddings", "filter_seen_items"):
            metadata["help"] = f"{description}; default: the value of the prepared folder."
        elif name in chosen:
            metadata["help"] = f"{description}; chosen from the log if left out."
        if choices:
            metadata["choices"] = choices
        fields.append((name, kind | None, field(default=None, metadata=metadata)))
    return dataclasses.make_dataclass("ArchitectureArguments", fields)
