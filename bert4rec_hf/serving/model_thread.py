"""One thread that answers requests with a model, several at once if several wait."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from transformers.pipelines.base import pad_collate_fn

from ..model.pipeline import SequentialRecommendationPipeline

logger = logging.getLogger(__name__)

# Number of requests that are computed at once. benchmarks/results/server.md has the measurements.
MAX_BATCH_SIZE = 32
# After a batch of several requests, the next one waits for further requests for this share of the time that it took.
WAITED_SHARE = 0.1


@dataclass
class _Waiting:
    """A request that waits for the thread.

    Attributes:
        pipe: The pipeline that answers.
        inputs: The tensors of `SequentialRecommendationPipeline.preprocess`.
        options: Arguments of the pipeline's forward, beside `top_k`. Requests with the same options share a batch. With
            rules, requests share a batch only if `top_k` is the same too, since it decides the pool.
        top_k: Number of items.
        future: Gets the answer.
    """

    pipe: SequentialRecommendationPipeline
    inputs: dict[str, torch.Tensor]
    options: Mapping[str, Any]
    top_k: int
    future: Future = field(default_factory=Future)

    def key(self) -> list[int]:
        of_rules = [self.top_k] if "rules" in self.options else []
        return [id(self.pipe), *of_rules, *(id(self.options[name]) for name in sorted(self.options))]


@dataclass
class _Call:
    """A function that waits for the thread."""

    function: Callable[[], Any]
    future: Future = field(default_factory=Future)


class ModelThread:
    """Answers requests one batch after another. A batch has the requests that wait when the one before is done.

    If several clients ask, the thread waits for a tenth of the last batch's time for further requests, since the
    clients whose answers are on the way may ask again. A single client never waits. The answers are those of the
    pipeline.

    Args:
        max_waiting: Largest number of requests that wait. Further ones are refused.
        max_batch_size: Largest number of requests that are computed at once.
        on_batch: Called with the size of each batch.
    """

    def __init__(
        self,
        max_waiting: int = 256,
        max_batch_size: int = MAX_BATCH_SIZE,
        on_batch: Callable[[int], Any] = lambda size: None,
    ):
        self.waiting: queue.Queue[_Waiting | _Call | None] = queue.Queue(max_waiting)
        self.max_batch_size, self.on_batch = max_batch_size, on_batch
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def recommend(
        self, pipe: SequentialRecommendationPipeline, request: Any, top_k: int, **options: Any
    ) -> Future[tuple[list[dict[str, Any]], int]]:
        """Let the thread answer a request.

        Args:
            pipe: The pipeline that answers.
            request: A history, or a mapping with `history` and limits, as for the pipeline.
            top_k: Number of items.
            options: Further arguments of a call of the pipeline.

        Returns:
            The future answer of the pipeline, and the number of items of the request that the catalogue lacks.

        Raises:
            TypeError: If an argument is unknown.
            ValueError: If the request or an argument is wrong; see the pipeline.
            queue.Full: If too many requests wait.
        """
        before, forward, _ = pipe._sanitize_parameters(**options)
        waiting = _Waiting(pipe, pipe.preprocess(request, **before), forward, top_k)
        self.waiting.put_nowait(waiting)
        return waiting.future

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Let the thread call a function, such as one that uses the model in another way.

        Raises:
            queue.Full: If too many requests wait.
        """
        waiting = _Call(function)
        self.waiting.put_nowait(waiting)
        return waiting.future

    def stop(self) -> None:
        """Answer what waits, and end the thread."""
        self.waiting.put(None)
        self.thread.join()

    def _run(self) -> None:
        is_running, longest_wait = True, 0.0
        while is_running:
            batch = [self.waiting.get()]
            started = time.perf_counter()
            while len(batch) < self.max_batch_size:
                try:
                    batch.append(self.waiting.get(timeout=max(started + longest_wait - time.perf_counter(), 0)))
                except queue.Empty:
                    break
            started = time.perf_counter()
            is_running = None not in batch
            # A request whose client has given up is not computed.
            asked = [one for one in batch if one is not None and one.future.set_running_or_notify_cancel()]
            requests = sorted((one for one in asked if isinstance(one, _Waiting)), key=_Waiting.key)
            for _, group in groupby(requests, key=_Waiting.key):
                self._answer(list(group))
            for one in asked:
                if isinstance(one, _Call):
                    _settle(one.future, one.function)
            # The clients of this batch may ask again at once. A single client does not wait for itself.
            longest_wait = WAITED_SHARE * (time.perf_counter() - started) if len(batch) > 1 else 0.0

    def _answer(self, group: Sequence[_Waiting]) -> None:
        """Compute a batch. If this fails, each request is computed alone, so that none spoils the others' answers."""
        self.on_batch(len(group))
        if len(group) == 1:
            _settle(group[0].future, lambda: _compute(group)[0])
            return
        try:
            answers = _compute(group)
        except Exception:
            logger.warning("a batch of %d requests failed; each is computed alone", len(group), exc_info=True)
            for one in group:
                self._answer([one])
            return
        for one, answer in zip(group, answers, strict=True):
            one.future.set_result(answer)


def _compute(group: Sequence[_Waiting]) -> list[tuple[list[dict[str, Any]], int]]:
    pipe = group[0].pipe
    inputs = pad_collate_fn(pipe.tokenizer, None)([dict(one.inputs) for one in group])
    outputs = pipe.forward(inputs, top_k=max(one.top_k for one in group), **group[0].options)
    answers = []
    for place, one in enumerate(group):
        row = {name: values[place : place + 1] for name, values in outputs.items()}
        answer, num_unknown, _ = pipe.postprocess(row)
        answers.append((answer[: one.top_k], num_unknown))
    return answers


def _settle(future: Future, function: Callable[[], Any]) -> None:
    """Set a future to what a function returns or raises. An error must not end the thread."""
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
