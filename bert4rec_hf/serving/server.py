"""`bert4rec serve`: recommendations over HTTP, by FastAPI and uvicorn."""

import asyncio
import contextlib
import gc
import hashlib
import logging
import queue
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..model.configuration_bert4rec import UNK_TOKEN_ID
from ..reading import read_yaml
from ..version import __version__
from .event_store import EventStore
from .messages import (
    MAX_ID_LENGTH,
    MAX_ITEMS,
    MAX_TOP_K,
    Events,
    EventsAnswer,
    HistoryEvent,
    Problem,
    RecommendAnswer,
    RecommendRequest,
    SimilarAnswer,
)
from .model_thread import MAX_BATCH_SIZE, ModelThread
from .rules import Rules
from .served_log import ServedLog
from .served_model import ServedModel, place_of

logger = logging.getLogger(__name__)

# A body has room for a history and a list of candidates of the largest size.
MAX_BODY_BYTES = 2**20
# Share of the users that get the challenger.
DEFAULT_SHARE = 0.1
# Number of connections that may wait to be accepted.
BACKLOG = 2048
# Seconds between two looks at the model folder, and seconds that a stopping server waits for its requests.
WATCH_SECONDS, STOP_SECONDS = 2.0, 30


@dataclass(frozen=True)
class ServerSettings:
    """What `bert4rec serve` is told.

    Attributes:
        model: A model folder, a symbolic link to one, or a Hub id.
        host: The address to listen on.
        port: The port. 0: any free one.
        store: The URL of the database of events; see `EventStore`.
        histories: A prepared folder whose histories fill an empty store. None: the store stays empty.
        challenger: A further model for a share of the users. None: all users get `model`.
        share: The share of users that get the challenger, from 0 to 1. None: a tenth.
        served_log: A folder for a log of what was recommended; see `ServedLog`. None: no log.
        admin_port: A port of this machine alone, for POST /reload. None: the folder is watched all the same.
        max_waiting: Largest number of requests that wait for the model.
        timeout: Seconds after which a request is given up.
        max_batch_size: Largest number of requests that are computed at once.
        device: The device of the model. None: the one that Transformers chooses.
        items: The item table of the rules. None: items.parquet of the model folder, if it has one.
        rules: A YAML file of rules by name, which requests may name; see `named_rules`. None: no rules.
        allow_where: Whether requests may have a condition of their own.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    store: str = "sqlite:///bert4rec-events.db"
    histories: str | None = None
    challenger: str | None = None
    share: float | None = None
    served_log: str | None = None
    admin_port: int | None = None
    max_waiting: int = 256
    timeout: float = 10.0
    max_batch_size: int = MAX_BATCH_SIZE
    device: str | None = None
    items: str | None = None
    rules: str | None = None
    allow_where: bool = False

    def __post_init__(self) -> None:
        if self.share is not None and self.challenger is None:
            raise ValueError(f"--share is for --challenger; got {self.share:g} alone: leave it out")
        if self.admin_port is not None and self.admin_port < 1:
            raise ValueError(f"--admin_port must be a port of your choice; got {self.admin_port}")
        if not 0 <= (self.share or 0) <= 1:
            raise ValueError(f"--share must be between 0 and 1, the share of users of --challenger; got {self.share}")
        for name in ("max_waiting", "max_batch_size", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0; got {getattr(self, name)}")


class Server:
    """The state of a server: its models, the thread that computes, the store, the log and the metrics.

    Args:
        settings: What `bert4rec serve` is told.

    Raises:
        OSError, ValueError: If a model, the store, the histories or the log cannot be used.
    """

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.rules = {} if settings.rules is None else _read_rules_file(settings.rules)
        self.models = {"model": self.load(settings.model)}
        if settings.allow_where and self.models["model"].items is None:
            raise ValueError("--allow_where needs an item table: name one with --items")
        if settings.challenger is not None:
            self.models["challenger"] = self.load(settings.challenger)
            self.models["model"].check_successor(self.models["challenger"])
        self.refused: dict[str, tuple[Any, ...]] = {}  # what a model's source stood for when it was refused
        self.reload_errors: dict[str, str] = {}
        self.reloading = threading.Lock()
        self.store = EventStore(settings.store)
        if settings.histories is not None:
            number = self.store.fill(settings.histories)
            logger.warning(
                "%s: %s", self.store.name, f"filled with {number:,} events" if number else "has events; not filled"
            )
        targets = self.models["model"].pipe.tokenizer.target_event_types
        if targets is not None and self.store.starts_without_types():
            logger.warning("%s has events without a type, which count as %s", self.store.name, targets[0])
        self.log = None if settings.served_log is None else ServedLog(Path(settings.served_log))
        self.registry = CollectorRegistry()
        self.requests = Counter("bert4rec_requests", "Answered requests.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "bert4rec_request_seconds", "Time from a request to its answer.", ["path"], registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )  # fmt: skip
        self.batches = Histogram(
            "bert4rec_batch_size", "Requests computed at once.", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32)
        )
        self.events = Counter("bert4rec_events", "Stored events.", registry=self.registry)
        self.reloads = Counter("bert4rec_reloads", "Folders taken over or refused.", ["result"], registry=self.registry)
        self.thread = ModelThread(settings.max_waiting, settings.max_batch_size, self.batches.observe)
        Gauge("bert4rec_waiting_requests", "Requests that wait for the model.", registry=self.registry).set_function(
            self.thread.waiting.qsize
        )
        self.info = Gauge("bert4rec_model", "1 for each served model.", ["role", "version"], registry=self.registry)
        self._show_versions()

    def load(self, source: str) -> ServedModel:
        """Load a model with the rules of this server."""
        return ServedModel.load(source, self.settings.device, items=self.settings.items, rules=self.rules)

    def rules_of(self, served: ServedModel, name: str | None, where: str | None) -> Rules | None:
        """The rules that a request asks for.

        Args:
            served: The model that answers.
            name: The name of rules, or None.
            where: A condition, or None.

        Raises:
            ValueError: If there are no such rules, both are given, or conditions are not allowed or wrong.
        """
        if name is not None and where is not None:
            raise ValueError("expected rules or where, one of them; got both")
        if name is not None:
            if name not in served.rules:
                raise ValueError(f"there are no rules {name!r:.80}; there are {', '.join(served.rules) or 'none'}")
            return served.rules[name]
        if where is None:
            return None
        if not self.settings.allow_where:
            raise ValueError("this server allows no where; name rules of its configuration instead")
        return Rules(served.items, where=where)

    def check_types(self, event_types: Sequence[str | None]) -> None:
        """Raise HTTPException if events have a type that no served model knows, as a misspelt one.

        A server whose models have no event types stores all types, for a later model.
        """
        known = {name for served in self.models.values() for name in served.pipe.tokenizer.event_types or ()}
        for number, event_type in enumerate(event_types):
            if known and event_type is not None and event_type not in known:
                raise HTTPException(
                    400,
                    f"the model does not know the event type {event_type!r:.80} of event {number}; expected one of "
                    f"{', '.join(sorted(known))}",
                )

    def model_of(self, user_id: str | None) -> ServedModel:
        """The model for a user. The share of users that get the challenger is always the same users."""
        if "challenger" in self.models and user_id is not None:
            share = DEFAULT_SHARE if self.settings.share is None else self.settings.share
            digest = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).digest()
            if int.from_bytes(digest[:8], "big") < share * 2**64:
                return self.models["challenger"]
        return self.models["model"]

    def reload(self, *, only_changed: bool) -> dict[str, str]:
        """Load the model folders again. A folder that is refused leaves the served one in its place.

        Requests that have begun are answered by the model that they began with.

        Args:
            only_changed: Whether only folders are loaded that have changed since they were loaded or refused.

        Returns:
            The version of each model that was loaded.

        Raises:
            ValueError: If a folder is no model folder, is damaged, or has another catalogue.
        """
        loaded, problems = {}, []
        with self.reloading:
            for role, served in list(self.models.items()):
                place = place_of(served.source)
                if only_changed and place in (served.place, self.refused.get(role)):
                    continue
                try:
                    other = self.load(served.source)
                    served.check_successor(other)
                except Exception as error:  # a damaged file may raise anything, and the served model has to stay
                    self.refused[role], self.reload_errors[role] = place, f"{type(error).__name__}: {error}"
                    self.reloads.labels("refused").inc()
                    logger.error("%s is refused, and %s is served on: %s", served.source, served.version, error)
                    problems.append(f"{served.source} is refused, and {served.version} is served on: {error}")
                    continue
                self.models[role] = other
                self.refused.pop(role, None), self.reload_errors.pop(role, None)
                self.reloads.labels("loaded").inc()
                loaded[role] = other.version
                logger.warning("serving %s", other.version)
            self._show_versions()
            if loaded and gc.get_freeze_count():
                freeze_objects()
        if problems:
            also = [f"{version} is loaded" for version in loaded.values()]
            raise ValueError("; ".join([*problems, *also]))
        return loaded

    async def watch(self) -> None:
        """Take over new folders, and write the log, until the server stops."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            with contextlib.suppress(ValueError):  # it is logged, and /readyz tells it
                await run_in_threadpool(self.reload, only_changed=True)
            if self.log is not None:
                await run_in_threadpool(self.log.write)

    async def answer(self, future: Callable[[], Future[Any]]) -> Any:
        """Await what the model thread computes.

        Raises:
            HTTPException: 503 if too many requests wait; 504 if the time is over.
        """
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future()), self.settings.timeout)
        except queue.Full:
            raise HTTPException(
                503, f"{self.settings.max_waiting} requests wait already; try again later", {"Retry-After": "1"}
            ) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.settings.timeout:g} seconds; try again later") from None

    def close(self) -> None:
        """Answer what waits, and write what is in memory."""
        self.thread.stop()
        self.store.close()
        if self.log is not None:
            self.log.write(is_last=True)

    def _show_versions(self) -> None:
        self.info.clear()
        for role, served in self.models.items():
            self.info.labels(role, served.version).set(1)


