"""The command `bert4rec`. It parses arguments and calls the functions of the package."""

import argparse
import contextlib
import difflib
import io
import json
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
import yaml
from accelerate import PartialState
from safetensors import SafetensorError

from .command_line.options import (
    CalibrateArguments,
    CompareArguments,
    ConvertArguments,
    ConvertConfigArguments,
    DemoArguments,
    EvaluateArguments,
    ExportArguments,
    ExportVectorsArguments,
    PrepareArguments,
    RecommendArguments,
    RuleArguments,
    ServeArguments,
    SimilarArguments,
    TrainArguments,
    TuneArguments,
    UpdateItemsArguments,
    architecture_arguments,
)
from .command_line.output import (
    format_calibration,
    format_differences,
    format_evaluation,
    print_entries,
    print_features,
    print_item,
    print_preparation,
    show,
)
from .command_line.parser import Parser, is_out_of_memory, one_line, true_or_false
from .data.prepare_options import PrepareOptions
from .model.configuration_bert4rec import UNK_TOKEN_ID
from .model.pipeline_inputs import events_of
from .reading import inert
from .version import __version__

logger = logging.getLogger(__name__)


def prepare(arguments: Sequence[str]) -> None:
    """Turn a raw log into a prepared folder."""
    parser = Parser((PrepareArguments, PrepareOptions), prog="bert4rec prepare", description=prepare.__doc__)
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
    show(f"wrote {where.output}; next: bert4rec train --data {shlex.quote(where.output)} --output_dir MODEL")


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
    print_preparation(prepared, options)
    if options.item_features:
        print_features(output)


