"""``push``: an artifact becomes one commit of a repository on the Hub.

The order is what makes it safe. Everything that can be refused is refused before the first byte is
sent; the repository is private until its contents are known to be right; the commit names its
parent, so that of two runs at most one succeeds and a reply that is lost can be looked up; the tag
and the public view come last. Every step may be repeated, and a run after an interrupted one takes
it up.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from bake import __version__
from bake.artifact.destination import UNVERIFIED, VERIFIED, Destination, Pushed
from bake.artifact.frontmatter import card_metadata, read_card
from bake.atomic import write_atomically
from bake.cards import licences
from bake.errors import HubError
from bake.progress import Progress
from bake.publish.commit import Committed, GuardedCommit, Parts, find_pull_request, parts_of
from bake.publish.download import compare_download
from bake.publish.failures import explained, redact
from bake.publish.hub import (
    Head,
    Hub,
    base_tree,
    check_head,
    create_branch,
    create_repository,
    create_tag,
    read_base,
    read_head,
    show,
    sign_in,
)
from bake.publish.options import PushOptions
from bake.publish.others import keep_others
from bake.publish.preflight import Terms, check_terms
from bake.publish.prepare import Prepared, prepare_push
from bake.publish.remote import differences
from bake.publish.session import card_errors, listening, refuse_offline
from bake.seal.seal import raise_problems

Remark = Callable[[str], None]


def push(
    folder: Path,
    options: PushOptions,
    *,
    progress: Progress | None = None,
    remark: Remark = lambda text: None,
) -> Pushed:
    """Publish an artifact.

    Args:
        folder: what ``bake export`` wrote.
        options: where to, and under which terms.
        progress: called with the bytes that are hashed and their total.
        remark: called with what is being done.

    Raises:
        InputError: the artifact must not be published as it is.
        HubError: the Hub refuses, fails or holds other bytes than were sent.
    """
    if not options.dry_run:
        refuse_offline()
    ready = prepare_push(folder, options, progress, remark)
    unasked = "the Hub is switched off and was not asked" if constants.HF_HUB_OFFLINE else ""
    if huggingface_hub.get_token() is None:
        unasked = unasked or "the Hub was not asked: there is no token of it on this machine"
    if options.dry_run and unasked:
        return _would(_noted(ready, unasked), options.to, Parts((), (), ()), account="")
    with listening(options.timeout) as said:
        hub = sign_in(options.to, remark)
        ready = under_terms(hub, ready, options.terms)
        head = read_head(hub)
        check_head(head, hub.to)
        hub, head, kept = keep_others(hub, head, ready.manifest, force_card=options.force_card)
        if kept:
            ready = _noted(ready, f"kept, since bake did not put it there: {', '.join(kept)}")
        if options.dry_run:
            pushed = _rehearsed(ready, hub, head)
        else:
            head = create_repository(hub) if head.commit is None else head
            pushed = complete(ready, hub, head, download=options.download)
    return replace(pushed, notes=(*pushed.notes, *said))


def _noted(ready: Prepared, *notes: str) -> Prepared:
    return replace(ready, notes=(*ready.notes, *notes))


def under_terms(hub: Hub, ready: Prepared, terms: Terms) -> Prepared:
    """Ask for the base's licence, of the Hub where the base is there, and hold the artifact to it.

    Returns:
        what is published, with what of the base's terms concerns the commit and the user.

    Raises:
        InputError: the licence does not permit it.
        HubError: the Hub refuses or fails.
    """
    gated = ""
    if ready.record.base.on_hub:
        info = read_base(hub, ready.record.base)
        card = {} if info.card_data is None else dict(vars(info.card_data))
        gated = info.gated if isinstance(info.gated, str) else ""
    else:
        path = ready.record.base.path
        text = read_card(ready.folder / path) if path is not None else None
        card = {} if text is None else card_metadata(text)
    base = licences.stated(card)
    raise_problems(
        check_terms(ready.checked, terms, base=base, repo=hub.to.repo), str(ready.folder)
    )
    notes = [base.known.remark] if base.known is not None and base.known.remark else []
    notes += [f"the base is gated ({gated}): keep to its terms"] if gated else []
    return replace(_noted(ready, *notes), gated=gated)


def complete(ready: Prepared, hub: Hub, head: Head, *, download: bool) -> Pushed:
    """Commit, compare, tag, show, and write the receipt.

    Args:
        ready: what is published.
        hub: where.
        head: the state of the repository, which exists.
        download: compare every byte that the Hub sends back, too.

    Raises:
        InputError: a file has changed since it was checked; nothing is committed.
        HubError: the Hub refuses or fails, or holds other bytes than were sent.
    """
    assert head.commit is not None
    parts = parts_of(ready.manifest, head.tree, {})
    made = Committed(head.commit, None, (), ()) if parts.empty else _commit(ready, hub, head)
    _compare(ready, hub, made.commit)
    sent = bool(made.uploaded or made.copied)
    pushed = replace(
        _nothing_done(ready, hub.to, hub.account.name),
        url=made.pull_request or f"{hub.account.page}/commit/{made.commit}",
        commit=made.commit,
        pull_request=made.pull_request,
        public=not head.private,
        outcome=UNVERIFIED,
        uploaded=made.uploaded,
        copied=made.copied,
        deleted=parts.delete if sent else (),
        unchanged=not (sent or parts.delete),
    )
    if download:
        _check_download(ready, hub, pushed)
        pushed = replace(pushed, outcome=VERIFIED)
    if not hub.to.pull_request:
        create_tag(hub, ready.tag, made.commit)
        pushed = replace(pushed, tag=ready.tag)
    return _with_receipt(ready, replace(pushed, public=show(hub, head, gated=ready.gated)))


def _nothing_done(ready: Prepared, to: Destination, account: str) -> Pushed:
    """Return a push of which nothing is done yet."""
    return Pushed(
        repo=to.repo,
        digest=ready.manifest.digest,
        plan_digest=ready.record.plan.digest,
        endpoint=constants.ENDPOINT,
        account=account,
        public=to.public,
        unverified=ready.checked.unverified,
        ungated=ready.checked.ungated,
        notes=ready.notes,
    )


def _rehearsed(ready: Prepared, hub: Hub, head: Head) -> Pushed:
    """Return what would be done; nothing is written, here or there."""
    parts = parts_of(ready.manifest, head.tree, base_tree(hub, ready.record.base))
    if head.commit is None:
        ready = _noted(ready, f"{hub.to.repo} would be created, private")
    return _would(ready, hub.to, parts, account=hub.account.name)


def _would(ready: Prepared, to: Destination, parts: Parts, *, account: str) -> Pushed:
    return replace(
        _nothing_done(ready, to, account),
        tag=ready.tag,
        uploaded=tuple(file.name for file in parts.add),
        copied=tuple(file.name for file, _ in parts.copy),
        deleted=parts.delete,
        unchanged=parts.empty,
        dry_run=True,
    )


def _commit(ready: Prepared, hub: Hub, head: Head) -> Committed:
    """Upload and commit, on the head that was read; or return the pull request that is there."""
    assert head.commit is not None
    record = ready.record
    parts = parts_of(ready.manifest, head.tree, base_tree(hub, record.base))
    if hub.to.pull_request:
        with explained(hub.account, "looking for the pull request"):
            there = find_pull_request(hub, ready.manifest)
        if there is not None:
            return there
    create_branch(hub, head.commit)
    size = sum(file.size for file in parts.add)
    hub.remark(f"uploading {len(parts.add)} files with {size:,} bytes")
    if ready.checked.card is not None:
        _validate_card(hub, ready.checked.card)
    text = f"Artifact {ready.manifest.digest}, made by bake {record.bake}."
    return GuardedCommit(
        hub,
        ready.folder,
        ready.manifest,
        base=(record.base.repo, record.base.revision),
        parent=head.commit,
        message=(ready.title, text),
    ).make(parts)


def _validate_card(hub: Hub, card: str) -> None:
    """Have the Hub read the card before gigabytes are sent for nothing."""
    errors = hub.ask("checking the card", lambda: card_errors(card))
    if errors:
        raise HubError(
            f"the Hub refuses the card: {redact('; '.join(errors))}", fix="correct README.md"
        )


def _compare(ready: Prepared, hub: Hub, commit: str) -> None:
    """Require that the Hub holds these bytes, by the hashes that it states."""
    wrong = differences(hub.tree("comparing what the Hub holds", commit), ready.manifest)
    if wrong:
        raise HubError(
            f"{hub.to.repo} does not hold what was sent: {wrong[0]}",
            where=commit,
            why=f"{len(wrong)} files differ; it was neither tagged nor made public",
            fix="run the same command again",
        )


def _check_download(ready: Prepared, hub: Hub, pushed: Pushed) -> None:
    """Download everything again, and require that it is what was sent.

    Raises:
        HubError: other bytes came, or none; the receipt says that nothing is verified.
    """
    hub.remark(f"downloading {ready.manifest.size:,} bytes again, to compare them")
    wrong = compare_download(hub, pushed.commit, ready.manifest, place=ready.receipt.parent)
    if not wrong:
        return
    _with_receipt(ready, pushed)
    raise HubError(
        f"{hub.to.repo} is published but unverified: {len(wrong)} files came back with other "
        f"bytes, {', '.join(wrong[:8])}" + (" …" if len(wrong) > 8 else ""),
        where=pushed.commit,
        why="the Hub states the right hashes; it was neither tagged nor made public",
        fix="run the same command again: it compares the download anew",
    )


def _with_receipt(ready: Prepared, pushed: Pushed) -> Pushed:
    """Write the receipt; return the result with what there is to say about that."""
    versions = {"bake": __version__, "huggingface_hub": huggingface_hub.__version__}
    content = {**pushed.to_json(), "versions": versions}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomically(ready.receipt, text.encode())
    except OSError as error:
        note = f"the receipt could not be written: {error.strerror}"
    else:
        note = f"the receipt is {ready.receipt}"
    return replace(pushed, notes=(*pushed.notes, note))
