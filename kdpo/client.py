"""The client that blocks."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, assert_never

import httpx

from kdpo.calls import SyncCalls
from kdpo.errors import KdpoClientError
from kdpo.evaluations import EvaluationCalls
from kdpo.flows import (
    Close,
    Effect,
    Emit,
    Flow,
    Items,
    Open,
    Read,
    Reply,
    Request,
    Run,
    Send,
    Sleep,
    Steps,
    Together,
)
from kdpo.resources import CheckpointCalls, DatasetCalls, JobCalls, RecommendationCalls
from kdpo.transport import (
    Address,
    address,
    broken,
    headers_of,
    httpx_options,
    httpx_request,
    open_file,
    reply_of,
)
from kdpo.workflows import WorkflowCalls

T = TypeVar("T")


class Jobs(JobCalls, SyncCalls):
    """Jobs of all kinds."""


class Datasets(DatasetCalls, SyncCalls):
    """Datasets."""


class Recommendations(RecommendationCalls, SyncCalls):
    """Recommendations."""


class Checkpoints(CheckpointCalls, SyncCalls):
    """Checkpoints."""


class Evaluations(EvaluationCalls, SyncCalls):
    """Evaluations."""


class Client(WorkflowCalls, SyncCalls):
    """A client of one kdpo server; it may be used from several threads.

    Without arguments it asks `KDPO_BASE_URL` (http://127.0.0.1:8321 when that is not set) with the
    key `KDPO_API_KEY`. `timeout_s` is for each answer, not for jobs. Requests that can be repeated
    without harm are tried `max_retries` times more. `transport` is httpx's, for proxies and tests.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        to = address(base_url, api_key, timeout_s=timeout_s, max_retries=max_retries)
        self._http = httpx.Client(**httpx_options(to), transport=transport)
        driver = Driver(to, self._http)
        super().__init__(driver)
        self.base_url = to.base_url
        self.jobs = Jobs(driver)
        self.datasets = Datasets(driver)
        self.recommendations = Recommendations(driver)
        self.checkpoints = Checkpoints(driver)
        self.evaluations = Evaluations(driver)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Stopped(KdpoClientError):
    """Another flow beside this one has failed."""


@dataclass
class _Stream:
    response: httpx.Response
    chunks: Iterator[bytes]

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def headers(self) -> Any:
        return headers_of(self.response)


class Driver:
    """Performs flows with calls that block."""

    def __init__(self, to: Address, http: httpx.Client) -> None:
        self.policy = to.policy
        self._to = to
        self._http = http

    def run(self, flow: Flow[T], stop: threading.Event | None = None) -> T:
        """Return what a flow returns."""
        steps = Steps(flow)
        with ExitStack() as opened:
            while (effect := steps.next()) is not None:
                assert not isinstance(effect, Emit), "a flow that emits is iterated over"
                with steps:
                    if stop is not None and stop.is_set():
                        raise _Stopped("a flow beside this one has failed")
                    steps.value = self._perform(effect, opened)
        return steps.result

    def iterate(self, items: Items[T]) -> Iterator[T]:
        """Yield what a flow emits."""
        steps = Steps(items)
        with ExitStack() as opened:
            while (effect := steps.next()) is not None:
                if isinstance(effect, Emit):
                    yield effect.item
                else:
                    with steps:
                        steps.value = self._perform(effect, opened)

    def _perform(self, effect: Effect, opened: ExitStack) -> Any:
        match effect:
            case Send():
                return self._send(effect.request)
            case Open():
                return self._open(effect.request, opened)
            case Read():
                return self._read(effect.stream)
            case Close():
                self._http_stream(effect.stream).response.close()
                return None
            case Sleep():
                time.sleep(effect.seconds)
                return None
            case Run():
                return effect.function()
            case Together():
                return self._together(effect)
            case _:
                assert_never(effect)

    def _send(self, request: Request) -> Reply:
        with ExitStack() as files:
            file = None if request.file is None else open_file(request.file)
            if file is not None:
                files.callback(file.close)
            try:
                return reply_of(self._http.request(**httpx_request(self._to, request, file)))
            except httpx.TransportError as error:
                raise broken(self._to, error) from error

    def _open(self, request: Request, opened: ExitStack) -> _Stream:
        made = self._http.build_request(**httpx_request(self._to, request, None))
        try:
            response = self._http.send(made, stream=True)
        except httpx.TransportError as error:
            raise broken(self._to, error) from error
        opened.callback(response.close)
        return _Stream(response, response.iter_raw())

    def _read(self, stream: object) -> bytes:
        try:
            return next(self._http_stream(stream).chunks, b"")
        except httpx.TransportError as error:
            raise broken(self._to, error) from error

    def _http_stream(self, stream: object) -> _Stream:
        assert isinstance(stream, _Stream)
        return stream

    def _together(self, effect: Together) -> list[Any]:
        stop = threading.Event()
        with ThreadPoolExecutor(effect.limit, "kdpo") as pool:
            futures: list[Future[Any]] = []
            try:
                futures = [pool.submit(self.run, flow, stop) for flow in effect.flows]
                wait_for(futures, return_when=FIRST_EXCEPTION)
            finally:
                if any(not future.done() for future in futures):
                    stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        failed = [f.exception() for f in futures if not f.cancelled() and f.exception() is not None]
        for error in sorted(failed, key=lambda found: isinstance(found, _Stopped)):
            if error is not None:
                raise error
        return [future.result() for future in futures]
