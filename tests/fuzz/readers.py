"""Every reader of this package with inputs for it, and the property that all of them keep.

An input is read, or refused with an error that the command line shows as one line. No other exception leaves a reader.
It ends soon, takes little memory, writes no file, starts no program, connects to nothing and opens no file that the
input names.
"""

import bz2
import contextlib
import functools
import gc
import gzip
import io
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from command_runs import run as run_command
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from mutations_of_bytes import TEXTS, VALUES, as_json, odd_bytes, odd_json, odd_values
from trained_folder import make_trained_folder
from transformers import pipeline

from bert4rec_hf import Bert4RecConfig, Bert4RecTokenizer, read_prepared
from bert4rec_hf.convert.recbole_settings import config_recipe
from bert4rec_hf.convert.safe_pickle import read_pickle
from bert4rec_hf.data.file_formats import JSONColumnError
from bert4rec_hf.data.item_tables import feature_columns, fit_features, read_item_table
from bert4rec_hf.data.preparation import histories
from bert4rec_hf.evaluation.seen_targets import json_of_model
from bert4rec_hf.hub.load import check_model, load_model
from bert4rec_hf.hub.model_card import write_model_card
from bert4rec_hf.serving.history_files import divide, history_files, read_item_ids, read_part
from bert4rec_hf.serving.item_table import ItemTable
from bert4rec_hf.serving.rules import named_rules
from bert4rec_hf.serving.server import Server, ServerSettings, _read_rules_file, create_app

# What is too much for one input: an error of this many seconds and more is a fault.
SECONDS = 10
# What the process may grow by, over all inputs of a reader.
MEGABYTES = 2_000
# These leave a reader as what it says in one line. Other errors derived from ValueError are those of libraries.
REFUSALS = (ValueError, JSONColumnError, FileNotFoundError, IsADirectoryError, TypeError, OverflowError, ImportError)
EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.symlink")


class TooSlowError(BaseException):
    """Raised by the alarm. It is no Exception, so that no reader takes it for damage."""


@dataclass
class Result:
    """What a reader did with its inputs.

    Attributes:
        number: Number of inputs.
        num_read: Number of inputs that were read.
        seconds: Time of all.
        slowest: Time of the slowest.
        faults: For each kind of fault, an input.
    """

    number: int = 0
    num_read: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    faults: dict[str, Any] = field(default_factory=dict)


@dataclass
class Reader:
    """A reader.

    Attributes:
        name: What it reads.
        share: How many of 1,000 inputs are for it.
        inputs: The inputs.
        read: Reads one.
    """

    name: str
    share: float
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], None]


class Watch:
    """What Python does while readers run, from its audit events."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in EVENTS:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            path = os.path.realpath(path)
            writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if path == "/etc/passwd" or (writes and not path.startswith((self.allowed, "/dev/"))):
                self.seen.append(f"open {path} {mode}")


class _Raising(logging.Handler):
    """Formats each message, which logging otherwise does with errors on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage().encode("utf-8", "backslashreplace")


