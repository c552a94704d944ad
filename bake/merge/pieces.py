"""The tensors that transformers puts a parameter together from, and what becomes of each.

Mixtures are stored expert by expert and run as one stack: ``core_model_loading.py`` merges lists of
modules and joins their outputs. Those two steps are undone here; a parameter that is made in any
other way is refused.
"""

from collections.abc import Mapping

from bake.checkpoints import TensorInfo
from bake.errors import InputError
from bake.merge.change import Change
from bake.merge.skeleton import Skeleton


def pieces_of(
    skeleton: Skeleton,
    key: str,
    change: Change,
    tensors: Mapping[str, TensorInfo],
    where: str,
) -> dict[str, Change]:
    """Return what becomes of every tensor of the files that a parameter is put together from.

    Args:
        skeleton: of the base.
        key: the parameter's name in the model.
        change: what becomes of it.
        tensors: the base's.
        where: the adapter's file, for messages.

    Raises:
        InputError: it is put together in a way that bake cannot undo.
    """
    names = skeleton.converted[key]
    steps, sources = skeleton.names.steps(names[0])
    joined = steps == (("MergeModulelist", 0), ("Concatenate", 1))
    if not (joined or (steps == (("MergeModulelist", 0),) and len(sources) == 1)):
        raise InputError(
            f"the adapter changes {key}, which transformers puts together from {len(names)} "
            f"tensors by {', '.join(name for name, _ in steps)}",
            where=where,
            why="bake undoes the stacking of experts and nothing else",
            fix="load the base with transformers, save it, and merge into that",
        )
    found: dict[str, Change] = {}
    counts: dict[str, int] = {}
    offsets = _offsets(skeleton, names, sources, tensors)
    for name in names:
        _, pattern = skeleton.names.rename(name)
        assert pattern is not None
        index = counts.get(pattern, 0)
        counts[pattern] = index + 1
        start, stop = offsets[pattern]
        found[name] = change.part(index, start, stop)
    return found


def _offsets(
    skeleton: Skeleton,
    names: tuple[str, ...],
    sources: tuple[str, ...],
    tensors: Mapping[str, TensorInfo],
) -> dict[str, tuple[int, int]]:
    """Return the rows of a stacked matrix that each of several lists makes, by its pattern."""
    rows = {skeleton.names.rename(name)[1]: tensors[name].shape[0] for name in names}
    found, start = {}, 0
    for pattern in sources:
        found[pattern] = (start, start + rows[pattern])
        start += rows[pattern]
    return found
