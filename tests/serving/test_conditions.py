"""Conditions on items: known answers of each operator, and refusals of everything else."""

import datetime
import re
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert4rec_hf.serving import conditions, item_table
from bert4rec_hf.serving.conditions import condition_sql
from bert4rec_hf.serving.item_table import ItemTable

DAY = datetime.datetime
ROWS = {
    "item_id": ["a", "b", "c", "d"],
    "price": [1.0, 2.5, None, 40.0],
    "weight": pa.array([0.1, 0.2, None, -3.0], pa.float32()),
    "stock": [3, 0, None, -7],
    "category": ["shoes", "Hats", None, "it's 50%"],
    "on_sale": [True, False, None, True],
    "genres": [["x", "y"], [], None, ["y", None]],
    "added": pa.array([DAY(2020, 1, 31), DAY(2021, 5, 5, 12), None, DAY(2021, 5, 6)], pa.timestamp("us")),
    "date": [datetime.date(2020, 1, 31), None, None, datetime.date(2021, 5, 6)],
    "odd name": [1, 2, 3, 4],
}
ANSWERS = {
    "category = 'shoes' AND price < 50": "a",
    "category = 'it''s 50%'": "d",
    "price = 2.5": "b", "price <> 2.5": "ad", "price != 2.5": "ad", "price == 2.5": "b",
    "price < 2.5": "a", "price <= 2.5": "ab", "price > 2.5": "d", "price >= 2.5": "bd",
    "weight = 0.1": "a", "price > 1e1": "d", "price > .5": "abd",
    "NOT price < 2.5": "bd", "price < 2 OR stock = 0": "ab", "(price < 2 OR stock = 0) AND on_sale": "a",
    "stock IN (3, -7)": "ad", "stock NOT IN (3, -7)": "b", "category IN ('shoes')": "a",
    "category IN ()": "", "'y' IN genres": "ad", "'y' NOT IN genres": "b", "'zz' IN genres": "",
    "price BETWEEN 1 AND 2.5": "ab", "price NOT BETWEEN 1 AND 2.5": "d",
    "category LIKE '%a%'": "b", "category LIKE 'S%'": "", "category ILIKE 'S%'": "a", "category NOT LIKE 'sh%'": "bd",
    "category NOT ILIKE 'h_ts'": "ad", "category LIKE '%!%' ESCAPE '!'": "d", "category LIKE '%!%%' ESCAPE '!'": "d",
    "price IS NULL": "c", "price IS NOT NULL": "abd", "on_sale IS TRUE": "ad", "on_sale IS NOT TRUE": "bc",
    "on_sale IS FALSE": "b", "on_sale IS NOT FALSE": "acd", "genres IS NULL": "c",
    "price + stock = 4": "a", "price - stock = -2": "a", "price * 2 = 5": "b", "price / 2 = 20": "d",
    "stock % 2 = 1": "a", "-stock = 7": "d", "+stock = 3": "a", "price - stock * 2 = -5": "a",
    "price > stock": "bd",
    "abs(stock) = 7": "d", "ceil(price) = 3": "b", "floor(price) = 2": "b", "round(price) = 1": "a",
    "round(price / 3, 1) = 0.3": "a", "coalesce(price, 0) = 0": "c", "coalesce(price, stock, 9) = 9": "c",
    "greatest(price, stock) = 3": "a", "least(price, stock) = -7": "d",
    "lower(category) = 'hats'": "b", "upper(category) = 'HATS'": "b", "trim(' x ') = 'x'": "abcd",
    "length(category) = 4": "b", "length(genres) = 0": "b", "length(genres) = 2": "ad",
    "contains(category, '50%')": "d", "contains(genres, 'x')": "a", "list_contains(genres, 'x')": "a",
    "starts_with(category, 'sh')": "a", "ends_with(category, 's')": "ab",
    "year(added) = 2021": "bd", "month(added) = 5": "bd", "day(date) = 31": "a",
    "added >= '2021-05-06'": "d", "added > TIMESTAMP '2021-05-05 11:59:59'": "bd", "date < DATE '2021-01-01'": "a",
    "date = '2021-05-06'": "d", "added BETWEEN '2020-01-01' AND '2020-12-31'": "a",
    "on_sale": "ad", "NOT on_sale": "b", "on_sale = false": "b", "TRUE": "abcd", "1 = 1": "abcd", "1 = 2": "",
    "item_id = 'c'": "c", '"odd name" = 2': "b", "'--' = category": "", "category = ';'": "",
    # A comparison with null is neither true nor false, and counts as false.
    "price = NULL": "", "NOT (price = NULL)": "", "on_sale AND price < 50": "ad", "price < 50 OR NULL": "abd",
    "price\n  < 2\tOR\r\nstock = 0": "ab",
}  # fmt: skip
# Each of these is refused, and the message has the text beside it.
REFUSED = {
    # functions that read files, variables or settings, or take long
    "price < (SELECT count(*) FROM read_csv('/etc/passwd'))": "unknown function 'count'",
    "read_csv('/etc/passwd') IS NULL": "unknown function 'read_csv'; the functions are abs, ceil, coalesce",
    "read_text('/etc/passwd') = ''": "character 1: unknown function 'read_text'",
    "price < 1 OR read_blob('x') = 'y'": "character 14: unknown function 'read_blob'",
    "parquet_scan('x') = 1": "unknown function 'parquet_scan'",
    "glob('/*') = ''": "unknown function 'glob'",
    "getenv('HOME') = ''": "unknown function 'getenv'",
    '"getenv"(\'HOME\') = \'\'': "unknown function 'getenv'",
    "system.main.getenv('HOME') = ''": "unknown function 'getenv'",
    "current_setting('threads') = '1'": "unknown function 'current_setting'",
    "pragma_version() = ''": "unknown function 'pragma_version'",
    "duckdb_settings() = ''": "unknown function 'duckdb_settings'",
    "repeat('x', 1000000000) = ''": "unknown function 'repeat'",
    "length(repeat('x', 1e9)) > 0": "character 8: unknown function 'repeat'; ",
    "regexp_matches(category, '(a+)+$')": "unknown function 'regexp_matches'",
    "category ~ '(a+)+$'": "expected columns, values",
    "category SIMILAR TO '(a+)+$'": "expected columns, values",
    "category GLOB '*'": "expected columns, values",
    "range(1000000000) IS NULL": "unknown function 'range'",
    "generate_series(1, 1000000000) IS NULL": "unknown function 'generate_series'",
    "sleep(10)": "unknown function 'sleep'",
    "random() < 0.5": "unknown function 'random'",
    "now() > added": "unknown function 'now'",
    "nextval('s') = 1": "unknown function 'nextval'",
    "query('SELECT 1') = 1": "unknown function 'query'",
    "lowr(category) = 'x'": "unknown function 'lowr'; did you mean lower?",
    # statements and several conditions
    "1=1; DROP TABLE items": "character 4: expected one condition; got a semicolon",
    "price < 50;": "got a semicolon",
    ";": "got a semicolon",
    "DROP TABLE items": "cannot be read at 'DROP'",
    "PRAGMA database_list": "cannot be read at 'database_list'",
    "ATTACH '/tmp/x.db' AS x": "cannot be read",
    "COPY items TO '/tmp/x'": "cannot be read",
    "INSTALL httpfs": "cannot be read",
    "LOAD icu": "cannot be read",
    "SET threads = 8": "cannot be read",
    "EXPORT DATABASE '/tmp/x'": "cannot be read",
    "CALL pragma_version()": "cannot be read",
    "FROM items": "cannot be read",
    "SELECT TRUE": "cannot be read at 'SELECT'",
    "TRUE UNION SELECT FALSE": "cannot be read at 'UNION'",
    "TRUE LIMIT 1": "cannot be read at 'LIMIT'",
    "TRUE FROM items": "cannot be read",
    "TRUE) FROM items; DROP TABLE items --": "got a semicolon",
    "TRUE) OR (FALSE": "cannot be read at ')'",
    # subqueries, windows, other tables, star, parameters
    "price IN (SELECT 1)": "got 'price IN (SELECT 1)'",
    "price < (SELECT 1)": "got '(SELECT 1)'",
    "EXISTS (SELECT 1)": "unknown function 'EXISTS'",
    "price = ANY (SELECT 1)": "unknown function 'ANY'",
    "(WITH x AS (SELECT 1) SELECT 1) = 1": "unknown function 'AS'",
    "row_number() OVER () = 1": "unknown function 'row_number'",
    "abs(price) OVER () = 1": "unknown function 'OVER'",
    "abs(price) FILTER (WHERE on_sale) = 1": "unknown function 'FILTER'",
    "items.price < 3": "character 7: expected columns, values",
    "main.items.price < 3": "expected columns, values",
    "'/etc/passwd'.price < 3": "condition",
    "*": "got '*'",
    "length(*) = 1": "got '*'",
    "COLUMNS('price') < 3": "unknown function 'COLUMNS'",
    "price = ?": "got '?'",
    "price = $1": "expected columns, values",
    "price = :x": "expected columns, values",
    # comments and quotes
    "price < 50 -- AND on_sale": "expected no comments",
    "price < 50 /* AND on_sale */": "expected no comments",
    "price /*+ hint */ < 50": "expected no comments",
    "category = 'x": "expected columns, values",
    "category = 'x\\' OR 1=1 --'": "expected no comments",
    "category = $$x$$": "expected columns, values",
    "category = E'\\x41'": "expected columns, values",
    "category = x'41'": "cannot be read",
    "category = U&'\\0041'": "expected columns, values",
    "'a' 'b' = category": "expected columns, values",
    # other syntax
    "CASE WHEN on_sale THEN TRUE END": "expected columns, values",
    "price::INTEGER = 1": "got 'INT'",
    "CAST(category AS BLOB) = 'x'": "unknown function 'CAST'",
    "TRY_CAST(price AS DATE) = 'x'": "unknown function 'TRY_CAST'",
    "category || 'x' = 'y'": "expected columns, values",
    "price ** 400 > 1": "expected columns, values",
    "genres[1] = 'x'": "expected columns, values",
    "genres = ['x']": "expected columns, values",
    "{'a': 1} IS NULL": "expected columns, values",
    "{'a'{: 1} IS NULL": "it cannot be read",
    "x -> x = 1": "expected columns, values",
    "category COLLATE nocase = 'x'": "expected columns, values",
    "added AT TIME ZONE 'UTC' > '2020-01-01'": "expected columns, values",
    "added > current_date": "got 'CURRENT_DATE'",
    "added > current_date - INTERVAL 7 DAY": "expected columns, values",
    "price IS DISTINCT FROM 1": "expected columns, values",
    "(price, stock) = (1, 2)": "expected columns, values",
    "trim(BOTH 'x' FROM category) = 'y'": "expected columns, values",
    "abs(DISTINCT price) = 1": "expected columns, values",
    "lower(category ORDER BY price) = 'x'": "expected columns, values",
    "price < 0x1F": "cannot be read",
    "price <": "cannot be read",
    "AND": "cannot be read",
    "": "a condition must be a text such as",
    " \n": "a condition must be a text such as",
    # unknown columns, and characters that look like others
    "prise < 3": "character 1: unknown column 'prise'; did you mean price?",
    "Price < 3": "unknown column 'Price'; did you mean price?",
    "on_sale AND prise < 3": "character 13: unknown column 'prise'",
    "zzz = 1": "unknown column 'zzz'; the columns are item_id, price, weight",
    "рrice < 3": "unknown column 'рrice'; did you mean price?",  # noqa: RUF001, the first letter is Cyrillic
    "price ＜ 3": "condition",  # noqa: RUF001, a full-width sign
    "category ＝ ＇x＇": "condition",  # noqa: RUF001
    "price\u200b < 3": r"character 6: expected printable characters; got '\u200b'",
    "price < 3\0": r"expected printable characters; got '\x00'",
    "category = '\u202e'": r"expected printable characters; got '\u202e'",
    # deep and long
    "(" * 17 + "on_sale" + ")" * 17: "character 17: at most 16 parentheses may be open at once",
    "(" * 1500 + "on_sale" + ")" * 1500: "at most 16 parentheses",
    "(" * 1500: "at most 16 parentheses",
    "lower(" * 20 + "category" + ")" * 20 + " = 'x'": "at most 16 parentheses",
    "NOT " * 40 + "on_sale": "it is nested",
    "NOT " * 900 + "on_sale": "it is nested too deeply",
    "- " * 40 + "price = 1": "more than 32 levels deep",
    " + ".join(["price"] * 40) + " = 1": "more than 32 levels deep",
    "price < 1 OR " * 400 + "TRUE": "a condition may have 4,000 characters; got 5,204",
}  # fmt: skip


