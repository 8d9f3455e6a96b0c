"""Hypothesis strategies: hostile values, JSON with hostile values in it, and valid bytes with faults in them."""

import json
from typing import Any

from hypothesis import strategies as st

# Text that is markup, SQL, a path, a control character or no character at all for some reader.
TEXTS = st.sampled_from(
    [
        "",
        " ",
        "a",
        "50",
        "[MASK]",
        "\\[MASK]",
        "NULL",
        "nan",
        "1e999",
        "-0",
        "007",
        "\x00",
        "\x1b[2J",
        "\u202eabc",
        "\r",
        "a\nb",
        "a\tb",
        '"',
        "'",
        "`",
        "|",
        "$x$",
        "$x",
        "<script>alert(1)</script>",
        "![x](http://x)",
        "../../etc/passwd",
        "/etc/passwd",
        "~",
        "http://localhost:1/x",
        "file:///etc/passwd",
        "\ud800",
        "\ufeff",
        "é",
        "x" * 5000,
        "{",
        "[",
        "price < 5",
        "1; DROP TABLE items",
        "--",
        "${HOME}",
        "%s%n",
        "owner/name",
        "2024-02-30",
        "99999-01-01",
    ]
) | st.text(max_size=12)
NUMBERS = (
    st.sampled_from(
        [
            0,
            -1,
            1,
            2,
            3,
            2**31 - 1,
            2**31,
            -(2**31),
            2**40,
            2**63 - 1,
            2**63,
            -(2**63),
            2**64,
            10**30,
            10**400,
            0.0,
            -0.0,
            0.5,
            1e308,
            -1e308,
            5e-324,
            float("nan"),
            float("inf"),
            -float("inf"),
        ]
    )
    | st.integers()
    | st.floats()
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=6
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value inside a JSON value. Of a long list, only the first elements."""
    found = [place]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _places(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:3]):
            found += _places(inner, (*place, number))
    return found


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


@st.composite
def odd_values(draw: Any, seed: Any) -> Any:
    """A JSON value in which one to three values are replaced, removed, renamed or repeated."""
    value = _copy(seed)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = _places(value)
        place = places[draw(st.integers(0, len(places) - 1))]
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        match draw(st.integers(0, 4)):
            case 0 if isinstance(holder, dict):
                del holder[place[-1]]
            case 1 if isinstance(holder, dict):
                holder[draw(TEXTS)] = holder.pop(place[-1])
            case 2 if isinstance(holder, list):
                holder += holder[: draw(st.integers(0, 3))]
            case _:
                holder[place[-1]] = draw(VALUES)
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def odd_bytes(draw: Any, seeds: list[bytes]) -> bytes:
    """Valid bytes with one to six faults, mostly one."""
    # Numbers that Hypothesis draws are often small. These are not, so that any place is as likely as the first byte.
    chance = draw(st.randoms(use_true_random=True))
    content = chance.choice(seeds)
    for _ in range(chance.choice([1, 1, 1, 2, 2, 3, 6])):
        start = chance.randint(0, len(content))
        length = chance.choice([0, 1, 1, 2, 4, 8, 30, 200])
        match chance.randint(0, 8):
            case 0:
                content = content[:start]
            case 1:
                content = content[:start] + content[start + length :]
            case 2:
                content = content[:start] + content[max(0, start - length) :]
            case 3:
                content = content[:start] + chance.randbytes(chance.randint(0, 9)) + content[start:]
            case 4:
                content = content[:start] + draw(TEXTS).encode("utf-8", "surrogatepass") + content[start + length :]
            case 5:
                number = chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
                size = chance.choice([1, 2, 4, 8])
                packed = (number % 256**size).to_bytes(size, "little")
                content = content[:start] + packed + content[start + size :]
            case 6:
                other = chance.choice(seeds)
                content = content[:start] + other[chance.randint(0, len(other)) :]
            case 7:
                content = content[:start] + content[start : start + length] * chance.randint(2, 40) + content[start:]
            case _ if start < len(content):
                content = content[:start] + bytes([content[start] ^ 1 << chance.randint(0, 7)]) + content[start + 1 :]
            case _:
                pass
    return content


def odd_json(seed: Any) -> st.SearchStrategy[bytes]:
    """JSON with hostile values, and now and then JSON with faults in its bytes, or nested too deeply."""
    valid = as_json(seed)
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, valid[:-1] + b',"x":' + b"[" * 100_000])
    structured = odd_values(seed).map(as_json)
    return st.one_of(*[structured] * 7, *[odd_bytes([valid])] * 2, deep)
