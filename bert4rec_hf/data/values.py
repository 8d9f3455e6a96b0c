"""What the values of a log mean, whichever source they come from: ids, times, numbers."""

from typing import Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from .duckdb_tables import SOURCE_ROW

INTEGER = r"^\s*[+-]?[0-9]+(\.0*)?\s*$"
DECIMAL = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)\s*$"
FLOAT = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+\s*$"
# What becomes a number without a loss: no leading zeros, no more digits than int64 has.
WHOLE = r"^(0|-?[1-9][0-9]{0,17})$"
NUMBER = r"^[+-]?((0|[1-9][0-9]{0,17})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
DATE = r"[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}"
CLOCK = r"[ Tt]\s*[0-9]{1,2}:[0-9]{2}"
DATE_AND_TIME = rf"^\s*({DATE}({CLOCK}(:[0-9]{{2}})?)?)"
FRACTION = r":[0-9]{2}[.,]([0-9]*)"
TIME_OF_DAY = CLOCK + r"(:[0-9]{2}([.,][0-9]{0,9})?)?"
ZONE = r"\s*([Zz]|UTC|GMT|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)"
LOCAL_TIME = rf"^\s*{DATE}({TIME_OF_DAY})?\s*$"
ZONED_TIME = rf"^\s*{DATE}{TIME_OF_DAY}{ZONE}\s*$"
SPELLINGS = (
    "numbers such as 1706702400 or 1706702400.25, or dates and times such as 2024-01-31, 2024-01-31 12:00:00.123 or "
    "2024-01-31T12:00:00+01:00 (Z, UTC and GMT are zones as well; all values have a zone, or none has)"
)
# Decimal digits of the integers that int64 has room for, and of a decimal.
INT64_DIGITS, DECIMAL_DIGITS = 18, 38
FLOAT64_DIGITS = 15  # that every float64 keeps
MICROSECOND_DIGITS, NANOSECOND_DIGITS = 6, 9
NANOSECOND_YEARS = 1678, 2261  # that an int64 of nanoseconds has room for


@ibis.udf.scalar.builtin
def make_timestamp_ns(nanoseconds: dt.int64) -> dt.Timestamp(scale=9):  # type: ignore[valid-type]
    """DuckDB's timestamp of nanoseconds since 1970."""


@ibis.udf.scalar.builtin
def make_timestamp(microseconds: dt.int64) -> dt.Timestamp(scale=6):  # type: ignore[valid-type]
    """DuckDB's timestamp of microseconds since 1970."""


@ibis.udf.scalar.builtin
def timestamp_micros(microseconds: dt.int64) -> dt.Timestamp(timezone="UTC", scale=6):  # type: ignore[valid-type]
    """Spark's timestamp of microseconds since 1970."""


def as_id(log: ir.Table, column: str, option: str) -> ir.Column:
    """Ids as text, exactly as they are spelled.

    Raises:
        ValueError: If the column holds neither text nor whole numbers.
    """
    kind = log[column].type()
    if kind.is_string() or kind.is_integer() or kind.is_uuid() or (kind.is_decimal() and kind.scale == 0):
        return log[column].cast("string")
    if kind.is_binary():  # on Spark; `Log.table` has read other binary columns as text
        return log[column].cast("string")
    raise ValueError(
        f"ids must be text or whole numbers; column {column!r} ({option}) is {kind}: convert it first, for example "
        "with CAST or astype"
    )


def as_time(log: ir.Table, column: str, option: str) -> ir.Column:
    """Times, at the full precision of the source, as a column whose order is that of time.

    Returns:
        Whole numbers, decimals, float64, or timestamps of microseconds or nanoseconds.

    Raises:
        ValueError: If the column holds something else. The message quotes the first value that is not understood.
    """
    values = log[column]
    kind = values.type()
    if "TIMESTAMPTZ_NS" in str(kind):  # a type of DuckDB that Ibis does not know
        return values.cast("timestamp(9)")
    if kind.is_date():
        return values.cast("timestamp")
    if kind.is_decimal():
        return _whole(log, values)
    if kind.is_string():
        return _read_times(log, column, option)
    if kind.is_timestamp() or (kind.is_numeric() and not kind.is_boolean()):
        return values
    raise ValueError(f"column {column!r} ({option}) orders the events; it is {kind}: expected {SPELLINGS}")


