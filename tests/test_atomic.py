"""A small file appears whole or not at all, and no folder but its own is needed for it."""

import os
from pathlib import Path

import pytest
from cards import artifact, on_hub

from bake.atomic import write_atomically
from bake.cards.card import render_card, save_card


def places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list of where unfinished files lie, which is filled as they are written."""
    seen: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda _: seen.extend(p.parent for p in folder.rglob(".bake-*.partial"))
    )
    return seen


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"before")
    assert file.read_bytes() == b"before"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, b"after")
    assert file.read_bytes() == b"before" and [*tmp_path.iterdir()] == [file]
    write_atomically(file, b"after")
    assert file.read_bytes() == b"after" and [*tmp_path.iterdir()] == [file]


def test_modes_are_those_that_the_user_has_chosen(tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            write_atomically(tmp_path / "file", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_card_elsewhere_needs_its_own_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home's parent is not the user's, and an artifact is published with all that is in it."""
    out, home = artifact(tmp_path / "outputs" / "out", record=on_hub), tmp_path / "home" / "me"
    home.mkdir(parents=True)
    text = render_card(out)
    for card, place in ((home / "card.md", home), (out / "README.md", out.parent)):
        seen = places(tmp_path, monkeypatch)
        save_card(text, card)
        assert card.read_text(encoding="utf-8") == text and seen == [place]