def create_app(server: Server) -> FastAPI:
    """The application of a server, for uvicorn or another ASGI server. It closes the server when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(server.watch())
        yield
        watching.cancel()
        await run_in_threadpool(server.close)

    app = FastAPI(
        title="bert4rec", version=__version__, lifespan=lifespan, summary="Recommendations by a BERT4Rec model."
    )
    app.add_middleware(_Limits, server=server)
    app.add_exception_handler(RequestValidationError, _invalid)
    errors: dict[int | str, dict[str, Any]] = {
        408: {"model": Problem, "description": "The body came too slowly."},
        413: {"model": Problem, "description": "The body is too large."},
        422: {"model": Problem, "description": "The body has another form; `detail` says which was expected."},
        400: {"description": "The request is wrong; `detail` says what was expected and what came."},
        503: {"description": "Too many requests wait, or the database does not answer."},
        504: {"description": "The answer took too long."},
    }

    def known(served: ServedModel, item_id: str) -> int:
        (token_id,) = served.pipe.tokenizer.item_ids_to_token_ids([item_id])
        if token_id == UNK_TOKEN_ID:
            raise HTTPException(404, f"the catalogue lacks the item {item_id!r:.80}")
        return token_id

    @app.post("/recommend", responses=errors, response_model=RecommendAnswer)
    async def recommend(body: RecommendRequest) -> JSONResponse:
        """Recommend items to a user or for a history."""
        if (body.user_id is None) == (body.history is None):
            raise HTTPException(400, "expected user_id or history, one of them; got " +
                                ("both" if body.history is not None else "neither"))  # fmt: skip
        history: Sequence[Any] = [
            event.model_dump() if isinstance(event, HistoryEvent) else event for event in body.history or ()
        ]
        served = server.model_of(body.user_id)
        num_events = len(history)
        if body.user_id is not None:
            stored = await _stored(server.store.history, body.user_id, MAX_ITEMS)
            num_events, known_types = len(stored), served.pipe.tokenizer.event_types
            history = [item_id for item_id, _ in stored]
            if known_types is not None:  # events of other types are left out, as items are that the catalogue lacks
                history = [
                    {"item_id": item_id, "event_type": event_type}
                    for item_id, event_type in stored
                    if event_type is None or event_type in known_types
                ]
        request = {"history": history, "candidates": body.candidates, "exclude": body.exclude}
        with _bad_request():
            rules = None
            if body.rules is not None or body.where is not None:  # a new condition is computed in another thread
                rules = await run_in_threadpool(server.rules_of, served, body.rules, body.where)
            answer, num_unknown = await server.answer(
                lambda: server.thread.recommend(
                    served.pipe,
                    request,
                    body.top_k,
                    filter_seen_items=body.filter_seen_items,
                    rules=rules,
                    explain=body.explain or None,
                    event_type=body.event_type,
                )
            )
        request_id = uuid.uuid4().hex
        if server.log is not None:
            server.log.add(request_id, served.version, body.rules, answer)
        # FastAPI would check the answer again, which takes longer than computing it.
        return JSONResponse(
            {
                "request_id": request_id,
                "model_version": served.version,
                "items": answer,
                "num_events": num_events,
                "num_unknown_items": num_unknown,
            }
        )

    @app.post("/events", status_code=201, responses={status: errors[status] for status in (400, 408, 413, 422, 503)})
    async def add_events(body: Events) -> EventsAnswer:
        """Add events to the history of a user."""
        events = [event if isinstance(event, HistoryEvent) else HistoryEvent(item_id=event) for event in body.item_ids]
        item_ids, types = [str(event.item_id) for event in events], [event.event_type for event in events]
        server.check_types(types)
        await _stored(server.store.add, body.user_id, item_ids, types)
        server.events.inc(len(item_ids))
        token_ids = server.models["model"].pipe.tokenizer.item_ids_to_token_ids(item_ids)
        return EventsAnswer(num_events=len(item_ids), num_unknown_items=token_ids.count(UNK_TOKEN_ID))

    @app.get(
        "/similar",
        responses={404: {"description": "The catalogue lacks the item."}, **errors},
        response_model_exclude_none=True,
    )
    async def similar(
        item_id: Annotated[str, Query(max_length=MAX_ID_LENGTH)], top_k: Annotated[int, Query(ge=1, le=MAX_TOP_K)] = 10
    ) -> SimilarAnswer:
        """Find the items that are most similar to an item."""
        served = server.models["model"]
        known(served, item_id)
        answer = await server.answer(lambda: server.thread.call(lambda: served.pipe.similar(item_id, top_k=top_k)))
        return SimilarAnswer(model_version=served.version, items=answer)

    @app.get("/items/{item_id:path}", responses={404: {"description": "The catalogue lacks the item."}})
    async def item(item_id: str) -> dict[str, Any]:
        """What is known of an item."""
        served = server.models["model"]
        tokenizer, token_id = served.pipe.tokenizer, known(served, item_id)
        found: dict[str, Any] = {"item_id": item_id}
        if tokenizer.titles is not None:
            found["title"] = tokenizer.title(item_id)
        if served.items is not None:
            found["columns"] = served.items.row(token_id)
        return found

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: {"description": "The database does not answer."}})
    async def readyz() -> dict[str, Any]:
        """Whether requests can be answered, the versions of the models, and why a new folder was refused."""
        await _stored(server.store.history, "", 1)
        versions = {role: served.version for role, served in server.models.items()}
        return {"status": "ready", "models": versions, "reload_errors": server.reload_errors}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(server.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def create_admin_app(server: Server) -> FastAPI:
    """The application for the port of this machine alone."""
    app = FastAPI(title="bert4rec administration", version=__version__)

    @app.post("/reload", responses={409: {"description": "The folder is refused; the served one stays."}})
    def reload() -> dict[str, Any]:
        """Load the model folders again, and answer when the new ones are served."""
        try:
            return {"loaded": server.reload(only_changed=False)}
        except ValueError as error:
            raise HTTPException(409, str(error)) from error

    return app


def serve(settings: ServerSettings, on_start: Callable[[str, Server], None] = lambda url, server: None) -> None:
    """Serve until SIGTERM or SIGINT. Requests that have begun are then answered.

    Args:
        settings: What `bert4rec serve` is told.
        on_start: Called with the URL and the server when everything is loaded.

    Raises:
        OSError, ValueError: If a port is in use, or the model, the store or the log cannot be used.
    """
    # The ports are taken before the model is loaded, which takes longer.
    listening = _listen(settings.host, settings.port)
    admin = None if settings.admin_port is None else _listen("127.0.0.1", settings.admin_port)
    server = Server(settings)
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": STOP_SECONDS}
    if admin is not None:
        administration = uvicorn.Server(uvicorn.Config(create_admin_app(server), **options))
        threading.Thread(target=administration.run, args=([admin],), name="administration", daemon=True).start()
    freeze_objects()
    host, port = listening.getsockname()[:2]
    on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}", server)
    uvicorn.Server(uvicorn.Config(create_app(server), **options)).run([listening])


def freeze_objects() -> None:
    """Free what is no longer in use, and leave all other objects out of later garbage collections.

    The modules and the model are half a million objects. Each full collection would go through them and hold up all
    requests for about 200 milliseconds.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class _Limits:
    """Refuses bodies that are too large or come too slowly, and measures each request."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, num_bytes, is_complete = time.perf_counter(), 500, 0, False

        async def limited() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            left = started + self.server.settings.timeout - time.perf_counter()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except TimeoutError:
                raise HTTPException(408, "the body came too slowly; send it again") from None
            is_complete = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES:,} bytes; send fewer items")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, limited, noted)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")  # never the requested path, which anyone may make up
            self.server.requests.labels(path, status).inc()
            self.server.seconds.labels(path).observe(time.perf_counter() - started)


@contextlib.contextmanager
def _bad_request() -> Any:
    """Turn the errors of the pipeline into 400, with the sentence that Python raises."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise HTTPException(400, str(error)) from error


