"""The tokenizer, templates and generation settings beside an adapter, against the base's.

Whoever trains with a template of its own saves it with the adapter. A merge writes the base's
files, so what differs is either taken or told.
"""

from pathlib import Path

from bake.checkpoints import Checkpoint
from bake.checkpoints.adapter import BESIDE
from bake.checkpoints.folder import CHAT_TEMPLATES, list_folder, regular_file


def own_files(adapter: Path, base: Checkpoint) -> dict[str, bytes]:
    """Return the files beside an adapter that the base lacks or has otherwise, by name.

    Raises:
        CheckpointError: one is a link out of its folder.
    """
    folder = adapter.resolve()
    found = {}
    for name in list_folder(folder):
        if name not in BESIDE and not name.startswith(f"{CHAT_TEMPLATES}/"):
            continue
        data = regular_file(folder, name).read_bytes()
        if name not in base.side_files or base.fetched(name).read_bytes() != data:
            found[name] = data
    return found
