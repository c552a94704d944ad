"""The Hub's client with what it lacks: patience that ends, and the card checked where it goes."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub import errors as theirs
from huggingface_hub.utils import (  # type: ignore[attr-defined] # exported at run time only
    _http,  # for the factory that it starts with, the same in both generations
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from bake import __version__
from bake.checkpoints.hub_errors import CLIENT_ERROR
from bake.errors import HubError
from bake.publish.failures import RAISED, redact, status_of

T = TypeVar("T")

ATTEMPTS = 4
"""How often a call is made whose failure may pass."""
DEADLINE = 300.0
"""Seconds that the creation of a repository may take in all."""
_LONGEST_WAIT = 60.0


def client() -> HfApi:
    """Return a client that says who it is; it looks the token up by itself."""
    return HfApi(library_name="bake", library_version=__version__)


def refuse_offline() -> None:
    """Refuse to publish while the Hub is switched off.

    Raises:
        HubError: it is.
    """
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            "publishing needs the Hub, which is switched off", fix="unset HF_HUB_OFFLINE"
        )


@contextmanager
def listening(timeout: float) -> Iterator[list[str]]:
    """Have the client give up on a server that accepts a request and never answers.

    Yields:
        a list that holds the client's remarks on the card afterwards.
    """

    def factory() -> Any:
        made = _http.default_client_factory()
        made.timeout = timeout
        return made

    said: list[str] = []
    set_client_factory(factory)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
    finally:
        set_client_factory(_http.default_client_factory)
    said += [redact(str(w.message)) for w in warned if "metadata" in str(w.message)]


def patiently(call: Callable[[], T]) -> T:
    """Return what an idempotent call returns, trying again when its failure may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except RAISED as error:
            wait = pause(error, attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def pause(error: BaseException, attempt: int) -> float | None:
    """Return how long to wait before another attempt, or None when none would help."""
    status = status_of(error)
    if status is None:
        # No reply at all. "Offline" is a ConnectionError of the client's own making, and so is "not
        # in the cache", which stands for a download that found no network.
        if isinstance(error, theirs.LocalEntryNotFoundError) and error.__cause__ is not None:
            return pause(error.__cause__, attempt)
        lost = isinstance(error, CLIENT_ERROR) and type(error).__name__ != "OfflineModeIsEnabled"
        return float(2**attempt) if lost else None
    if status == 429:
        headers = getattr(getattr(error, "response", None), "headers", {})
        asked = str(headers.get("Retry-After", ""))
        wait = float(asked) if asked.isdigit() else float(2**attempt)
        return wait if wait <= _LONGEST_WAIT else None
    return float(2**attempt) if status >= 500 and status != 501 else None


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what a call returns, or give up on it: the client asks again for ever on some replies.

    Raises:
        HubError: it has not returned in time.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except RAISED as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise HubError(
            f"the Hub did not create the repository within {seconds:.0f} s", fix="run again"
        )
    if "error" in outcome:
        raise outcome["error"]
    return outcome.get("value")


def card_errors(card: str) -> list[str]:
    """Return what the Hub objects to in a card, one line each.

    The client asks this too, but only when it commits, or (1.x) at the public Hub whatever the
    endpoint is.
    """
    headers = build_hf_headers(library_name="bake", library_version=__version__)
    response = get_session().post(
        f"{constants.ENDPOINT}/api/validate-yaml",
        json={"content": card, "repoType": "model"},
        headers=headers,
    )
    if response.status_code != 400:
        hf_raise_for_status(response)
    found = response.json().get("errors") or []
    return [" ".join(str(error.get("message", error)).split()) for error in found]
