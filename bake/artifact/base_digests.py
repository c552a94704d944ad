"""The sha256 of a base's edited tensors, summed up from the very bytes that the edit is made of.

A plan says which tensors it changes, and the layout's digest says nothing of weights. With the
hashes of what was there before, an artifact names its base to the last bit.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.errors import InputError
from bake.progress import Progress
from bake.tiles import row_count

_PREFIX = "sha256:"

ReadRows = Callable[[int, int], Tensor]


class BaseDigests:
    """Hashes a base's tensors as they pass, and reads on its own those that have not passed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Begin with none."""
        self._checkpoint = checkpoint
        self._found: dict[str, str] = {}

    def watched(self, name: str, read: ReadRows) -> ReadRows:
        """Return a reader of the same rows that hashes them when they pass from first to last."""
        if name in self._checkpoint.coded:
            return read  # what passes are values, and the digest is over codes
        rows = row_count(self._checkpoint.tensors[name].shape)
        digest, position, seen = hashlib.sha256(), 0, 0

        def watching(start: int, stop: int) -> Tensor:
            nonlocal digest, position, seen
            tile = read(start, stop)
            if name in self._found or start not in (0, position):
                return tile
            if start == 0:
                digest, seen = hashlib.sha256(), 0
            digest.update(tile.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            position, seen = stop, seen + row_count(tile.shape)
            if seen == rows:
                self._found[name] = _PREFIX + digest.hexdigest()
            return tile

        return watching

    def add(self, name: str) -> None:
        """Hash a tensor now, unless it has passed."""
        if name not in self._found:
            self._found[name] = _PREFIX + self._checkpoint.tensor_digest(name)

    def record(self, names: Iterable[str]) -> dict[str, str]:
        """Return the hashes of these tensors, as the record keeps them."""
        for name in sorted(names):
            self.add(name)
        return {name: self._found[name] for name in sorted(names)}


def refuse_other_base(
    recorded: Mapping[str, str],
    base: Checkpoint,
    progress: Progress | None = None,
) -> None:
    """Raise when a tensor of a base is not the one that an edit was made of.

    Raises:
        InputError: naming the first such tensor, and how many there are.
    """
    total = sum(base.tensors[name].nbytes for name in recorded if name in base.tensors)
    done, others = 0, []
    for name, digest in recorded.items():
        if name not in base.tensors or _PREFIX + base.tensor_digest(name) != digest:
            others.append(name)
        done += base.tensors[name].nbytes if name in base.tensors else 0
        if progress is not None:
            progress(done, total)
    if others:
        raise InputError(
            f"this is not the base that the artifact was made of: {others[0]} is another tensor"
            + (f", and {len(others) - 1} more of {len(recorded)}" if len(others) > 1 else ""),
            where=base.source,
            why="the record holds the sha256 of every tensor that was edited, as it was before",
            fix="name the base that the record names",
        )
