"""What the Hub's client raises while publishing, as one line that says what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import constants, get_token
from huggingface_hub import errors as theirs

from bake.checkpoints.hub_errors import CLIENT_ERROR, RAISED, cause_of, retry_after, status_of
from bake.errors import HubError, first_line

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}|(?i:bearer)\s+\S+")
_LOGIN = "run `hf auth login` or set HF_TOKEN"
_AGAIN = "run the same command again: what arrived is not sent twice"


@dataclass(frozen=True, slots=True)
class Account:
    """Who is publishing, and where to."""

    repo: str
    name: str
    namespaces: tuple[str, ...]

    @property
    def page(self) -> str:
        """The repository's address."""
        return f"{constants.ENDPOINT}/{self.repo}"


def redact(text: str) -> str:
    """Return a text without the token and without what looks like one."""
    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


@contextmanager
def explained(account: Account, doing: str) -> Iterator[None]:
    """Turn what the client raises into a ``HubError`` of one line.

    The original is not shown below it: its text and its request could hold the token.

    Args:
        account: who publishes what.
        doing: what is being done, to continue "while".

    Raises:
        HubError: in place of any failure of the Hub or of the network.
    """
    try:
        yield
    except RAISED as error:
        failure = explain(error, account, doing)
    # What the client raises where it takes an answer apart that has another form.
    except (AttributeError, LookupError, TypeError) as error:
        failure = HubError(
            f"the answer of {constants.ENDPOINT} is none that huggingface_hub reads: "
            f"{type(error).__name__}",
            where=f"while {doing}",
            fix="check that HF_ENDPOINT is a Hub, and whether there is a newer huggingface_hub",
        )
    else:
        return
    raise failure from None


def explain(error: BaseException, account: Account, doing: str) -> HubError:
    """Return the error that says what happened, where and what to do."""
    cause = cause_of(error)
    if status_of(cause) is None:
        what, fix = _plain(cause, account)
    else:
        reading = doing.startswith(("reading", "downloading"))
        what, fix = _status(cause, account, reading=reading)
    return HubError(redact(what), where=f"while {doing}", fix=redact(fix))


def _status(error: BaseException, account: Account, *, reading: bool) -> tuple[str, str]:
    """Explain a reply of the Hub by its class and its status."""
    repo, status = account.repo, status_of(error)
    if isinstance(error, theirs.GatedRepoError):
        return f"{repo} is gated and {account.name} is not on its list", (
            f"accept the terms at {account.page} as {account.name}"
        )
    if isinstance(error, theirs.DisabledRepoError):
        return f"the Hub has disabled {repo}: {_said(error)}", f"see {account.page}"
    if isinstance(error, theirs.RevisionNotFoundError):
        return f"{repo} has no such branch or commit: {_said(error)}", (
            f"see {account.page}/commits"
        )
    if isinstance(error, theirs.RemoteEntryNotFoundError):
        return f"{repo} lacks a file: {_said(error)}", f"see {account.page}/tree/main"
    if isinstance(error, theirs.RepositoryNotFoundError) or status == 404:
        return f"{repo} is not on the Hub, or your token cannot see it", f"check the name; {_LOGIN}"
    if status == 401:
        return "the Hub does not accept your token", _LOGIN
    if status == 403 and reading:
        return f"{account.name} may not read {repo}: {_said(error)}", (
            f"use a token that can read it: {_LOGIN}"
        )
    if status == 403:
        spaces = ", ".join(account.namespaces) or account.name
        return (
            f"{account.name} may not write to {repo}: {_said(error)}",
            f"use a token with write access, or a namespace of yours ({spaces}), or --create-pr",
        )
    if status == 412:
        return (
            f"somebody has committed to {repo} since; nothing was changed",
            f"look at {account.page}/commits, then run again",
        )
    if status == 409:
        return f"the Hub is busy with {repo}: {_said(error)}", "wait a minute, then run again"
    if status == 429:
        wait = retry_after(error)
        asked = f"; it asks for {wait} s" if wait else ""
        return f"the Hub limits the rate of your requests{asked}", "wait, then run again"
    if status is not None and status >= 500:
        return f"the Hub answered {status} for {repo}", _AGAIN
    return f"the Hub answered {status} for {repo}: {_said(error)}", "see what it says"


def _plain(error: BaseException, account: Account) -> tuple[str, str]:
    """Explain a failure without a reply: no token, no network, a transfer that broke."""
    if isinstance(error, theirs.LocalTokenNotFoundError):
        return "there is no token of the Hub on this machine", _LOGIN
    if isinstance(error, theirs.OfflineModeIsEnabled):
        return "publishing needs the Hub, which is switched off", "unset HF_HUB_OFFLINE"
    if "Timeout" in type(error).__name__:
        return f"{constants.ENDPOINT} did not answer in time", _AGAIN
    if isinstance(error, CLIENT_ERROR):
        return f"cannot reach {constants.ENDPOINT}: {first_line(error)}", _AGAIN
    return (
        f"the transfer with {account.repo} broke off: {first_line(error)}",
        f"{_AGAIN}; HF_HUB_DISABLE_XET=1 avoids the transfer by chunks",
    )


def _said(error: BaseException) -> str:
    """Return what the server itself said, in one line."""
    return getattr(error, "server_message", None) or first_line(error)
