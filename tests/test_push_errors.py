"""Every failure of the Hub as one line: what happened, where, and what to do about it."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as theirs

from bake.checkpoints.hub_errors import CLIENT_ERROR
from bake.errors import HubError
from bake.publish import failures
from bake.publish.failures import Account, explain, explained, redact

ME = Account("alice/model", "alice", ("alice", "lab"))
SECRET = "hf_" + "Q" * 34


def reply(status: int, **headers: str) -> Any:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return SimpleNamespace(status_code=status, headers=named, request=None)


def of(kind: type[Any], status: int, said: str = "it says so", **headers: str) -> BaseException:
    """Return an error of the client as it raises it for a reply."""
    error: BaseException = kind.__new__(kind)
    error.args = (f"{status} Client Error. (Request ID: x)\n\n{said}",)
    error.response, error.server_message = reply(status, **headers), said  # type: ignore[attr-defined]
    return error


def caused(outer: BaseException, cause: BaseException) -> BaseException:
    outer.__cause__ = cause
    return outer


class ConnectTimeout(CLIENT_ERROR):  # type: ignore[misc, valid-type]
    """Named like what the client of either generation raises."""


HTTP = theirs.HfHubHTTPError
CASES: dict[str, tuple[BaseException, str, str]] = {
    "gated": (
        of(theirs.GatedRepoError, 403),
        "alice/model is gated and alice is not on its list",
        "accept the terms at https://huggingface.co/alice/model as alice",
    ),
    "missing, or private": (
        of(theirs.RepositoryNotFoundError, 404),
        "alice/model is not on the Hub, or your token cannot see it",
        "check the name",
    ),
    "disabled": (
        of(theirs.DisabledRepoError, 403, "Access to this resource is disabled."),
        "the Hub has disabled alice/model: Access to this resource is disabled.",
        "see https://huggingface.co/alice/model",
    ),
    "no such revision": (
        of(theirs.RevisionNotFoundError, 404, "Invalid rev id: x"),
        "alice/model has no such branch or commit: Invalid rev id: x",
        "/commits",
    ),
    "no such file": (
        of(theirs.RemoteEntryNotFoundError, 404, "Entry not found"),
        "alice/model lacks a file: Entry not found",
        "/tree/main",
    ),
    "no token": (
        theirs.LocalTokenNotFoundError("Token is required"),
        "there is no token of the Hub on this machine",
        "run `hf auth login` or set HF_TOKEN",
    ),
    "a token that is none": (of(HTTP, 401), "the Hub does not accept your token", "hf auth login"),
    "no rights": (
        of(HTTP, 403, "You don't have the rights"),
        "alice may not write to alice/model: You don't have the rights",
        "a namespace of yours (alice, lab), or --create-pr",
    ),
    "busy": (of(HTTP, 409, "another operation"), "the Hub is busy with alice/model", "wait"),
    "somebody was faster": (
        of(HTTP, 412),
        "somebody has committed to alice/model since; nothing was changed",
        "then run again",
    ),
    "too many requests": (
        of(HTTP, 429, Retry_After="17"),
        "the Hub limits the rate of your requests; it asks for 17 s",
        "wait",
    ),
    "too many requests, no word of how long": (
        of(HTTP, 429),
        "the Hub limits the rate of your requests",
        "wait",
    ),
    "the Hub is down": (of(HTTP, 503), "the Hub answered 503 for alice/model", "run the same"),
    "something new": (
        of(HTTP, 418, "a teapot"),
        "the Hub answered 418 for alice/model: a teapot",
        "",
    ),
    "Xet, verification": (
        RuntimeError("Internal error: verification failed\nat line 3"),
        "the transfer with alice/model broke off: Internal error: verification failed",
        "HF_HUB_DISABLE_XET=1",
    ),
    "Xet, connection": (
        ConnectionError("connection reset"),
        "the transfer with alice/model broke off: connection reset",
        "run the same command again",
    ),
    "LFS, with a reply below it": (
        caused(RuntimeError("Error while uploading 'x' to the Hub."), of(HTTP, 403, "no")),
        "alice may not write to alice/model: no",
        "--create-pr",
    ),
    "force_download hides the cause": (
        caused(
            ValueError("Force download failed due to the above error."),
            of(theirs.GatedRepoError, 403),
        ),
        "alice/model is gated",
        "accept the terms",
    ),
    "nobody answers": (
        CLIENT_ERROR("[Errno 111] Connection refused"),
        "cannot reach https://huggingface.co: [Errno 111] Connection refused",
        "run the same",
    ),
    "too late": (
        ConnectTimeout("timed out"),
        "https://huggingface.co did not answer in time",
        "run the same",
    ),
    "not in the cache, because there is no network": (
        caused(theirs.LocalEntryNotFoundError("not in the cache"), CLIENT_ERROR("no route")),
        "cannot reach https://huggingface.co: no route",
        "run the same",
    ),
    "switched off": (
        theirs.OfflineModeIsEnabled("offline"),
        "publishing needs the Hub, which is switched off",
        "unset HF_HUB_OFFLINE",
    ),
}


@pytest.fixture(autouse=True)
def _the_public_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures.constants, "ENDPOINT", "https://huggingface.co")


@pytest.mark.parametrize("case", CASES)
def test_each_failure_is_one_line(case: str) -> None:
    error, what, fix = CASES[case]
    found = explain(error, ME, "committing")
    assert found.what.startswith(what), found.what
    assert found.exit_code == 5 and found.where == "while committing"
    assert found.fix is not None and fix in found.fix
    assert "\n" not in found.what + found.fix


def test_what_may_not_be_read_is_not_called_writing() -> None:
    text = explain(of(HTTP, 403, "no"), ME, "downloading model.safetensors").what
    assert text == "alice may not read alice/model: no"


@pytest.mark.parametrize("status", [403, 409, 418])
def test_no_failure_repeats_a_token(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers and proxies echo headers; whatever they say, the token is cut out of it."""
    plain = "not-like-a-token-at-all-1234"
    monkeypatch.setenv("HF_TOKEN", plain)
    for secret in (SECRET, plain, "Bearer abcdef"):
        with pytest.raises(HubError) as caught, explained(ME, "asking"):
            raise of(HTTP, status, f"you sent {secret}")
        assert secret not in str(caught.value) and "you sent <token>" in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert redact("plain words") == "plain words"  # the control