class Fuzzer:
    """Readers in a folder of their own, with a model that the commands have trained there."""

    watch: Watch | None = None

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        set_hypothesis_home_dir(self.folder / "hypothesis")
        self.data, self.model = make_trained_folder(self.folder)
        shutil.rmtree(self.model / "checkpoint-1", ignore_errors=True)
        (self.model / "training_args.bin").unlink(missing_ok=True)
        self.tokenizer = Bert4RecTokenizer.from_pretrained(self.model)
        self.items = ItemTable.read(self.folder / "items.csv", self.tokenizer)
        self.pipe: Any = pipeline("sequential-recommendation", model=load_model(self.model), tokenizer=str(self.model))
        store = f"sqlite:///{self.folder / 'events.db'}"
        self.server = Server(ServerSettings(str(self.model), store=store, allow_where=True))
        self.client = TestClient(create_app(self.server))
        self.readers = {reader.name: reader for reader in [*self._tables(), *self._words(), *self._folders()]}

    def close(self) -> None:
        """Stop the thread of the server, which would keep the process alive."""
        self.server.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[Path]:
        """Work in an empty folder, with a folder for temporary files beside it and Python's doings watched."""
        place = Path(tempfile.mkdtemp(dir=self.folder, prefix="alone-"))
        temporary, work = place / "temporary", place / "work"
        temporary.mkdir(), work.mkdir()
        before, old_folder, loggers = tempfile.tempdir, os.getcwd(), ("bert4rec_hf", "transformers")
        Fuzzer.watch = Fuzzer.watch or Watch()
        handler, states = _Raising(), []
        for name in loggers:
            logger = logging.getLogger(name)
            states.append((logger, logger.handlers[:], logger.propagate))
            logger.handlers, logger.propagate = [handler], False
        os.chdir(work)
        tempfile.tempdir = str(temporary)
        Fuzzer.watch.allowed, Fuzzer.watch.seen = str(self.folder), []
        try:
            yield work
        finally:
            Fuzzer.watch.allowed = None
            tempfile.tempdir = before
            os.chdir(old_folder)
            for logger, handlers, propagate in states:
                logger.handlers, logger.propagate = handlers, propagate

    def run(self, reader: Reader, number: int, start: int = 0) -> Result:
        """Read inputs, and collect the faults."""
        result = Result()

        def alarm(*_: Any) -> None:
            raise TooSlowError

        def once(value: Any) -> None:
            result.number += 1
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
            try:
                try:
                    reader.read(value)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                result.num_read += 1
            except TooSlowError:
                result.faults.setdefault("too slow", value)
            except Exception as error:
                if type(error) not in REFUSALS or not str(error):
                    result.faults.setdefault(_place(error), (str(error)[:200], value))
            took = time.perf_counter() - began
            result.slowest = max(result.slowest, took)
            if took > SECONDS:
                result.faults.setdefault("too slow", value)
            if Fuzzer.watch is not None and Fuzzer.watch.seen:
                result.faults.setdefault(Fuzzer.watch.seen[0], value)
                Fuzzer.watch.seen = []

        old_alarm = signal.signal(signal.SIGALRM, alarm)
        began, megabytes = time.perf_counter(), _megabytes()
        try:
            with self.alone() as work:
                options = settings(
                    max_examples=number,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                options(seed(start)(given(reader.inputs)(once)))()
                if number >= 100 and not result.num_read:
                    result.faults["nothing was read"] = None
                if number >= 100:  # a few inputs leave too little behind to be worth the time
                    gc.collect()
                for name in ("work", "temporary"):
                    left = [path.name for path in (work.parent / name).iterdir()]
                    if left:
                        result.faults.setdefault(f"files are left in {name}: {left[:3]}", None)
        finally:
            signal.signal(signal.SIGALRM, old_alarm)
        if _megabytes() - megabytes > MEGABYTES:
            result.faults["the process grew too large"] = _megabytes() - megabytes
        result.seconds = time.perf_counter() - began
        return result

    def _written(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def _tables(self) -> list[Reader]:
        def log(content: bytes) -> None:
            histories(self._written("input.log", content)).to_pyarrow()

        def table(content: bytes) -> None:
            found = ItemTable.read(self._written("input.items", content), self.tokenizer)
            found.row(3)
            for column in found.table.column_names[:3]:
                found.values_of(column)

        def features(content: bytes) -> None:
            found = read_item_table(self._written("input.items", content))
            counts = dict.fromkeys(found["item_id"].to_pylist(), 1)
            refused: list[ValueError] = []
            names = found.column_names[1:6]
            for name in names:
                try:
                    fit_features(found, feature_columns(found, [name], "the table"), counts, "the table")
                except ValueError as error:
                    refused.append(error)
            if len(refused) == len(names):
                raise refused[0] if refused else ValueError("the table has no other column")
            for error in refused:
                if type(error) not in REFUSALS:
                    raise error

        def requests(content: bytes) -> None:
            parts, kind = divide(history_files(self._written("input.histories", content)))
            for part in parts:
                for batch in read_part(part, kind):
                    str(batch.requests[:3])

        def ids(content: bytes) -> None:
            read_item_ids(self._written("input.csv" if content[:1] == b"i" else "input.ids", content))

        logs = [content for name, content in _packed(self.folder / "log.csv").items() if name != "items"]
        tables = [*_packed(self.folder / "items.csv").values(), (self.model / "items.parquet").read_bytes()]
        lines = "\n".join(
            json.dumps({"user_id": f"u{row}", "item_id": ["i1", f"i{row}"], "exclude": ["i2"], "candidates": ["i3", 4]})
            for row in range(8)
        ).encode()
        many = pa.table({"user_id": ["u1", "u2"], "item_id": [["i1", "i2"], []], "exclude": [["i3"], None]})
        plain = [lines, gzip.compress(lines), *_parquets(many), (self.data / "histories.parquet").read_bytes()]
        id_files = [b"i1\ni2\n", b"item_id,x\ni1,2\ni2,3\n", *_parquets(pa.table({"item_id": ["i1", "i2"]}))]
        row = {
            "user_id": "u1",
            "item_id": ["i1", {"item_id": "i2"}],
            "event_type": ["a", "b"],
            "exclude": [1],
            "timestamp": 3,
        }
        return [
            Reader("logs: CSV, JSON lines, Parquet, gzip, bzip2, zstd", 30, odd_bytes(logs), log),
            Reader("item tables", 20, odd_bytes(tables), table),
            Reader("item features of a table", 10, odd_bytes(tables) | _odd_item_rows(), features),
            Reader("histories files: bytes", 60, odd_bytes(plain), requests),
            Reader("histories files: values", 60, odd_json(row), requests),
            Reader("files of item ids", 20, odd_bytes(id_files), ids),
        ]

    def _words(self) -> list[Reader]:
        words = (
            st.sampled_from(
                [
                    "price",
                    "category",
                    "tags",
                    "added",
                    "item_id",
                    "title",
                    "'a'",
                    "1",
                    "2.5",
                    "0",
                    "1e400",
                    "''",
                    "AND",
                    "OR",
                    "NOT",
                    "(",
                    ")",
                    ",",
                    "=",
                    "<",
                    "<>",
                    "+",
                    "-",
                    "*",
                    "/",
                    "%",
                    "IN",
                    "LIKE",
                    "ILIKE",
                    "ESCAPE",
                    "BETWEEN",
                    "IS",
                    "NULL",
                    "TRUE",
                    "lower(",
                    "length(",
                    "contains(",
                    "list_contains(",
                    "round(",
                    "year(",
                    "abs(",
                    "DATE",
                    "TIMESTAMP",
                    "'2024-01-31'",
                    "'2024-02-31'",
                    "read_csv('/etc/passwd')",
                    "getenv('HOME')",
                    "SELECT",
                    "--",
                    ";",
                    "[",
                    "]",
                    "{",
                    "}",
                    "::",
                    "CAST(",
                    "x -> x",
                    '"price"',
                    "price % 0",
                    "'x' IN tags",
                    "coalesce(",
                    "least(",
                ]
            )
            | TEXTS
        )
        valid = [b"category = 'a' AND price < 5", b"'x' IN tags OR added > DATE '2024-01-05'", b"NOT price % 2 = 1"]
        conditions = st.one_of(
            st.lists(words, min_size=1, max_size=9).map(" ".join),
            odd_bytes(valid).map(lambda content: content.decode("utf-8", "surrogateescape")),
        )
        rules = {
            "sale": {
                "where": "price < 5",
                "boost": ["0.5: category = 'a'"],
                "max_per": ["category:2"],
                "diversity": 0.3,
            }
        }
        rules_file = [yaml.safe_dump(rules).encode(), b"a: &a {where: price < 5}\nb: *a\n"]
        recipe = (self.model / "recipe.yaml").read_bytes()
        short = b"learning_rate: 0.01\nhidden_size: 16\nmask_ratio: 0.2\nlr_scheduler_kwargs: {a: 1}\nseed: 5\n"
        prepare = (
            b"user_column: user_id\nmin_user_events: 2\nwhere: rating > 3\nevent_columns: [a, b]\nsplit: temporal\n"
        )
        recbole = (
            b"model: BERT4Rec\nn_layers: 2\nn_heads: 2\nhidden_size: 64\neval_args: {split: {LS: valid_and_test}}\n"
        )

        def command(*words: str, content: bytes) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # Transformers says so of options that it will drop
                status, _, text = run_command(*words, "--config", self._written("input.yaml", content))
            lines = text.splitlines()
            if status != 2 or len(lines) != 1 or not lines[0].startswith(f"bert4rec {words[0]}: "):
                raise AssertionError(f"expected one line and status 2; got {status} and {text:.300}")
            if "no such file: nowhere" not in lines[0]:
                raise ValueError(lines[0])

        def named(value: Any) -> None:
            if isinstance(value, dict):
                named_rules(self.items, value)

        def rules_of_file(content: bytes) -> None:
            named_rules(self.items, _read_rules_file(str(self._written("input.yaml", content))))

        request = {"history": ["i1", "i2", 3], "exclude": ["i3"], "candidates": ["i4", "i5"]}
        calls = st.fixed_dictionaries(
            {},
            optional={
                "top_k": st.integers(-1, 30) | VALUES,
                "filter_seen_items": st.booleans() | VALUES,
                "exclude": VALUES,
                "candidates": VALUES,
                "explain": st.booleans() | VALUES,
                "event_type": VALUES,
                "batch_size": st.integers(-1, 3),
            },
        )
        seeds = st.sampled_from(
            [request, ["i1", "i2"], [["i1"], ["i2", "i3"]], [request, request], [{"item_id": "i1"}]]
        )

        def ask(value: tuple[Any, dict[str, Any]]) -> None:
            inputs, options = value
            str(self.pipe(inputs, **options))

        return [
            Reader("conditions (where)", 100, conditions, self.items.mask),
            Reader("rules of a request", 60, odd_values(rules), named),
            Reader("rules files of the server", 30, odd_bytes(rules_file), rules_of_file),
            Reader("recipes of train", 10, odd_bytes([short, recipe]), functools.partial(_given, command, "train")),
            Reader("recipes of prepare", 20, odd_bytes([prepare]), functools.partial(_given, command, "prepare")),
            Reader(
                "settings of RecBole",
                40,
                odd_bytes([recbole]),
                lambda content: str(config_recipe(self._written("input.yaml", content))),
            ),
            Reader("requests of the pipeline", 60, st.tuples(seeds.flatmap(odd_values), calls), ask),
            Reader("requests of the server", 50, self._http_requests(), self._answer),
        ]

    def _http_requests(self) -> st.SearchStrategy[Any]:
        recommend = {
            "history": ["i1", {"item_id": "i2", "event_type": None}],
            "top_k": 5,
            "candidates": ["i3", 4],
            "exclude": ["i5"],
            "where": "price < 5",
            "explain": True,
        }
        events = {"user_id": "u1", "item_ids": ["i1", 2]}
        body = st.one_of(
            st.tuples(st.just("/recommend"), odd_json(recommend)),
            st.tuples(st.just("/recommend"), odd_json({"user_id": "u1", "rules": "sale"})),
            st.tuples(st.just("/events"), odd_json(events)),
        )
        path = st.tuples(st.sampled_from(["/items/", "/similar?item_id=", "/similar?top_k=", "/"]), TEXTS)
        return st.one_of(body, body, path)

    def _answer(self, value: tuple[str, str | bytes]) -> None:
        path, content = value
        if isinstance(content, bytes):
            answer = self.client.post(path, content=content, headers={"content-type": "application/json"})
        else:
            answer = self.client.get(path + quote(content.encode("utf-8", "surrogatepass")))
        if answer.status_code >= 500:
            raise AssertionError(f"status {answer.status_code}: {answer.text:.200}")
        json.loads(answer.content)
        if answer.status_code >= 400:
            raise ValueError(answer.text[:1000])

    def _folders(self) -> list[Reader]:
        def in_folder(name: str, read: Callable[[], Any], folder: Path | None = None) -> Callable[[bytes], None]:
            path = (folder or self.model) / name
            right = path.read_bytes() if path.is_file() else None

            def once(content: bytes) -> None:
                path.write_bytes(content)
                try:
                    str(read())[:100]
                finally:
                    path.unlink() if right is None else path.write_bytes(right)

            return once

        def content(name: str) -> Any:
            return json.loads((self.model / name).read_bytes())

        def tokenizer() -> None:
            found = Bert4RecTokenizer.from_pretrained(self.model)
            str([found.title("i1"), (found.counts or [0])[:3], found.items[:3], found(["i1", "i2"])])
            if found.item_features is not None:
                found.feature_rows(self.items.table, found.items[:3])

        def config() -> Any:
            check_model(self.model)
            return Bert4RecConfig.from_pretrained(self.model)

        def card() -> Any:
            right = (self.model / "README.md").read_bytes()
            try:
                return write_model_card(self.model, tokenizer=self.tokenizer)
            finally:
                (self.model / "README.md").write_bytes(right)

        readers = [
            Reader("config.json", 90, odd_json(content("config.json")), in_folder("config.json", config)),
            Reader(
                "config.json, and the weights after it",
                8,
                odd_json(content("config.json")),
                in_folder("config.json", lambda: load_model(self.model)),
            ),
            Reader(
                "safetensors: bytes and headers",
                12,
                _odd_weights((self.model / "model.safetensors").read_bytes()),
                in_folder("model.safetensors", lambda: load_model(self.model)),
            ),
            Reader(
                "preparation.json of a prepared folder",
                30,
                odd_json(content("preparation.json")),
                in_folder("preparation.json", lambda: read_prepared(self.data, self.tokenizer), self.data),
            ),
            Reader(
                "new_items.json",
                20,
                odd_json(content("new_items.json")),
                in_folder("new_items.json", lambda: json_of_model(self.model, "new_items.json", {})),
            ),
            Reader(
                "model cards",
                10,
                odd_bytes([(self.model / "README.md").read_bytes()]),
                in_folder("README.md", lambda: write_model_card(self.model, tokenizer=self.tokenizer)),
            ),
            Reader(
                "recipe.yaml, for the card",
                10,
                odd_bytes([(self.model / "recipe.yaml").read_bytes()[:600]]),
                in_folder("recipe.yaml", card),
            ),
            Reader(
                "RecBole's pickles",
                100,
                _odd_pickles(),
                lambda given: str(read_pickle(self._written("input.pth", given))),
            ),
        ]
        for name in ("preparation.json", "evaluation.json", "training.json", "calibration.json"):
            readers.append(Reader(f"{name}, for the card", 20, odd_json(content(name)), in_folder(name, card)))
        for name, share in (
            ("tokenizer.json", 15),
            ("tokenizer_config.json", 15),
            ("items.json", 15),
            ("item_features.json", 15),
        ):
            readers.append(Reader(name, share, odd_json(content(name)), in_folder(name, tokenizer)))
        return readers


def _given(command: Callable[..., None], name: str, content: bytes) -> None:
    words = {"train": ("--data", "nowhere", "--output_dir", "out"), "prepare": ("nowhere", "--output", "out")}
    command(name, *words[name], content=content)


def _packed(path: Path) -> dict[str, bytes]:
    """A table in each format."""
    content = path.read_bytes()[:3000].rpartition(b"\n")[0] + b"\n"
    header, *rows = [line.split(",") for line in content.decode().splitlines()]
    lines = "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows).encode()
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    found = {"csv": content, "jsonl": lines, "gz": gzip.compress(content), "bz2": bz2.compress(content)}
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(lines)
    found["zst"] = sink.getvalue().to_pybytes()
    return found | {f"parquet-{number}": parquet for number, parquet in enumerate(_parquets(pa.table(columns)))}


def _parquets(table: pa.Table) -> list[bytes]:
    found = []
    for options in ({"compression": "none"}, {"compression": "snappy", "row_group_size": 7}, {"compression": "zstd"}):
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        found.append(sink.getvalue())
    return found


def _odd_item_rows() -> st.SearchStrategy[bytes]:
    """JSON lines of items with features of every kind, in which some values are hostile."""
    rows = [
        {
            "item_id": f"i{row}",
            "category": f"c{row % 3}",
            "price": 1.5 * row,
            "tags": ["a", "b"][: row % 3],
            "on_sale": row % 2 == 0,
            "vector": [0.1 * row, 1.0, -1.0],
        }
        for row in range(12)
    ]
    return odd_values(rows).map(lambda value: b"\n".join(map(as_json, value if isinstance(value, list) else [value])))


def _odd_weights(content: bytes) -> st.SearchStrategy[bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])

    def packed(value: Any) -> bytes:
        text = json.dumps(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return odd_bytes([content]) | odd_values(header).map(packed) | odd_bytes([content[: 8 + length]])


def _odd_pickles() -> st.SearchStrategy[bytes]:
    state = OrderedDict((f"layer.{number}.weight", torch.rand(3, 2)) for number in range(3))
    checkpoint = {
        "config": {"n_layers": 2, "hidden_size": 4},
        "state_dict": state,
        "epoch": 3,
        "other": [1.5, None, {"a"}],
    }
    seeds = [
        pickle.dumps({"field2id_token": {"item_id": ["[PAD]", "a"]}, "x": (1, 2.5)}, protocol) for protocol in range(6)
    ]
    inner = []
    for protocol in (2, 4):
        file = io.BytesIO()
        torch.save(checkpoint, file, pickle_protocol=protocol)
        seeds.append(file.getvalue())
        with zipfile.ZipFile(io.BytesIO(file.getvalue())) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        inner.append(members)

    def packed(given: tuple[dict[str, bytes], bytes]) -> bytes:
        members, content = given
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, content if name.endswith("data.pkl") else member)
        return file.getvalue()

    zipped = [
        st.tuples(st.just(members), odd_bytes([members[next(name for name in members if name.endswith("data.pkl"))]]))
        for members in inner
    ]
    return odd_bytes(seeds) | st.one_of(zipped).map(packed)


def _place(error: BaseException) -> str:
    """The kind of a fault: the type of the error, and the last line of this package that it passed."""
    found, place = error.__traceback__, "a library"
    while found is not None:
        name = found.tb_frame.f_code.co_filename
        if "bert4rec_hf" in name:
            place = f"{Path(name).name}:{found.tb_frame.f_code.co_name}"
        found = found.tb_next
    return f"{type(error).__name__} in {place}"


def _megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