def train(arguments: Sequence[str]) -> None:
    """Train a model on a prepared folder or a log. Every checkpoint is a model folder."""
    from .hub.model_card import describe_new_items
    from .runs.train import train_prepared
    from .training.arguments import Bert4RecTrainingArguments
    from .training.resume import check_output

    parser = Parser(
        (TrainArguments, Bert4RecTrainingArguments, architecture_arguments()),
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
                show(f"wrote {data}")
    trainer = train_prepared(
        data,
        training_arguments,
        options.model_name_or_path,
        publish_code=options.publish_code,
        **{name: value for name, value in vars(architecture).items() if value is not None},
    )
    if trainer.is_world_process_zero():
        if trainer.calibration is not None and training_arguments.calibrate:
            show(format_calibration(trainer.calibration))
        if trainer.new_items is not None:
            show(describe_new_items(trainer.new_items))
        folder, data = shlex.quote(output_dir), shlex.quote(data)
        held_out = trainer.preparation is None or trainer.preparation["split"]["name"] != "none"
        following = f"evaluate {folder} --data {data}" if held_out else f"recommend {folder} ITEM_ID ITEM_ID …"
        show(f"wrote {output_dir}; next: bert4rec {following}")


def tune(arguments: Sequence[str]) -> None:
    """Search width, dropout, mask ratio and epochs on the validation targets, and write the best as a recipe."""
    parser = Parser(TuneArguments, prog="bert4rec tune", description=tune.__doc__)
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, _ = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .runs.tune import tune_prepared

    try:
        found = tune_prepared(**vars(options))
    except ImportError as error:
        parser.error(f"{error}: pip install 'bert4rec_hf[tune]'")
    folder, data = shlex.quote(options.output_dir), shlex.quote(options.data)
    best = ", ".join(f"{name} {value:g}" for name, value in found["best"].items())
    show(f"best of {len(found['trials'])} trials: {best}")
    show(f"wrote {options.output_dir}: recipe.yaml, trials.json and tuning.png")
    show(f"next: bert4rec train --config {folder}/recipe.yaml --data {data} --output_dir MODEL")


def evaluate(arguments: Sequence[str]) -> None:
    """Rank held-out targets with a model and with baselines, and write the metrics into the model folder."""
    parser = Parser((EvaluateArguments, RuleArguments), prog="bert4rec evaluate", description=evaluate.__doc__)
    parser.add_argument("models", nargs="+", metavar="model", help="A model folder or Hub id, or several.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, of_rules, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))
    if options.report is not None and len(rest.models) > 1:
        parser.error(f"--report is for one model; got {len(rest.models)}: bert4rec compare reports on two")

    from .hub.model_card import read_evaluations
    from .runs.evaluate import evaluate_prepared
    from .serving.rules import read_rules

    records = {
        model: evaluate_prepared(model, **vars(options), rules=read_rules(model, **vars(of_rules)))
        for model in rest.models
    }
    if not PartialState().is_main_process:
        return
    of_sets = {model: record.pop("all_targets") for model, record in records.items() if "all_targets" in record}
    for found in filter(None, (records, of_sets)):
        if len({json.dumps(record["protocol"]) for record in found.values()}) == 1 < len(found):
            show(format_evaluation(next(iter(found.values())), found))
            continue
        for model, record in found.items():
            show(format_evaluation(record) if len(found) == 1 else f"{model}\n{format_evaluation(record)}")
    stored = [model for model in records if Path(model).is_dir()]
    stored = [model for model in stored if records[model] in read_evaluations(model)]
    if options.report is not None:
        show(f"wrote {Path(options.report) / 'report.md'} and, beside it, report.json, report.png and ranks.parquet")
    if len(records) > 1:
        if stored:
            show(f"wrote evaluation.json and the model card of {', '.join(stored)}")
        old, new = (shlex.quote(model) for model in rest.models[:2])
        show(f"next: bert4rec compare {old} {new} --data {shlex.quote(options.data)}")
        return
    place = f"wrote {Path(stored[0]) / 'evaluation.json'} and the model card; " if stored else ""
    show(f"{place}next: bert4rec recommend {shlex.quote(rest.models[0])} ITEM_ID ITEM_ID …")


def compare(arguments: Sequence[str]) -> int:
    """Compare two models user by user, and tell whether the new one may replace the old one."""
    parser = Parser(CompareArguments, prog="bert4rec compare", description=compare.__doc__)
    parser.add_argument("old", help="A model folder or Hub id.")
    parser.add_argument("new", help="The model that may replace it.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .evaluation.compare import meets
    from .runs.compare import compare_prepared

    given = vars(options)
    requirement = given.pop("require")
    record = compare_prepared(rest.old, rest.new, **given)
    is_met = requirement is None or meets(record, requirement)
    if PartialState().is_main_process:
        show(format_differences(record))
        if options.report is not None:
            show(f"wrote {Path(options.report) / 'comparison.md'} and, beside it, comparison.json and comparison.png")
        if requirement is not None:
            show(f"required: {requirement.replace('-', ' ')}; {'met' if is_met else 'not met, exit status 1'}")
    return 0 if is_met else 1


def calibrate(arguments: Sequence[str]) -> None:
    """Choose the weights of a model's counted scores on the validation targets, and store them in its folder."""
    parser = Parser(CalibrateArguments, prog="bert4rec calibrate", description=calibrate.__doc__)
    parser.add_argument("model", help="A model folder, which is changed if this pays.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .runs.calibrate import calibrate_prepared

    record = calibrate_prepared(rest.model, **vars(options))
    show(format_calibration(record))
    following = f"bert4rec evaluate {shlex.quote(rest.model)} --data {shlex.quote(options.data)}"
    show(f"{f'wrote {rest.model}' if record['adopted'] else f'{rest.model} stays as it was'}; next: {following}")


def update_items(arguments: Sequence[str]) -> None:
    """Add, change and withdraw items in a model folder, without training."""
    parser = Parser(UpdateItemsArguments, prog="bert4rec update-items", description=update_items.__doc__)
    parser.add_argument("model", help="A model folder.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .runs.update_items import update_items as update

    given = {name: value for name, value in vars(options).items() if value is not None}
    if not given.keys() & {"items", "data", "new_item_offset"}:
        parser.error("nothing to do: give --items, --data or --new_item_offset")
    record = update(rest.model, given.pop("items", None), **given)
    show(
        f"{record['num_new']:,} items added, {record['num_changed']:,} changed; {record['num_withdrawn']:,} are "
        f"withdrawn; offset of new items {record['offset']:g}"
    )
    output = options.output or rest.model
    show(f"wrote {output}; next: bert4rec recommend {shlex.quote(output)} ITEM_ID ITEM_ID …")


def recommend(arguments: Sequence[str]) -> None:
    """Recommend the next items for one history of item ids, or for files of histories."""
    parser = Parser((RecommendArguments, RuleArguments), prog="bert4rec recommend", description=recommend.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument(
        "item_ids",
        nargs="*",
        help="Item ids of one history, oldest first; for a model of event types, also JSON such as "
        '\'{"item_id": "50", "event_type": "view"}\'.',
    )
    for flag in ("--explain", "--filter_seen_items"):
        parser._option_string_actions[flag].type = true_or_false
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, of_rules, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))
    if (options.histories is None) != (options.output is None):
        parser.error("--histories and --output belong together")
    if options.histories is not None and rest.item_ids:
        parser.error("give item ids or --histories, not both")
    if options.batch_size < 1:
        parser.error(f"--batch_size must be at least 1; got {options.batch_size}")
    words = [word.split("=")[0].replace("-", "_") for word in arguments[: [*arguments, "--"].index("--")]]
    if options.histories is None and "__batch_size" in words:
        parser.error("--batch_size is for --histories; leave it out for one history")
    if options.explain and options.histories is not None:
        parser.error("--explain is for one history; leave it out with --histories")

    from .hub.load import load_model
    from .serving.bulk import launched_process, recommend_file
    from .serving.history_files import read_item_ids
    from .serving.rules import read_rules

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
            parser.error(f"cannot use the device {device!r}: {one_line(error)}")
    elif num_processes > 1:
        device = local_number % max(torch.accelerator.device_count(), 1)  # the processes share the devices
    rules = read_rules(rest.model, **vars(of_rules))
    pipe = transformers.pipeline(
        "sequential-recommendation",
        model=model,
        tokenizer=rest.model,
        device=device,
        top_k=options.top_k,
        filter_seen_items=options.filter_seen_items,
        rules=rules,
        event_type=options.event_type,
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
            show(f"wrote {options.output}: user_id, item_id, rank and score for {num_users:,} histories")
        return
    history = _history(rest.item_ids) if pipe.tokenizer.event_types is not None else list(rest.item_ids)
    rest.item_ids, _ = events_of(history)
    if rest.item_ids and set(pipe.tokenizer.item_ids_to_token_ids(rest.item_ids)) == {UNK_TOKEN_ID}:
        raise ValueError(
            f"the catalogue of {rest.model} has none of the items of the history ({_first(rest.item_ids)}); expected "
            f"ids such as {_first(pipe.tokenizer.items)}, or no items for an empty history"
        )
    answer = pipe(history, explain=options.explain)
    if pipe.tokenizer.titles is not None:
        for item in rest.item_ids:
            print_item("had", item, pipe.tokenizer.title(item))
    if not answer:
        show(
            "no item is left to recommend: every item is excluded, seen, not a candidate or does not meet --where"
            if rules is not None and rules.where is not None
            else "no item is left to recommend: every item is excluded, seen or not a candidate"
        )
    print_entries(answer)


def _history(words: Sequence[str]) -> list[Any]:
    """The items of a history on the command line: item ids, or events as JSON objects."""
    history: list[Any] = []
    for word in words:
        event = None
        if word.startswith("{"):
            with contextlib.suppress(ValueError):
                event = json.loads(word)
        history.append(event if isinstance(event, dict) else word)
    return history


def similar(arguments: Sequence[str]) -> None:
    """Find the items that are most similar to some items."""
    parser = Parser(SimilarArguments, prog="bert4rec similar", description=similar.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument("item_ids", nargs="*", help="Item ids. Each gets a list of its own.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))
    if not rest.item_ids:
        parser.error("expected at least one item id; got none")

    from .hub.load import load_model

    pipe = transformers.pipeline("sequential-recommendation", model=load_model(rest.model), tokenizer=rest.model)
    for item, answer in zip(rest.item_ids, pipe.similar(rest.item_ids, top_k=options.top_k), strict=True):
        print_item("like", item, pipe.tokenizer.title(item))
        print_entries(answer)


def serve(arguments: Sequence[str]) -> None:
    """Serve recommendations over HTTP, by history or by user id."""
    parser = Parser(ServeArguments, prog="bert4rec serve", description=serve.__doc__)
    parser.add_argument("model", help="A model folder, a symbolic link to one, or a Hub id.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    try:
        from .serving.server import Server, ServerSettings
        from .serving.server import serve as serve_until_stopped
    except ImportError as error:
        parser.error(f"{error}: pip install 'bert4rec_hf[server]'")

    if options.device is not None:
        try:
            torch.empty(0, device=options.device)
        except (AssertionError, RuntimeError) as error:
            parser.error(f"cannot use the device {options.device!r}: {one_line(error)}")

    def announce(url: str, server: Server) -> None:
        versions = ", ".join(served.version for served in server.models.values())
        print(f"serving {versions} at {url}; events in {server.store.name}; API at {url}/docs", flush=True)

    # The server stops by itself on SIGTERM and Ctrl-C when all answers are sent, and then raises the signal again.
    with contextlib.suppress(KeyboardInterrupt):
        serve_until_stopped(ServerSettings(rest.model, **vars(options)), announce)


def demo(arguments: Sequence[str]) -> None:
    """Show a page to try a model: search titles, put a history together, see recommendations with reasons."""
    parser = Parser(DemoArguments, prog="bert4rec demo", description=demo.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .serving.demo import build, write_space

    try:
        if options.space is not None:
            write_space(rest.model, options.space, options.items)
            show(f"wrote {options.space}; next: hf upload YOU/NAME {shlex.quote(options.space)} --repo-type space")
            return
        page = build(rest.model, options.items)
    except ImportError as error:
        parser.error(f"{error}: pip install 'bert4rec_hf[demo]'")
    page.launch(server_name=options.host, server_port=options.port)


def export(arguments: Sequence[str]) -> None:
    """Export a model as an ONNX file for other runtimes."""
    parser = Parser(ExportArguments, prog="bert4rec export", description=export.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .hub.load import load_model
    from .serving.onnx_export import export_onnx

    try:
        export_onnx(load_model(rest.model), options.output, top_k=options.top_k)
    except ImportError as error:
        parser.error(f"{error}: pip install 'bert4rec_hf[export]'")
    show(f"wrote {options.output}; its token ids are those of tokenizer.json in {rest.model}")


def export_vectors(arguments: Sequence[str]) -> None:
    """Write item and user vectors and the successors of items as Parquet, for a vector database."""
    parser = Parser(ExportVectorsArguments, prog="bert4rec export-vectors", description=export_vectors.__doc__)
    parser.add_argument("model", help="A model folder or Hub id.")
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))
    if options.batch_size < 1:
        parser.error(f"--batch_size must be at least 1; got {options.batch_size}")

    from .serving.vectors import export_vectors as write_vectors

    numbers = write_vectors(rest.model, **vars(options))
    show(f"wrote {options.output}: {', '.join(f'{name} ({number:,} rows)' for name, number in numbers.items())}")


def convert(arguments: Sequence[str]) -> None:
    """Convert a checkpoint of RecBole or hopwise to a model folder, or back with --to recbole."""
    parser = Parser(ConvertArguments, prog="bert4rec convert", description=convert.__doc__)
    parser.add_argument(
        "checkpoint", help="A checkpoint (.pth) of RecBole or hopwise; with --to recbole, a model folder or Hub id."
    )
    parser.add_argument("--config", help="Recipe (YAML) with values of options, which the command line overrides.")
    options, rest = parser.parse_args_into_dataclasses(parser.with_recipe(arguments))

    from .convert.recbole import convert_from_recbole, convert_to_recbole

    if options.to == "recbole":
        convert_to_recbole(rest.checkpoint, options.output)
        show(f'wrote {options.output}; next: model.load_state_dict(torch.load("{options.output}")["state_dict"])')
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
    show(f"wrote {options.output}: {model.config.vocab_size - 3:,} items, {model.num_parameters():,} parameters")
    show(f"next: bert4rec recommend {options.output} ITEM_ID ITEM_ID …")


def convert_config(arguments: Sequence[str]) -> None:
    """Convert a YAML file of RecBole or hopwise to a recipe for train."""
    parser = Parser(ConvertConfigArguments, prog="bert4rec convert-config", description=convert_config.__doc__)
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
    show(f"wrote {options.output}; its first lines say how to prepare the log; next:")
    show(f"bert4rec train --config {options.output} --data DATA --output_dir MODEL")


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "tune": tune,
    "evaluate": evaluate,
    "compare": compare,
    "calibrate": calibrate,
    "update-items": update_items,
    "recommend": recommend,
    "similar": similar,
    "serve": serve,
    "demo": demo,
    "export": export,
    "export-vectors": export_vectors,
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
    if threading.current_thread() is threading.main_thread():
        if arguments[0] != "train":  # the Trainer's workers handle SIGTERM themselves
            signal.signal(signal.SIGTERM, _interrupt)  # ends a command like Ctrl-C, without half-written files
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    if logging.lastResort is not None:  # it shows the warnings, which may quote data
        logging.lastResort.setFormatter(_InertFormatter())
    # Reading and writing weights is too short for a progress bar. Downloads keep theirs.
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    try:
        status = COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, TypeError, OverflowError, OSError, ImportError, SafetensorError, yaml.YAMLError) as error:
        logger.debug("traceback of the error", exc_info=True)
        print(f"bert4rec {arguments[0]}: {one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        problem = _known_problem(error)
        if problem is None:
            raise
        logger.debug("traceback of the error", exc_info=True)
        print(f"bert4rec {arguments[0]}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bert4rec {arguments[0]}: interrupted", file=sys.stderr)
        return 130
    return status or 0


class _Interrupted(KeyboardInterrupt):
    """A signal that ends the command.

    It is no plain KeyboardInterrupt: where one has passed through exec, as it can while a dataclass is defined,
    `python -m` later ends by SIGINT, though it was caught. The exit status of the command would be lost.
    """


def _interrupt(number: int, frame: Any) -> None:
    raise _Interrupted


def _known_problem(error: Exception) -> str | None:
    if is_out_of_memory(error):
        return f"not enough memory: {one_line(error) or 'Python could not allocate any'}"
    from .training.resume import is_of_lost_process  # only now, since an import needs memory

    if isinstance(error, RuntimeError) and is_of_lost_process(error):
        return "another process has ended early or cannot be reached: run the command again"
    return None


class _InertFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(inert, super().format(record).split("\n")))


def _overview() -> str:
    lines = [f"  {name:<15} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "BERT4Rec: from a raw interaction log to recommendations.\n\n" + "\n".join(lines)


def _first(items: Sequence[str]) -> str:
    return ", ".join(map(repr, items[:3])) + (", …" if len(items) > 3 else "")
