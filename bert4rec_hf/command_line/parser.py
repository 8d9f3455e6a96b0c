"""The argument parser of all commands: options from dataclasses, recipes, and errors in one line."""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from copy import copy
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..reading import inert, read_yaml


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option, and defaults only for options that have one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """A parser with errors in one line, and with recipes: YAML files whose options the command line overrides."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        for action in self._actions:  # the negation of a flag would repeat the help of the flag
            if action.option_strings[0].startswith("--no_"):
                action.help = f"The same as --{action.option_strings[0].removeprefix('--no_')} false."

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {one_line(message)}", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        options = unknown[: unknown.index("--")] if "--" in unknown else unknown
        for argument in options:
            if argument.startswith("-") and not self._negative_number_matcher.match(argument):
                self.error(f"unknown option {argument.split('=')[0]}{self._nearest(argument, '--')}")
        if isinstance(getattr(parsed, "item_ids", None), list):
            # In Python 3.11, argparse does not assign item ids that follow an option.
            parsed.item_ids += unknown[: len(options)] + unknown[len(options) + 1 :]
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
            recipe = read_yaml(found.config)
            as_written = read_yaml(found.config, yaml.BaseLoader)  # YAML reads the item id 010 as the number 8
        except OSError as error:
            self.error(f"cannot read the recipe {found.config}: {one_line(error)}")
        except ValueError as error:
            self.error(f"the recipe {one_line(error)}")
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


def true_or_false(value: str) -> bool:
    """The value of a flag beside item ids. HfArgumentParser would take an item 1 after a flag for its value."""
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(
            f"expected true, false or nothing; got {value!r}: write item ids before this option"
        )
    return value.lower() == "true"


def one_line(text: BaseException | str) -> str:
    """A text without line breaks, and inert in a terminal; see `inert`."""
    return inert(" ".join(str(text).split()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, or room for a further thread, is lacking. PyTorch says so by RuntimeError."""
    texts = ("allocate memory", "out of memory", "bad_alloc", "start new thread", "bad allocation")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)
