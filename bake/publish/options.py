"""What the user asks of a push: where to, under which terms, and how much is proved of it."""

from dataclasses import dataclass, field
from pathlib import Path

from bake.artifact.destination import Destination
from bake.publish.preflight import Terms


@dataclass(frozen=True, slots=True)
class PushOptions:
    """A push, apart from what is pushed.

    Attributes:
        to: the repository.
        terms: what the user takes on.
        dry_run: say what would be done and write nothing; the Hub is read where it can be reached.
        download: download everything again before the tag and the public view, and compare it.
        key: sign the artifact with this private key.
        passphrase: of an encrypted key.
        force_card: replace a card that was edited on the Hub.
        timeout: seconds that the Hub may take for one answer; it gives a commit up after 60.
    """

    to: Destination
    terms: Terms = field(default_factory=Terms)
    dry_run: bool = False
    download: bool = False
    key: Path | None = None
    passphrase: bytes | None = field(default=None, repr=False)
    force_card: bool = False
    timeout: float = 120.0