def as_number(log: ir.Table, column: str, option: str) -> ir.Column:
    """Numbers; those that are written as text are converted.

    Raises:
        ValueError: If the column holds something else. The message quotes the first value that is not a number.
    """
    values = log[column]
    kind = values.type()
    if kind.is_numeric() and not kind.is_boolean():
        return values
    if kind.is_string():
        numbers = values.strip().nullif("").try_cast("float64")
        _check(log, column, option, numbers.notnull() | (values.strip() == ""), "numbers")
        return numbers
    raise ValueError(f"column {column!r} ({option}) is {kind}; expected numbers")


def with_types(log: ir.Table, columns: list[str]) -> ir.Table:
    """Turn text columns whose values are all numbers into numbers, as for conditions and for columns to copy.

    Columns with leading zeros (007) or with more than 18 digits before the point stay text, which spells them exactly.
    """
    texts = [column for column in columns if log[column].type().is_string()]
    if not texts:
        return log
    found = {}
    for number, column in enumerate(texts):
        values = log[column].strip()
        found[f"whole_{number}"] = (values.re_search(WHOLE) | (values == "")).all()
        found[f"number_{number}"] = (values.re_search(NUMBER) | (values == "")).all()
        found[f"any_{number}"] = (values != "").any()
    row = log.aggregate(**found).to_pyarrow().to_pylist()[0]
    typed = {}
    for number, column in enumerate(texts):
        if row[f"any_{number}"] and row[f"number_{number}"]:
            kind = "int64" if row[f"whole_{number}"] else "float64"
            typed[column] = log[column].strip().nullif("").cast(kind)
    return log.mutate(**typed)


def select_where(table: ir.Table, columns: list[str], where: str) -> ir.Table:
    """Some columns of the rows that meet a condition, in the SQL of the table's own backend."""
    name = ibis.util.gen_name("bert4rec")
    chosen = ", ".join(f"`{column}`" for column in columns)
    if table.get_backend().name != "duckdb":
        return table.alias(name).sql(f"SELECT {chosen} FROM {name} WHERE {where}")
    # `Table.sql` fails with DuckDB 2.0, as of Ibis 12.0.
    chosen = chosen.replace("`", '"')
    query = f"SELECT {chosen} FROM ({ibis.to_sql(table, dialect='duckdb')}) AS log WHERE {where}"
    connection: Any = table.get_backend()
    connection.raw_sql(f'CREATE TEMP VIEW "{name}" AS {query}')
    return connection.table(name)


def _whole(log: ir.Table, values: Any) -> Any:
    """Decimals as int64 if they are whole and not too large; otherwise as they are."""
    fits = ((values == values.floor()) & (values.abs() < 10**INT64_DIGITS)).all()
    return values.cast("int64") if fits.name("fits").to_pyarrow().as_py() in (True, None) else values


