"""What huggingface_hub and its HTTP client raise, as one line that says what to do.

huggingface_hub raises its own errors, those of its HTTP client (whose name differs between its
generations, so it is known here by its place in the class tree only), and plain ``RuntimeError``,
``ConnectionError`` and ``ValueError`` from the transfer of large files.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub import errors as theirs

from bake.errors import HubError, first_line

CLIENT_ERROR: type[Exception] = theirs.HfHubHTTPError.__bases__[0]
"""What the client raises for a connection that fails."""
RAISED = (CLIENT_ERROR, OSError, RuntimeError, ValueError, theirs.FileDuplicationError)
"""Everything that the client is known to raise for a failure of the Hub or of the network."""


def cause_of(error: BaseException) -> BaseException:
    """Return the failure of the Hub below an error that only says that something failed."""
    seen = error
    while _code(seen) is None and seen.__cause__ is not None:
        seen = seen.__cause__
    if _code(seen) is not None:
        return seen
    # subtle: the client reports a dead network as "not in the cache"; the cause says which.
    while isinstance(error, theirs.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """Return the status of the reply behind an error or its causes."""
    return _code(cause_of(error))


def retry_after(error: BaseException) -> str:
    """Return how many seconds a reply asks to wait; empty where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    return str(headers.get("Retry-After", ""))


def _code(error: BaseException) -> int | None:
    """Return the status of the reply to an error's request, or None where there was no reply."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


@contextmanager
def translated(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into one line that says what to do.

    Raises:
        HubError: in place of any failure of the Hub or the network.
    """
    try:
        yield
    except (CLIENT_ERROR, OSError) as error:
        raise _translate(error, repo, revision) from error


def _nobody(what: str, fix: str) -> HubError:
    error = HubError(what, fix=fix)
    error.unreachable = True
    return error


def _translate(error: BaseException, repo: str, revision: str | None) -> HubError:
    error, status = cause_of(error), status_of(error)
    page = f"{constants.ENDPOINT}/{repo}"
    login = "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, theirs.GatedRepoError):  # a kind of RepositoryNotFoundError
        return HubError(
            f"{repo} is gated and this account is not on its list",
            fix=f"accept the terms at {page}, then {login}",
        )
    if isinstance(error, theirs.RepositoryNotFoundError):
        return HubError(
            f"{repo} is not on the Hub, or your token cannot see it; nor is it a folder here",
            fix=f"check the name; for a private repository {login}",
        )
    if isinstance(error, theirs.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision!r}", fix=f"see {page}/commits")
    if isinstance(error, theirs.OfflineModeIsEnabled):
        return HubError(f"{repo} needs the Hub, which is switched off", fix="unset HF_HUB_OFFLINE")
    if status == 401:
        return HubError(f"the Hub does not accept your token for {repo}", fix=login)
    if status == 403:
        return HubError(f"your token has no right to read {repo}", fix=login)
    if status == 429:
        return HubError("the Hub limits the rate of your requests", fix="wait, then run again")
    if status is not None:
        return HubError(f"the Hub answered {status} for {repo}: {first_line(error)}")
    if "Timeout" in type(error).__name__:
        return _nobody(
            f"{constants.ENDPOINT} did not answer in time", fix="try again, or name a folder"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return HubError(f"{repo} cannot be stored in the cache: {first_line(error)}")
    return _nobody(
        f"cannot reach {constants.ENDPOINT}: {first_line(error)}",
        fix="check the network, or name a folder",
    )
