"""A random log reads the same from every format: the same ids, the same order."""

import json
import tempfile
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs_on_disk import HEADER, items_of, write_csv

# Every character but surrogates, which UTF-8 does not have. An empty id is refused, so there is none.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ODD = st.sampled_from(["007", "7", "-0", "0", "0x10", "1e3", "NULL", '"', '""', "a\nb", "\r", "a\r\nb", " ", "\t", ",",
                       ";", "|", "#", "\\", "'", "1.0", "\ufeff", "\x00", "é", "e\u0301", "{", "[MASK]"])  # fmt: skip
NUMBERS = st.integers(0, 10**40).map(str) | st.integers(0, 10**40).map("{:041}".format)
IDS = TEXTS | ODD | NUMBERS
# Few different times, so that many events have the same one.
EVENTS = st.lists(st.tuples(IDS, IDS, st.integers(-3, 3)), min_size=2, max_size=30).filter(
    lambda events: len({user for user, _, _ in events}) > 1
)


def sources(folder: Path, events: list[tuple[str, str, int]]):
    columns = {name: list(values) for name, values in zip(HEADER, zip(*events, strict=True), strict=True)}
    table = pa.table(columns)
    for name, delimiter in (("comma", ","), ("tab", "\t"), ("semicolon", ";"), ("bar", "|")):
        yield write_csv(folder / name, events, delimiter=delimiter)
    lines = [json.dumps(dict(zip(HEADER, event, strict=True)), ensure_ascii=bool(event[2] % 2)) for event in events]
    (folder / "lines").write_text("\n".join(lines), "utf-8", newline="\n")
    yield folder / "lines"
    pq.write_table(table, folder / "parquet", row_group_size=5)
    yield folder / "parquet"
    yield table
    yield pandas.DataFrame(columns)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(EVENTS)
def test_a_random_log_reads_the_same_from_every_format(events):
    expected: dict[str, list[str]] = {}
    for user, item, _ in sorted(events, key=lambda event: event[2]):  # a stable sort keeps the order of the rows
        expected.setdefault(user, []).append(item)
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(Path(folder), events):
            assert items_of(source) == expected, source