@pytest.fixture(scope="module")
def items() -> ItemTable:
    return ItemTable(pa.table(ROWS), "items.parquet")


@pytest.mark.parametrize(("condition", "expected"), ANSWERS.items(), ids=ANSWERS)
def test_a_condition_selects_the_items_that_meet_it(items, condition, expected):
    mask = items.mask(condition)
    assert mask.dtype == bool
    assert "".join(np.array(ROWS["item_id"])[mask]) == expected


@pytest.mark.parametrize(("condition", "message"), REFUSED.items(), ids=range(len(REFUSED)))
def test_everything_else_is_refused_in_one_sentence(items, condition, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(items, "_evaluate", lambda *args: pytest.fail("the condition reached DuckDB"))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        condition_sql(condition, items.table.column_names)
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 500
    assert list(tmp_path.iterdir()) == []


def test_a_condition_is_a_text(items):
    for wrong in (5, None, True, ["on_sale"]):
        with pytest.raises(ValueError, match="a condition must be a text"):
            condition_sql(wrong, items.table.column_names)


def test_the_sql_has_quoted_names_and_literals_that_are_written_anew():
    assert condition_sql("a<1 or b='it''s'", ["a", "b"]) == "\"a\" < 1 OR \"b\" = 'it''s'"
    assert condition_sql('"x""y" = 1', ['x"y']) == '"x""y" = 1'
    assert condition_sql('"; DROP TABLE items --" = 1', ["; DROP TABLE items --"]) == '"; DROP TABLE items --" = 1'


def test_a_long_chain_of_one_operator_is_one_level():
    condition = " OR ".join(["a = 1"] * 400)
    assert condition_sql(condition, ["a"]).count("OR") == 399


@pytest.mark.parametrize(
    "example", [*conditions.OPERATORS, *(text for texts in conditions.FUNCTIONS.values() for text in texts)]
)
def test_every_example_of_what_is_allowed_is_allowed(example):
    assert condition_sql(example, ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("price", "expected a value that is true or false; got DOUBLE"),
        ("category", "expected a value that is true or false; got VARCHAR"),
        ("NULL", "expected a value that is true or false; got"),
        ("price > 'abc'", "the columns of items.parquet: Conversion Error: Could not convert string 'abc'"),
        ("category > 5", "does not fit the columns of items.parquet: Binder Error"),
        ("year(category) = 1", "does not fit the columns of items.parquet"),
        ("1 < price < 2", "does not fit the columns of items.parquet"),
        ("stock = 99999999999999999999999999999999999999999999999", "does not fit the columns of items.parquet"),
    ],
)  # fmt: skip
def test_a_condition_that_does_not_fit_the_columns_is_an_error(items, condition, message):
    with pytest.raises(ValueError, match=message) as caught:
        items.mask(condition)
    assert "LINE" not in str(caught.value)