async def _stored(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the store in another thread, since a database may let a caller wait."""
    try:
        return await run_in_threadpool(function, *arguments)
    except OSError as error:
        logger.error("%s", error)
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from error


async def _invalid(request: Request, error: Any) -> JSONResponse:
    """A sentence about the first fault of a body, in place of FastAPI's list."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    names = [name for name in names if not name.startswith("constrained-")]
    if first["type"] == "json_invalid":
        text = f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    elif isinstance(first["input"], bytes):
        text = "expected JSON with the header content-type: application/json"
    elif first["type"] == "string_type" and names and names[-1].isdecimal():
        text = f"{'.'.join(names)}: an item id should be text or an integer; got {first['input']!r:.80}"
    elif first["type"] == "extra_forbidden":
        known = [*RecommendRequest.model_fields] if request.url.path == "/recommend" else [*Events.model_fields]
        nearest = get_close_matches(names[-1], known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"expected {', '.join(known)}"
        text = f"unknown key {names[-1]!r:.80}: {hint}"
    else:
        got = "" if first["type"] == "missing" else f"; got {first['input']!r:.80}"
        text = f"{'.'.join(names) or 'the body'}: {first['msg'][0].lower()}{first['msg'][1:]}{got}"
    return JSONResponse({"detail": text}, 422)


def _read_rules_file(path: str) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is named, since asyncio turns off Nagle's algorithm for such sockets only. The algorithm would
        # delay answers by 40 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        # Two sockets may be bound to one port until one of them listens. A client that comes now waits for uvicorn.
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from error
    return listening
