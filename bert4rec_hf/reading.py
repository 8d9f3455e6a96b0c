"""Reading JSON and YAML that may be damaged or hostile, and text that is shown as it is."""

import json
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# Number of values that a YAML file may have, each counted as often as it is referred to. Aliases of aliases would make
# a short file endless.
MAX_YAML_VALUES = 100_000
JOINERS = "\u200c\u200d"


def read_json(path: str | os.PathLike, form: Any = object, *, hint: str = "copy or write it again") -> Any:
    """Read a JSON file, and check that it has the values that its readers use.

    Args:
        path: The file.
        form: What it holds: a type; a union of types; a list of one form, that of all elements; or a mapping of keys to
            forms, where a key that ends with "?" may be missing or null, and "*" stands for all other keys. A `float`
            may be an integer, and no number may be a boolean.
        hint: What to do about a file that is damaged.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no JSON, is nested too deeply, or has another form.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        _check_form(content, form, "")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {hint}") from error
    return content


def read_yaml(path: str | os.PathLike, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """Read a YAML file of keys and values. An empty file has none.

    Args:
        path: The file.
        loader: A safe loader of PyYAML.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no YAML, is nested too deeply, has too many values, or is no mapping of texts to values.
    """
    try:
        # This loader is safe, as are all that are derived from it or from BaseLoader.
        content = yaml.load(Path(path).read_text("utf-8"), Loader=loader)
        _check_size(content)
    except (ValueError, OverflowError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must be a mapping of names to values; got {content!r:.100}")
    return content


def inert(text: str) -> str:
    """A text whose control characters are spelled out, so that it does nothing but be read.

    These are the escape sequences of a terminal, line ends of any kind, and marks that change the direction of what
    follows. The joiners of emoji and of Persian and Indic scripts stay.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
        else character
        for character in text
    )


def _check_form(value: Any, form: Any, place: str) -> None:
    where = place or "the content"
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object; got {value!r:.80}")
        known = [key.removesuffix("?") for key in form]
        for key, part in form.items():
            name = key.removesuffix("?")
            if key == "*":
                for other in value.keys() - set(known):
                    _check_form(value[other], part, f"{place}/{other}")
            elif name not in value and not key.endswith("?"):
                raise ValueError(f"{where} lacks {name!r}")
            elif value.get(name) is not None or not key.endswith("?"):
                _check_form(value[name], part, f"{place}/{name}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list; got {value!r:.80}")
        for number, element in enumerate(value):
            _check_form(element, form[0], f"{place}/{number}")
    else:
        kinds = form | int if form is float else form
        is_bool = isinstance(value, bool)
        is_odd = is_bool != (form is bool) or (isinstance(value, int) and abs(value) >= 2**63)
        if form is not object and (not isinstance(value, kinds) or is_odd):
            raise ValueError(f"{where} must be of type {getattr(form, '__name__', form)}; got {value!r:.80}")


def _check_size(content: Any) -> None:
    """Raise ValueError if a value has too many values in it, or has itself."""
    left, number = [content], 0
    while left:
        value = left.pop()
        number += 1
        if number > MAX_YAML_VALUES:
            raise ValueError(f"it has more than {MAX_YAML_VALUES:,} values, also through aliases")
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