def test_a_condition_that_runs_long_is_interrupted(monkeypatch):
    big = ItemTable(pa.table({"text": ["Abc" * 100] * 300_000}), "big.parquet")
    deep = "upper(lower(" * 7 + "text" + "))" * 7
    condition = " OR ".join(f"{deep} = '{number}'" for number in range(30))
    monkeypatch.setattr(item_table, "TIME_LIMIT_SECONDS", 0.1)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"it takes longer than 0\.1 seconds on 300,000 items; simplify it"):
        big.mask(condition)
    assert time.perf_counter() - start < 5
    monkeypatch.undo()
    assert big.mask("length(text) = 300").all()


@pytest.mark.parametrize(
    "sql",
    [
        "(SELECT count(*) FROM read_text('secret.txt')) > 0", "(SELECT count(*) FROM 'secret.csv') > 0",
        "(SELECT count(*) FROM rows_of_the_caller) > 0", "getenv('HOME') <> ''",
    ],
)  # fmt: skip
def test_duckdb_itself_reads_no_file_and_no_variable(items, sql, tmp_path, monkeypatch):
    """A second barrier, behind the check of the condition."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.csv").write_text("a\nsecret\n")
    rows_of_the_caller = pa.table({"a": [1]})
    monkeypatch.setattr(item_table, "condition_sql", lambda condition, columns: sql)
    with pytest.raises(ValueError, match="does not fit the columns"):
        items._evaluate("anything")
    assert len(rows_of_the_caller) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"secret.txt", "secret.csv"}


def test_duckdb_settings_are_locked(items, monkeypatch):
    for statement in ("SET memory_limit = '9GB'", "ATTACH 'x.db'", "COPY items TO 'x.csv'", "INSTALL httpfs"):
        monkeypatch.setattr(
            item_table, "condition_sql", lambda condition, columns, text=statement: f"1; {text}; SELECT 1"
        )
        with pytest.raises(ValueError, match=r"does not fit the columns.*(locked|disabled)"):
            items._evaluate("anything")


WORDS = (
    "price", "category", "genres", "on_sale", "'x'", "'--'", "1", "1e9", "(", ")", "(", ")", ",", "=", "<", "AND", "OR",
    "NOT", "IN", "LIKE", "IS", "NULL", "BETWEEN", "-", "+", "*", "/", "lower", "abs", "ESCAPE", "SELECT",
    "read_csv", "::", ".", "[", "]", "||", "CASE", "WHEN", "END", "OVER", "$$", "?", ":=", "->", "{", "}",
)  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_any_sequence_of_words_is_refused_or_becomes_sql_that_is_a_condition_again(text):
    # DATE is not among the words, since a date is written as a CAST, which a condition may not have.
    try:
        sql = condition_sql(text, list(ROWS))
    except ValueError:
        return
    assert condition_sql(sql, list(ROWS)) == sql


def test_the_newest_conditions_are_computed_once(items, monkeypatch):
    computed = []
    evaluate = ItemTable._evaluate
    monkeypatch.setattr(ItemTable, "_evaluate", lambda self, text: computed.append(text) or evaluate(self, text))
    table = ItemTable(items.table, "items.parquet")
    for number in (1, 2, 1, 2):
        table.mask(f"price > {number}")
    assert computed == ["price > 1", "price > 2"]
    for number in range(item_table.MASKS_KEPT):
        table.mask(f"stock > {number}")
    table.mask("price > 1")
    assert computed[-1] == "price > 1"
    with pytest.raises(ValueError, match="read-only"):
        table.mask("price > 1")[0] = True
