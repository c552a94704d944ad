"""Patience with the Hub that ends: a call is made again where its failure may pass."""

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import OfflineModeIsEnabled

from bake.checkpoints.hub_errors import CLIENT_ERROR, RAISED, cause_of, retry_after, status_of

T = TypeVar("T")

_ATTEMPTS = 4
LONGEST_WAIT = 60.0
"""Seconds between two attempts, however many a server asks for."""


def patiently(call: Callable[[], T]) -> T:
    """Return what an idempotent call returns, trying again when its failure may pass."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except RAISED as error:
            wait = _pause(error, attempt)
            if wait is None or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _pause(error: BaseException, attempt: int) -> float | None:
    """Return how long to wait before another attempt, or None when none would help."""
    status = status_of(error)
    if status is None:
        # No reply at all. "Offline" is a ConnectionError of the client's own making.
        cause = cause_of(error)
        lost = isinstance(cause, CLIENT_ERROR) and not isinstance(cause, OfflineModeIsEnabled)
        return float(2**attempt) if lost else None
    if status == 429:
        asked = retry_after(error)
        wait = float(asked) if asked.isdigit() else float(2**attempt)
        return wait if wait <= LONGEST_WAIT else None
    return float(2**attempt) if status == 408 or (status >= 500 and status != 501) else None
