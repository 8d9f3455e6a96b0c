"""The command `bert4rec`. It parses arguments and calls the functions of the package."""

import argparse
import dataclasses
import difflib
import inspect
import io
import json
import logging
import re
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import torch
import transformers
import yaml
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import HfArgumentParser

from .data.prepare_options import PrepareOptions
from .defaults import STREAMED_EVAL_SAMPLES
from .model.configuration_bert4rec import DERIVED_FIELDS, UNK_TOKEN_ID, Bert4RecConfig
from .version import __version__

logger = logging.getLogger(__name__)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option, and defaults only for options that have one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """A parser with errors in one line, and with recipes: YAML files whose options the command line overrides."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        for action in self._actions:  # the negation of a flag would repeat the help of the flag
            if action.option_strings[0].startswith("--no_"):
                action.help = f"The same as --{action.option_strings[0].removeprefix('--no_')} false."

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        options = unknown[: unknown.index("--")] if "--" in unknown else unknown
        for argument in options:
            if argument.startswith("-") and not self._negative_number_matcher.match(argument):
                self.error(f"unknown option {argument.split('=')[0]}{self._nearest(argument, '--')}")
        if isinstance(getattr(parsed, "items", None), list):
            # In Python 3.11, argparse does not assign item ids that follow an option.
            parsed.items += unknown[: len(options)] + unknown[len(options) + 1 :]
            unknown = []
        surplus = [argument for argument in unknown if argument != "--"]
        if surplus and hasattr(parsed, "log"):
            self.error(
                f"expected one log; got {surplus[0]} as well: quote a pattern of files, as in 'events-*.parquet'"
            )
        if surplus:
            self.error(f"unexpected argument {surplus[0]}; see {self.prog} --help")
        return parsed, unknown

    def with_recipe(self, arguments: Sequence[str]) -> list[str]:
        """Put the options of the recipe in `--config` before the arguments, so that the arguments override them."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = self.error  # type: ignore[method-assign]
        finder.add_argument("--config")
        found, rest = finder.parse_known_args(arguments)
        if found.config is None:
            return rest
        try:
            text = Path(found.config).read_text("utf-8")
            recipe = yaml.safe_load(text) or {}
            as_written = yaml.load(text, Loader=yaml.BaseLoader) or {}  # YAML reads the item id 010 as the number 8
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"cannot read the recipe {found.config}: {_one_line(error)}")
        if not isinstance(recipe, dict):
            self.error(f"the recipe {found.config} must be a mapping of options to values; got {recipe!r}")
        words = []
        for key, value in recipe.items():
            if key in ("config", "help"):
                self.error(f"{key} in {found.config} is for the command line only; remove it")
            if f"--{key}" not in self._option_string_actions:
                self.error(f"unknown key {key!r} in {found.config}{self._nearest(str(key))}")
            # A list on the command line would otherwise be appended to the list of the recipe.
            is_overridden = any(word.split("=")[0] == f"--{key}" for word in rest)
            if value is None or value == [] or is_overridden:
                continue
            if isinstance(value, dict):
                value = json.dumps(value)
            elif not isinstance(value, bool):
                value = as_written.get(key, value)  # BaseLoader has no keys from YAML merges (<<)
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        # --config separates the two, so that a list at the end of the recipe does not take in positional arguments.
        return [*words, "--config", found.config, *rest]

    def _nearest(self, name: str, prefix: str = "") -> str:
        known = [option.removeprefix("--") for option in self._option_string_actions]
        nearest = difflib.get_close_matches(name.split("=")[0].lstrip("-"), known, n=1)
        return f"; did you mean {prefix}{nearest[0]}?" if nearest else f"; see {self.prog} --help"


