"""The client that is awaited."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, assert_never

import anyio
import httpx
from anyio.to_thread import run_sync

from kdpo.calls import AsyncCalls
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


class AsyncJobs(JobCalls, AsyncCalls):
    """Jobs of all kinds."""


class AsyncDatasets(DatasetCalls, AsyncCalls):
    """Datasets."""


class AsyncRecommendations(RecommendationCalls, AsyncCalls):
    """Recommendations."""


class AsyncCheckpoints(CheckpointCalls, AsyncCalls):
    """Checkpoints."""


class AsyncEvaluations(EvaluationCalls, AsyncCalls):
    """Evaluations."""


class AsyncClient(WorkflowCalls, AsyncCalls):
    """As `Client`: calls are awaited, and lists and `watch` are read with `async for`."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        to = address(base_url, api_key, timeout_s=timeout_s, max_retries=max_retries)
        self._http = httpx.AsyncClient(**httpx_options(to), transport=transport)
        driver = Driver(to, self._http)
        super().__init__(driver)
        self.base_url = to.base_url
        self.jobs = AsyncJobs(driver)
        self.datasets = AsyncDatasets(driver)
        self.recommendations = AsyncRecommendations(driver)
        self.checkpoints = AsyncCheckpoints(driver)
        self.evaluations = AsyncEvaluations(driver)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


@dataclass
class _Stream:
    response: httpx.Response
    chunks: AsyncIterator[bytes]

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def headers(self) -> Any:
        return headers_of(self.response)


class Driver:
    """Performs flows by awaiting; what blocks runs in a thread."""

    def __init__(self, to: Address, http: httpx.AsyncClient) -> None:
        self.policy = to.policy
        self._to = to
        self._http = http

    async def run(self, flow: Flow[T]) -> T:
        """Return what a flow returns."""
        steps = Steps(flow)
        async with AsyncExitStack() as opened:
            while (effect := steps.next()) is not None:
                assert not isinstance(effect, Emit), "a flow that emits is iterated over"
                with steps:
                    steps.value = await self._perform(effect, opened)
        return steps.result

    async def iterate(self, items: Items[T]) -> AsyncIterator[T]:
        """Yield what a flow emits."""
        steps = Steps(items)
        async with AsyncExitStack() as opened:
            while (effect := steps.next()) is not None:
                if isinstance(effect, Emit):
                    yield effect.item
                else:
                    with steps:
                        steps.value = await self._perform(effect, opened)

    async def _perform(self, effect: Effect, opened: AsyncExitStack) -> Any:
        match effect:
            case Send():
                return await self._send(effect.request)
            case Open():
                return await self._open(effect.request, opened)
            case Read():
                return await self._read(effect.stream)
            case Close():
                await self._http_stream(effect.stream).response.aclose()
                return None
            case Sleep():
                await anyio.sleep(effect.seconds)
                return None
            case Run():
                return await run_sync(effect.function)
            case Together():
                return await self._together(effect)
            case _:
                assert_never(effect)

    async def _send(self, request: Request) -> Reply:
        with ExitStack() as files:
            file = None if request.file is None else open_file(request.file)
            if file is not None:
                files.callback(file.close)
            try:
                response = await self._http.request(**httpx_request(self._to, request, file))
            except httpx.TransportError as error:
                raise broken(self._to, error) from error
            return reply_of(response)

    async def _open(self, request: Request, opened: AsyncExitStack) -> _Stream:
        made = self._http.build_request(**httpx_request(self._to, request, None))
        try:
            response = await self._http.send(made, stream=True)
        except httpx.TransportError as error:
            raise broken(self._to, error) from error
        opened.push_async_callback(response.aclose)
        return _Stream(response, response.aiter_raw())

    async def _read(self, stream: object) -> bytes:
        try:
            return await anext(self._http_stream(stream).chunks, b"")
        except httpx.TransportError as error:
            raise broken(self._to, error) from error

    def _http_stream(self, stream: object) -> _Stream:
        assert isinstance(stream, _Stream)
        return stream

    async def _together(self, effect: Together) -> list[Any]:
        values: list[Any] = [None] * len(effect.flows)
        limiter = anyio.CapacityLimiter(effect.limit)

        async def one(position: int, flow: Flow[Any]) -> None:
            async with limiter:
                values[position] = await self.run(flow)

        try:
            async with anyio.create_task_group() as group:
                for position, flow in enumerate(effect.flows):
                    group.start_soon(one, position, flow)
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        return values


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that has ended the others; a group is an affair of this module."""
    found: BaseException = failures
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
