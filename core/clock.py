"""Time of this process; rows get their times from the database's clock instead."""

import time
from typing import Protocol


class Clock(Protocol):
    """What code that waits or measures needs of time."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    def sleep(self, seconds: float) -> None:
        """Block for so long."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block for so long."""
        time.sleep(seconds)