# A user with more events in one minute looks like a bot, or like an id that many people share.
EVENTS_A_MINUTE_OF_A_PERSON = 60


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
class EvaluateArguments:
    """The options of `evaluate`."""

    data: str = field(metadata={"help": "A folder that bert4rec prepare has written."})
    part: str = field(default="test", metadata={"choices": ["validation", "test"], "help": "Which targets to rank."})
    protocol: str = field(
        default="full",
        metadata={
            "choices": ["full", "paper"],
            "help": "What each target is ranked among. full: all items; paper: 100 items drawn by popularity, to "
            "compare with older publications.",
        },
    )
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
    report: str | None = field(
        default=None,
        metadata={
            "help": "A folder for a report. report.json, report.md and report.png have metrics by history length and "
            "by popularity of the target, and the popularity of the recommendations; ranks.parquet has each user's "
            "rank."
        },
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
            "user_id, item_id (a list) and, if you like, the lists exclude and candidates."
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
class ExportArguments:
    """The options of `export`."""

    output: str = field(metadata={"help": "The ONNX file to write."})
    top_k: int = field(default=10, metadata={"help": "Number of items that the graph recommends."})


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
        default=None, metadata={"help": "CSV or Parquet file of titles, with the columns item_id and title."}
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


def _architecture_arguments() -> type:
    """A dataclass of the fields of `Bert4RecConfig`. A field that the command line does not set is None."""
    from .defaults import default_architecture

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


def prepare(arguments: Sequence[str]) -> None:
    """Turn a raw log into a prepared folder."""
    parser = _Parser((PrepareArguments, PrepareOptions), prog="bert4rec prepare", description=prepare.__doc__)
    parser.add_argument(
        "log",
        nargs="?",
        help="A file (CSV, JSON lines or Parquet), a folder, a glob pattern, a URL, or the name of a dataset: ml-100k.",
    )
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    words = parser.with_recipe(arguments)
    where, options, rest = parser.parse_args_into_dataclasses(words)

    if options.min_rating is None and any(word.split("=")[0] == "--rating_column" for word in words):
        parser.error(
            f"--rating_column is for --min_rating; got {options.rating_column} alone: leave it out, or add --min_rating"
        )
    if (where.sql is None) != (where.database is None):
        parser.error("--sql and --database belong together")
    if (rest.log is None) == (where.sql is None):
        parser.error("expected a log, or --sql and --database; got " + ("both" if rest.log else "neither"))
    _prepare(rest.log or (where.sql, where.database), where.output, options, where.memory_limit)
    print(f"wrote {where.output}; next: bert4rec train --data {shlex.quote(where.output)} --output_dir MODEL")


def _prepare(log: str | tuple[str, str], output: str, options: PrepareOptions, memory_limit: str | None = None) -> None:
    """Prepare a log, or the rows of a query, and print its statistics and the defaults that were chosen for it."""
    import duckdb

    from .data import preparation
    from .data.logs import query

    try:
        source = query(*log) if isinstance(log, tuple) else log
        prepared = preparation.prepare(source, output, options, memory_limit=memory_limit)
    except duckdb.Error as error:
        raise OSError(f"DuckDB could not prepare {log}: {error}") from error
    except RuntimeError as error:
        if "interrupted" in str(error).lower():  # DuckDB raises this for Ctrl-C in the middle of a query
            raise KeyboardInterrupt from error
        raise
    statistics = prepared["statistics"]
    lengths = statistics["history_length"]
    print(
        f"{statistics['num_users']:,} users, {statistics['num_items']:,} items, "
        f"{statistics['num_events']:,} events; history lengths: median {lengths['median']:g}, "
        f"three quarters up to {lengths['p75']:g}, longest {lengths['max']:,}"
    )
    tied, order = statistics["share_tied_times"], prepared["columns"]["sequence_column"]
    print(
        f"repeated events {statistics['share_repeated_events']:.1%}, "
        f"{f'tied times {tied:.1%}' if tied is not None else f'no times: in the order of {order}'}, "
        f"cold targets {statistics['share_cold_targets']:.1%}"
    )
    identical = statistics["num_duplicate_rows"]
    if identical and options.duplicates == "keep":
        print(
            f"{identical:,} rows repeat the user, item and time of another row: if these are duplicates by mistake, "
            "--duplicates drop_identical keeps one of each"
        )
    busy = [
        f"{user['user_id']} ({user['num_events']:,} events, "
        + (f"{user['most_in_a_minute']:,} in one minute)" if user["most_in_a_minute"] else "no times)")
        for user in statistics["longest_histories"]
        if (user["most_in_a_minute"] or 0) > EVENTS_A_MINUTE_OF_A_PERSON
    ]
    if busy:
        print(
            f"users that look like no persons: {', '.join(busy)}; --max_user_events leaves out users with more events, "
            "--where those that you name"
        )
    if prepared["split"]["name"] == "none":
        print("no targets are held out: all events train")
    else:
        print(
            f"{prepared['split']['name']}: {statistics['num_validation_targets']:,} validation and "
            f"{statistics['num_test_targets']:,} test targets"
        )
    if options.max_length:
        reason = "as given"
    elif lengths["p75"] <= prepared["max_length"]:
        reason = "the shortest of 50, 100, 200 that three quarters of the histories fit into"
    else:
        reason = "the longest of 50, 100, 200; more than a quarter of the histories are longer"
    print(f"history length {prepared['max_length']} ({reason})")
    if options.filter_seen_items is not None:
        reason = "as given"
    elif prepared["filter_seen_items"]:
        reason = "fewer than 5 % of events are repeats"
    else:
        reason = "5 % of events or more are repeats"
    policy = "are not recommended again" if prepared["filter_seen_items"] else "may be recommended again"
    filtered = prepared["filter_seen_items"] and prepared["filters"].get("min_rating") is not None
    print(f"seen items {policy} ({reason})" + ("; events rated lower do not count as seen" if filtered else ""))


def train(arguments: Sequence[str]) -> None:
    """Train a model on a prepared folder or a log. Every checkpoint is a model folder."""
    from .runs import train_prepared
    from .training.arguments import Bert4RecTrainingArguments
    from .training.resume import check_output

    parser = _Parser(
        (TrainArguments, Bert4RecTrainingArguments, _architecture_arguments()),
        prog="bert4rec train",
        usage="bert4rec train --data FOLDER_OR_LOG --output_dir FOLDER [--config RECIPE] [OPTION …]",
        description=train.__doc__,
    )
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    # The help lists the options of this package first, then the hundred options of Transformers.
    actions = parser._optionals._group_actions
    others = parser.add_argument_group("other training arguments, those of Transformers")
    own = {"output_dir", *Bert4RecTrainingArguments.__annotations__}
    inherited = Bert4RecTrainingArguments.__dataclass_fields__.keys() - own
    for action in [action for action in actions if action.dest in inherited]:
        actions.remove(action)
        others._group_actions.append(action)
    parser._option_string_actions["--output_dir"].help = "The folder to write the model and its checkpoints to."
    parser._option_string_actions["--resume_from_checkpoint"].help = 'The folder of a checkpoint, or "last".'
    options, training_arguments, architecture, _ = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))
    data, output_dir = options.data, training_arguments.output_dir
    if not Path(data).is_dir():  # data is a log
        check_output(output_dir, training_arguments.resume_from_checkpoint)
        log, data = data, f"{Path(output_dir)}-data"
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                if Path(data).exists():
                    parser.error(f"{data}, where {log} would be prepared, exists: train on it with --data {data}")
                try:
                    _prepare(log, data, PrepareOptions())
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"{error}, or a prepared folder") from error
                except ValueError as error:
                    raise ValueError(f"{error} (for options of bert4rec prepare, run that first)") from error
                print(f"wrote {data}")
    trainer = train_prepared(
        data,
        training_arguments,
        options.model_name_or_path,
        publish_code=options.publish_code,
        **{name: value for name, value in vars(architecture).items() if value is not None},
    )
    if trainer.is_world_process_zero():
        if trainer.calibration is not None and training_arguments.calibrate:
            print(format_calibration(trainer.calibration))
        folder, data = shlex.quote(output_dir), shlex.quote(data)
        held_out = trainer.preparation is None or trainer.preparation["split"]["name"] != "none"
        following = f"evaluate {folder} --data {data}" if held_out else f"recommend {folder} ITEM_ID ITEM_ID …"
        print(f"wrote {output_dir}; next: bert4rec {following}")