def _read_times(log: ir.Table, column: str, option: str) -> Any:
    text = log[column]
    row = log.aggregate(
        given=(text.strip() != "").sum(), whole=text.re_search(INTEGER).sum(), longest=text.length().max()
    )
    row = row.to_pyarrow().to_pylist()[0]
    if not row["given"] or row["given"] == row["whole"]:
        whole = text.re_extract(r"([+-]?[0-9]+)", 1).nullif("")
        if (row["longest"] or 0) <= INT64_DIGITS:
            return whole.cast("int64")
        return _whole(log, _as_decimal(log, column, option, whole, 0))
    fraction = text.re_extract(FRACTION, 1)
    decimals = text.re_extract(r"\.([0-9]*)", 1).re_replace("0+$", "")
    significant = text.re_extract(r"^\s*[+-]?([0-9.]*)", 1).re_replace(r"^[0.]+|[.]", "")
    row = log.aggregate(
        given=(text.strip() != "").sum(),
        decimals=text.re_search(DECIMAL).sum(),
        floats=text.re_search(FLOAT).sum(),
        local=text.re_search(LOCAL_TIME).sum(),
        zoned=text.re_search(ZONED_TIME).sum(),
        digits=decimals.length().max(),
        long=text.re_extract(r"([0-9]+)", 1).length().max(),
        significant=significant.length().max(),
        largest=text.strip().try_cast("float64").abs().max(),
        fraction=fraction.re_replace("0+$", "").length().max(),
    )
    row = row.to_pyarrow().to_pylist()[0]
    counts = {name: row[name] or 0 for name in ("decimals", "floats", "local", "zoned")}
    if counts["decimals"] + counts["floats"] == row["given"]:
        numbers, scale = text.strip().nullif(""), row["digits"]
        if counts["floats"] or scale + row["long"] > DECIMAL_DIGITS:
            if row["significant"] <= FLOAT64_DIGITS:
                return numbers.cast("float64")
            scale = max(DECIMAL_DIGITS - len(f"{row['largest']:.0f}"), 0)
        return _as_decimal(log, column, option, numbers, scale)
    # The first value that is not like the majority is the one that is quoted.
    patterns = {"decimals": DECIMAL, "floats": FLOAT, "local": LOCAL_TIME, "zoned": ZONED_TIME}
    most = max(counts, key=lambda name: counts[name])
    base = text.re_extract(DATE_AND_TIME, 1).replace("/", "-").replace("t", "T").try_cast("timestamp")
    understood = text.re_search(patterns[most])
    if most in ("local", "zoned"):
        understood &= base.notnull()
    digits = MICROSECOND_DIGITS if row["fraction"] <= MICROSECOND_DIGITS else NANOSECOND_DIGITS
    expected = SPELLINGS
    if digits == NANOSECOND_DIGITS and most in ("local", "zoned"):
        first, last = NANOSECOND_YEARS
        understood &= base.year().between(first, last)
        expected += f"; with more than {MICROSECOND_DIGITS} decimal places, from the years {first} to {last}"
    _check(log, column, option, understood | (text.strip() == ""), expected)
    zone = text.re_extract(r":[0-9.,]+" + ZONE + r"\s*$", 1) if most == "zoned" else None
    unit = 10**digits
    ticks = base.epoch_seconds().cast("int64") * unit
    ticks += fraction.substr(0, digits).rpad(digits, "0").nullif("").fill_null("0").cast("int64")
    if zone is not None:
        hours = zone.re_extract(r"^[+-]([0-9]{2})", 1).nullif("").fill_null("0").cast("int64")
        minutes = zone.re_extract(r"^[+-][0-9]{2}:?([0-9]{2})", 1).nullif("").fill_null("0").cast("int64")
        sign = zone.startswith("-").ifelse(-1, 1)
        ticks -= sign * (hours * 3600 + minutes * 60) * unit
    on_duckdb = log.get_backend().name == "duckdb"
    if digits == MICROSECOND_DIGITS:
        return make_timestamp(ticks) if on_duckdb else timestamp_micros(ticks)
    if not on_duckdb:
        raise ValueError(
            f"column {column!r} ({option}) has times with {row['fraction']} decimal places; the timestamps of "
            f"{log.get_backend().name} have {MICROSECOND_DIGITS}: convert the column to nanoseconds, whole numbers"
        )
    return make_timestamp_ns(ticks)


def _as_decimal(log: ir.Table, column: str, option: str, numbers: Any, scale: int) -> Any:
    values = numbers.try_cast(f"decimal({DECIMAL_DIGITS}, {scale})")
    _check(log, column, option, values.notnull() | numbers.isnull(), f"numbers of at most {DECIMAL_DIGITS} digits")
    return values


def _check(log: ir.Table, column: str, option: str, understood: Any, expected: str) -> None:
    """Raise, quoting the first value that is not understood, if there is one."""
    wrong = log.filter(~understood.fill_null(True))
    if SOURCE_ROW in log.columns:
        wrong = wrong.order_by(SOURCE_ROW)
    names = [column, SOURCE_ROW] if SOURCE_ROW in log.columns else [column]
    found = wrong.select(*names).limit(1).to_pyarrow().to_pylist()
    if found:
        row = f" in row {found[0][SOURCE_ROW] + 1}" if SOURCE_ROW in found[0] else ""
        raise ValueError(f"column {column!r} ({option}) has {found[0][column]!r}{row}; expected {expected}")
