"""One definition of a call for both clients: a method that is a flow, run or awaited."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from kdpo.flows import Flow, Items
from kdpo.sending import Policy

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class SyncDriver(Protocol):
    """Performs flows by blocking."""

    policy: Policy

    def run(self, flow: Flow[T]) -> T:
        """Return what a flow returns."""

    def iterate(self, items: Items[T]) -> Iterator[T]:
        """Yield what a flow emits."""


class AsyncDriver(Protocol):
    """Performs flows by awaiting."""

    policy: Policy

    async def run(self, flow: Flow[T]) -> T:
        """Return what a flow returns."""

    def iterate(self, items: Items[T]) -> AsyncIterator[T]:
        """Yield what a flow emits."""


class SyncCalls:
    """Calls that block."""

    def __init__(self, driver: SyncDriver) -> None:
        self._driver = driver

    @property
    def _policy(self) -> Policy:
        return self._driver.policy


class AsyncCalls:
    """Calls that are awaited."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver

    @property
    def _policy(self) -> Policy:
        return self._driver.policy


class HasPolicy(Protocol):
    """What a call needs of the client that it belongs to."""

    @property
    def _policy(self) -> Policy: ...


class call(Generic[S, P, T]):  # noqa: N801 - a decorator
    """A method that returns a flow: it returns the flow's result, or an awaitable of it."""

    def __init__(self, function: Callable[Concatenate[S, P], Flow[T]]) -> None:
        self._function = function
        functools.update_wrapper(cast(Any, self), function)

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> "call[S, P, T]": ...
    @overload
    def __get__(self, instance: SyncCalls, owner: type[Any]) -> Callable[P, T]: ...
    @overload
    def __get__(self, instance: AsyncCalls, owner: type[Any]) -> Callable[P, Awaitable[T]]: ...
    def __get__(
        self, instance: Any, owner: type[Any]
    ) -> "Callable[P, T] | Callable[P, Awaitable[T]] | call[S, P, T]":
        if instance is None:
            return self
        bound = self._function.__get__(instance, owner)
        driver: SyncDriver | AsyncDriver = instance._driver

        @functools.wraps(bound)
        def perform(*args: P.args, **kwargs: P.kwargs) -> Any:
            return driver.run(bound(*args, **kwargs))

        return perform


class listing(Generic[S, P, T]):  # noqa: N801 - a decorator
    """A method whose flow emits items: it returns an iterator of them, or an async one."""

    def __init__(self, function: Callable[Concatenate[S, P], Items[T]]) -> None:
        self._function = function
        functools.update_wrapper(cast(Any, self), function)

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> "listing[S, P, T]": ...
    @overload
    def __get__(self, instance: SyncCalls, owner: type[Any]) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, instance: AsyncCalls, owner: type[Any]) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(
        self, instance: Any, owner: type[Any]
    ) -> "Callable[P, Iterator[T]] | Callable[P, AsyncIterator[T]] | listing[S, P, T]":
        if instance is None:
            return self
        bound = self._function.__get__(instance, owner)
        driver: SyncDriver | AsyncDriver = instance._driver

        @functools.wraps(bound)
        def iterate(*args: P.args, **kwargs: P.kwargs) -> Any:
            return driver.iterate(bound(*args, **kwargs))

        return iterate
