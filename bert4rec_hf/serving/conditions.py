"""Conditions on items, such as `category = 'shoes' AND price < 50`, as SQL that can do nothing but compare columns."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

# Longest condition, in characters.
MAX_LENGTH = 4000
# Deepest nesting of parentheses; and of operators and functions, where a chain of AND, or of OR, is one level.
MAX_PARENTHESES, MAX_DEPTH = 16, 32
# The functions of a condition, with an example of each number of arguments.
FUNCTIONS = {
    "abs": ["abs(a)"],
    "ceil": ["ceil(a)"],
    "coalesce": ["coalesce(a, b)"],
    "contains": ["contains(a, 'x')"],
    "day": ["day(a)"],
    "ends_with": ["ends_with(a, 'x')"],
    "floor": ["floor(a)"],
    "greatest": ["greatest(a, b)"],
    "least": ["least(a, b)"],
    "length": ["length(a)"],
    "list_contains": ["list_contains(a, 'x')"],
    "lower": ["lower(a)"],
    "month": ["month(a)"],
    "round": ["round(a)", "round(a, 1)"],
    "starts_with": ["starts_with(a, 'x')"],
    "trim": ["trim(a)"],
    "upper": ["upper(a)"],
    "year": ["year(a)"],
}
# Everything else that a condition may contain. A node of a tree is allowed if the tree of an example has a node of the
# same type with the same arguments.
OPERATORS = (
    "a = 1 AND (b <> 'x' OR NOT c)", "a < 1", "a <= 1", "a > 1", "a >= 1", "a BETWEEN 1 AND 2", "a IN (1, 2)",
    "'x' IN a", "a IS NULL", "a IS NOT NULL", "a IS TRUE", "a IS NOT FALSE", "a LIKE 'x%'", "a NOT LIKE 'x%'",
    "a ILIKE 'x%'", "a NOT ILIKE 'x%'", "a LIKE 'x' ESCAPE '!'", "-a + b - 1.5 * c / d % 2", "DATE '2024-01-31'",
    "TIMESTAMP '2024-01-31 12:00:00'", '"a" = 1',
)  # fmt: skip
TYPES = ("DATE", "TIMESTAMP")
WORDS_BEFORE_PARENTHESES = ("AND", "OR", "NOT", "IN", "LIKE", "ILIKE", "BETWEEN", "ESCAPE")
NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
EXPECTED = "expected columns, values, AND, OR, NOT, comparisons, arithmetic and functions"


def condition_sql(condition: str, columns: Sequence[str]) -> str:
    """Check a condition, and write it as SQL of DuckDB.

    The condition is parsed, and each node of its tree must be one of `OPERATORS` and `FUNCTIONS`. The SQL is written
    from the tree: names are quoted and literals are written anew, so no text of the user is copied.

    Args:
        condition: The condition.
        columns: The columns that it may name.

    Raises:
        ValueError: If the condition is too long or nested too deeply, cannot be parsed, or has anything that is not
            allowed. The message says where, and names the nearest column or function.
    """
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import ParseError

    if not isinstance(condition, str) or not condition.strip():
        raise ValueError(f"a condition must be a text such as \"category = 'shoes' AND price < 50\"; got {condition!r}")
    if len(condition) > MAX_LENGTH:
        raise ValueError(
            f"a condition may have {MAX_LENGTH:,} characters; got {len(condition):,}: shorten it, or add a column to "
            "the item table"
        )
    for place, character in enumerate(condition):
        if not character.isprintable() and character not in "\n\r\t":
            raise _error(condition, f"expected printable characters; got {character!r}", place)
    try:
        _check_tokens(condition, sqlglot.tokenize(condition, read="duckdb"))
        tree = sqlglot.parse_one(condition, read="duckdb", into=exp.Condition)
        _check_tree(condition, tree, columns)
        return tree.sql(dialect="duckdb", identify=True, comments=False)
    except ValueError:
        raise
    except ParseError as error:
        raise _parse_error(condition, error) from error
    except RecursionError as error:
        raise _error(condition, "it is nested too deeply; write it with fewer levels") from error
    except Exception as error:  # the parser has errors of many types for text that is no SQL
        raise _error(condition, f"{EXPECTED}; it cannot be read") from error


def _error(condition: str, problem: str, place: int | None = None) -> ValueError:
    shown = condition if len(condition) <= 100 else f"{condition[:100]}…"
    return ValueError(f"condition {shown!r}{'' if place is None else f', character {place + 1}'}: {problem}")


def _parse_error(condition: str, error: Any) -> ValueError:
    if not error.errors or not error.errors[0].get("highlight"):
        return _error(condition, f"{EXPECTED}; it is incomplete")
    found = error.errors[0]
    lines = condition.split("\n")[: found["line"] - 1]
    place = sum(len(line) + 1 for line in lines) + found["col"] - len(found["highlight"])
    return _error(condition, f"{EXPECTED}; it cannot be read at {found['highlight']!r}", place)


def _nearest(name: str, known: Sequence[str], kind: str) -> str:
    nearest = get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"the {kind} are {', '.join(known)}"


def _check_tokens(condition: str, tokens: Sequence[Any]) -> None:
    """Raise ValueError for comments, several conditions, deep parentheses and unknown functions."""
    depth = 0
    for place, token in enumerate(tokens):
        name = token.token_type.name
        is_followed = place + 1 < len(tokens) and tokens[place + 1].token_type.name == "L_PAREN"
        if token.comments or name == "HINT":
            raise _error(condition, "expected no comments, -- or /* */; leave them out", token.start)
        if name == "SEMICOLON":
            raise _error(condition, "expected one condition; got a semicolon: join conditions with AND", token.start)
        depth += (name == "L_PAREN") - (name == "R_PAREN")
        if depth > MAX_PARENTHESES:
            raise _error(condition, f"at most {MAX_PARENTHESES} parentheses may be open at once", token.start)
        is_word = name == "IDENTIFIER" or (name != "STRING" and re.fullmatch(r"\w+", token.text))
        is_operator = name != "IDENTIFIER" and token.text.upper() in WORDS_BEFORE_PARENTHESES
        if is_followed and is_word and not is_operator and token.text.lower() not in FUNCTIONS:
            hint = _nearest(token.text.lower(), list(FUNCTIONS), "functions")
            raise _error(condition, f"unknown function {token.text!r}; {hint}", token.start)


def _check_tree(condition: str, tree: Any, columns: Sequence[str]) -> None:
    """Raise ValueError for a node that no example has, an unknown column, and a tree that is too deep."""
    from sqlglot import ErrorLevel, exp

    allowed = _allowed()
    nodes = [(tree, 1)]
    while nodes:
        node, depth = nodes.pop()
        if depth > MAX_DEPTH:
            raise _error(condition, f"it is nested more than {MAX_DEPTH} levels deep; write it with fewer levels")
        place = next((part.meta["start"] for part in node.walk() if "start" in part.meta), None)
        if isinstance(node, exp.Identifier) and node.name not in columns:
            hint = _nearest(node.name, columns, "columns")
            raise _error(condition, f"unknown column {node.name!r}; {hint}", place)
        if (
            any((type(node), name) not in allowed for name in _arguments(node))
            or (isinstance(node, exp.Anonymous) and node.name.lower() not in FUNCTIONS)
            or (isinstance(node, exp.DataType) and node.sql("duckdb") not in TYPES)
            or (isinstance(node, exp.Literal) and not (node.is_string or NUMBER.fullmatch(node.this)))
        ):
            shown = node.sql(unsupported_level=ErrorLevel.IGNORE)
            raise _error(condition, f"{EXPECTED}; got {shown!r:.60}", place)
        is_chain = isinstance(node, exp.And | exp.Or)
        children = [
            (child, depth + (not (is_chain and type(child) is type(node)))) for child in node.iter_expressions()
        ]
        nodes += reversed(children)  # the next node is the leftmost


def _arguments(node: Any) -> list[str]:
    """The names of the arguments that a node of a tree has. A node without arguments has the empty name."""
    return [name for name, value in node.args.items() if value not in (None, False, [])] or [""]


@lru_cache(maxsize=1)
def _allowed() -> set[tuple[type, str]]:
    """The types of the nodes in the examples, with the names of their arguments."""
    import sqlglot

    examples = [*OPERATORS, *(text for texts in FUNCTIONS.values() for text in texts)]
    trees = [sqlglot.parse_one(text, read="duckdb") for text in examples]
    return {(type(node), name) for tree in trees for node in tree.walk() for name in _arguments(node)}