def tune(arguments: Sequence[str]) -> None:
    """Search width, dropout, mask ratio and epochs on the validation targets, and write the best as a recipe."""
    parser = _Parser(TuneArguments, prog="bert4rec tune", description=tune.__doc__)
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, _ = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .tuning import tune_prepared

    try:
        found = tune_prepared(**vars(options))
    except ImportError as error:
        parser.error(f"{error}: pip install 'bert4rec_hf[tune]'")
    folder, data = shlex.quote(options.output_dir), shlex.quote(options.data)
    best = ", ".join(f"{name} {value:g}" for name, value in found["best"].items())
    print(f"best of {len(found['trials'])} trials: {best}")
    print(f"wrote {options.output_dir}: recipe.yaml, trials.json and tuning.png")
    print(f"next: bert4rec train --config {folder}/recipe.yaml --data {data} --output_dir MODEL")


def evaluate(arguments: Sequence[str]) -> None:
    """Rank held-out targets with a model and with baselines, and write the metrics into the model folder."""
    parser = _Parser(EvaluateArguments, prog="bert4rec evaluate", description=evaluate.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .hub.model_card import read_evaluations
    from .runs import evaluate_prepared

    record = evaluate_prepared(rest.model, **vars(options))
    if PartialState().is_main_process:
        print(format_evaluation(record))
        folder = Path(rest.model)
        is_stored = folder.is_dir() and record in read_evaluations(folder)
        stored = f"wrote {folder / 'evaluation.json'} and the model card; " if is_stored else ""
        if options.report is not None:
            print(
                f"wrote {Path(options.report) / 'report.md'} and, beside it, report.json, report.png and ranks.parquet"
            )
        print(f"{stored}next: bert4rec recommend {shlex.quote(rest.model)} ITEM_ID ITEM_ID …")


def calibrate(arguments: Sequence[str]) -> None:
    """Choose the weights of a model's counted scores on the validation targets, and store them in its folder."""
    parser = _Parser(CalibrateArguments, prog="bert4rec calibrate", description=calibrate.__doc__)
    parser.add_argument("model", help="A model folder, which is changed if this pays.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .runs import calibrate_prepared

    record = calibrate_prepared(rest.model, **vars(options))
    print(format_calibration(record))
    following = f"bert4rec evaluate {shlex.quote(rest.model)} --data {shlex.quote(options.data)}"
    print(f"{f'wrote {rest.model}' if record['adopted'] else f'{rest.model} stays as it was'}; next: {following}")


def recommend(arguments: Sequence[str]) -> None:
    """Recommend the next items for one history of item ids, or for files of histories."""
    parser = _Parser(RecommendArguments, prog="bert4rec recommend", description=recommend.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument("items", nargs="*", help="Item ids of one history, oldest first.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))
    if (options.histories is None) != (options.output is None):
        parser.error("--histories and --output belong together")
    if options.histories is not None and rest.items:
        parser.error("give item ids or --histories, not both")
    if options.batch_size < 1:
        parser.error(f"--batch_size must be at least 1; got {options.batch_size}")
    words = [word.split("=")[0].replace("-", "_") for word in arguments[: [*arguments, "--"].index("--")]]
    if options.histories is None and "__batch_size" in words:
        parser.error("--batch_size is for --histories; leave it out for one history")

    from .hub.load import load_model
    from .serving.bulk import launched_process, recommend_file
    from .serving.history_files import read_item_ids

    number, num_processes, local_number = launched_process()
    if num_processes > 1 and options.histories is None:
        parser.error(f"{num_processes} processes divide the files of --histories; got one history: start one process")
    if number > 0:
        logging.getLogger(__package__).setLevel(logging.ERROR)  # the first process warns for all
    lists: dict[str, list[str] | None] = {"exclude": options.exclude, "candidates": options.candidates}
    for name, path in (("exclude", options.exclude_file), ("candidates", options.candidates_file)):
        if path is not None:
            lists[name] = [*(lists[name] or ()), *read_item_ids(path)]
            if name == "candidates" and not lists[name]:
                parser.error(f"--candidates_file {path} has no item ids; expected at least one")
    model = load_model(rest.model)
    device = options.device
    if device is not None:
        try:
            model.to(device)
        except (AssertionError, RuntimeError) as error:
            parser.error(f"cannot use the device {device!r}: {_one_line(error)}")
    elif num_processes > 1:
        device = local_number % max(torch.accelerator.device_count(), 1)  # the processes share the devices
    pipe = transformers.pipeline(
        "sequential-recommendation",
        model=model,
        tokenizer=rest.model,
        device=device,
        top_k=options.top_k,
        filter_seen_items=options.filter_seen_items,
        **lists,
    )
    excluded = lists["exclude"] or []
    token_ids = pipe.tokenizer.item_ids_to_token_ids(excluded)
    unknown = [item for item, token_id in zip(excluded, token_ids, strict=True) if token_id == UNK_TOKEN_ID]
    if unknown:
        logger.warning(
            "the catalogue lacks %d of the %d excluded items: %s", len(unknown), len(excluded), _first(unknown)
        )
    if options.histories is not None:
        num_users = recommend_file(pipe, options.histories, options.output, batch_size=options.batch_size)
        if number == 0:
            print(f"wrote {options.output}: user_id, item_id, rank and score for {num_users:,} histories")
        return
    if rest.items and set(pipe.tokenizer.item_ids_to_token_ids(rest.items)) == {UNK_TOKEN_ID}:
        raise ValueError(
            f"the catalogue of {rest.model} has none of the items of the history ({_first(rest.items)}); expected ids "
            f"such as {_first(pipe.tokenizer.items)}, or no items for an empty history"
        )
    answer = pipe(rest.items)
    if pipe.tokenizer.titles is not None:
        for item in rest.items:
            print(f"{'had':>5}  {item:>8}  {'':8}  {_one_line(pipe.tokenizer.title(item) or '')}".rstrip())
    if not answer:
        print("no item is left to recommend: every item is excluded, seen or not a candidate")
    for rank, entry in enumerate(answer, start=1):
        print(
            f"{rank:>5}  {entry['item_id']:>8}  {entry['score']:8.3f}  {_one_line(entry.get('title') or '')}".rstrip()
        )


def export(arguments: Sequence[str]) -> None:
    """Export a model as an ONNX file for other runtimes."""
    parser = _Parser(ExportArguments, prog="bert4rec export", description=export.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .hub.load import load_model
    from .serving.onnx_export import export_onnx

    try:
        export_onnx(load_model(rest.model), options.output, top_k=options.top_k)
    except ImportError as error:
        parser.error(f"{error}: pip install 'bert4rec_hf[export]'")
    print(f"wrote {options.output}; its token ids are those of tokenizer.json in {rest.model}")


def convert(arguments: Sequence[str]) -> None:
    """Convert a checkpoint of RecBole or hopwise to a model folder, or back with --to recbole."""
    parser = _Parser(ConvertArguments, prog="bert4rec convert", description=convert.__doc__)
    parser.add_argument(
        "checkpoint", help="A checkpoint (.pth) of RecBole or hopwise; with --to recbole, a model folder or Hub id."
    )
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .convert.recbole import convert_from_recbole, convert_to_recbole

    if options.to == "recbole":
        convert_to_recbole(rest.checkpoint, options.output)
        print(f'wrote {options.output}; next: model.load_state_dict(torch.load("{options.output}")["state_dict"])')
        return
    if options.items is None:
        parser.error("the following arguments are required: --items, since a checkpoint has no raw item ids")
    model = convert_from_recbole(
        rest.checkpoint,
        options.items,
        options.output,
        drop_oldest_item=options.drop_oldest_item,
        titles=options.item_titles,
    )
    print(f"wrote {options.output}: {model.config.vocab_size - 3:,} items, {model.num_parameters():,} parameters")
    print(f"next: bert4rec recommend {options.output} ITEM_ID ITEM_ID …")


def convert_config(arguments: Sequence[str]) -> None:
    """Convert a YAML file of RecBole or hopwise to a recipe for train."""
    parser = _Parser(ConvertConfigArguments, prog="bert4rec convert-config", description=convert_config.__doc__)
    parser.add_argument("settings", help="The YAML file of RecBole or hopwise.")
    options, rest = parser.parse_args_into_dataclasses(arguments)
    if options.output is not None and Path(options.output).exists():
        parser.error(f"{options.output} exists; choose another --output")

    from .convert.recbole_settings import config_recipe
    from .files import write_file

    text = config_recipe(rest.settings)
    if options.output is None:
        print(text, end="")
        return
    write_file(Path(options.output), text)
    print(f"wrote {options.output}; its first lines say how to prepare the log; next:")
    print(f"bert4rec train --config {options.output} --data DATA --output_dir MODEL")


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "tune": tune,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "recommend": recommend,
    "export": export,
    "convert": convert,
    "convert-config": convert_config,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. A user error prints one line on standard error and gives exit status 2.

    Args:
        arguments: The words of the command line after `bert4rec`. None: those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # titles may have characters that the terminal cannot show
    parser = argparse.ArgumentParser(
        prog="bert4rec", formatter_class=argparse.RawDescriptionHelpFormatter, description=_overview()
    )
    parser.add_argument("--version", action="version", version=f"bert4rec {__version__}")
    if not arguments or arguments[0] not in COMMANDS:
        if arguments and arguments[0] not in ("-h", "--help", "--version"):
            nearest = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else "."
            print(
                f"bert4rec: unknown command {arguments[0]!r}{hint} Expected one of {', '.join(COMMANDS)}",
                file=sys.stderr,
            )
            return 2
        parser.parse_args(arguments or ["--help"])
    if arguments[0] != "train" and threading.current_thread() is threading.main_thread():
        # SIGTERM ends a command like Ctrl-C, without half-written files. The Trainer's workers handle it themselves.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Reading and writing weights is too short for a progress bar. Downloads keep theirs.
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    try:
        COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, TypeError, OverflowError, OSError, ImportError, SafetensorError, yaml.YAMLError) as error:
        logger.debug("traceback of the error", exc_info=True)
        print(f"bert4rec {arguments[0]}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bert4rec {arguments[0]}: interrupted", file=sys.stderr)
        return 130
    return 0


def format_evaluation(record: dict[str, Any]) -> str:
    """Format an evaluation as text: its protocol, and a table of the metrics of the model and the baselines.

    Args:
        record: A record of evaluation.json.
    """
    from .evaluation.metrics import shown_metrics
    from .evaluation.protocol import Protocol

    widths = {name: max(13, len(name) + 2) for name in shown_metrics(record["metrics"])}
    protocol = Protocol(**record["protocol"])
    tables = {"": {"model": record["metrics"]} | record["baselines"]} | record.get("groups", {})
    width = max(len(title) for table in tables.values() for title in table)
    lines = [str(protocol), " " * width + "".join(f"{name:>{wide}}" for name, wide in widths.items())]
    for heading, table in tables.items():
        lines += [heading] if heading else []
        for title, metrics in table.items():
            cells = [f"{metrics[name]:{wide}.4f}" if name in metrics else " " * wide for name, wide in widths.items()]
            lines.append(f"{title:<{width}}" + "".join(cells).rstrip())
    return "\n".join([*lines, protocol.describe_misses()])


def format_calibration(record: Mapping[str, Any]) -> str:
    """Format the result of a calibration as text: the weights, and what they gain.

    Args:
        record: The record of `choose_weights`.
    """

    def listed(weights: Mapping[str, float]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {weight:.3g}" for name, weight in weights.items())

    metrics, error = record["NDCG@10"], record["standard_error"]
    if error is None:
        return f"weights of counted scores kept, since there is only one validation user: {listed(record['weights'])}"
    gain = metrics["cross_fitted"] - metrics["start"]
    found = (
        f"cross-fitted NDCG@10 {metrics['cross_fitted']:.4f} instead of {metrics['start']:.4f} on "
        f"{record['num_users']:,} validation users ({gain:+.4f}, standard error {error:.4f})"
    )
    if record["adopted"]:
        return f"weights of counted scores chosen on validation: {listed(record['weights'])}; {found}"
    return f"weights of counted scores kept, since others are not clearly better: {listed(record['weights'])}; {found}"


def _overview() -> str:
    lines = [f"  {name:<15} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "BERT4Rec: from a raw interaction log to recommendations.\n\n" + "\n".join(lines)


def _first(items: Sequence[str]) -> str:
    return ", ".join(map(repr, items[:3])) + (", …" if len(items) > 3 else "")


def _one_line(text: BaseException | str) -> str:
    return " ".join(str(text).split())
