"""The Hub's client with what it lacks: timeouts, and the card checked where it goes."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import (  # type: ignore[attr-defined] # exported at run time only
    _http,  # for the factory that it starts with, the same in both generations
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from bake import __version__
from bake.checkpoints.hub_errors import RAISED
from bake.checkpoints.hub_patience import LONGEST_WAIT
from bake.errors import HubError
from bake.publish.failures import redact

_DEADLINE = 300.0  # seconds that the creation of a repository may take in all
_LEAST_RATE = 1000.0  # bytes a second


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

    Nor does it wait for an answer that comes byte by byte, or for as long as a server likes: the
    client itself knows neither limit, and repeats a request after any ``Retry-After``.

    Args:
        timeout: seconds without a byte, and seconds for an answer, one more for every kilobyte.

    Yields:
        a list that holds the client's remarks on the card afterwards.
    """

    def factory() -> Any:
        made = _http.default_client_factory()
        made.timeout = timeout
        hooks = {**made.event_hooks}
        made.event_hooks = {
            **hooks,
            "response": [*hooks["response"], _soon, lambda response: _flowing(response, timeout)],
        }
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


def _soon(response: Any) -> None:
    """Refuse to wait longer than ``patiently`` does.

    Raises:
        HubError: the reply asks for it.
    """
    asked = str(response.headers.get("Retry-After", ""))
    if response.status_code in (429, 503) and asked.isdigit() and int(asked) > LONGEST_WAIT:
        raise HubError(
            f"the Hub asks to wait {int(asked):,} s before the next request",
            why=f"it answered {response.status_code}, and bake waits {LONGEST_WAIT:.0f} s at most",
            fix="run the same command again then: what arrived is not sent twice",
        )


def _flowing(response: Any, timeout: float) -> None:
    """Have the reading of a reply end that does not arrive at a kilobyte a second."""
    read = response.iter_raw

    def iter_raw(*args: Any, **options: Any) -> Iterator[bytes]:
        began, received = time.monotonic(), 0
        for part in read(*args, **options):
            received += len(part)
            if time.monotonic() - began > timeout + received / _LEAST_RATE:
                raise HubError(
                    f"the Hub sent {received:,} bytes of an answer in {timeout:g} s",
                    fix="see to the network, or allow more with --timeout",
                )
            yield part

    response.iter_raw = iter_raw


def in_time(create: Callable[[], object]) -> None:
    """Create a repository, or give up on it: the client asks again for ever on some replies.

    Raises:
        HubError: it has not returned in time.
    """
    outcome: Future[object] = Future()

    def run() -> None:
        try:
            outcome.set_result(create())
        except RAISED as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_DEADLINE)
    if thread.is_alive():
        raise HubError(
            f"the Hub did not create the repository within {_DEADLINE:.0f} s", fix="run again"
        )
    outcome.result(timeout=0)


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
