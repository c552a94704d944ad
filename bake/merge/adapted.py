"""An adapter beside its base: which tensors it changes, and what becomes of them."""

from pathlib import Path

from bake.artifact.base_digests import BaseDigests
from bake.checkpoints import Checkpoint
from bake.errors import InputError
from bake.merge.adapter_config import WEIGHTS, read_config
from bake.merge.applied import changes_of
from bake.merge.skeleton import skeleton_of
from bake.merge.work import Work, work_of


def merge_work(adapter: Path, base: Checkpoint) -> Work:
    """Return which tensors of a base an adapter changes, and what becomes of them.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the checkpoint.

    Raises:
        InputError: as ``merge_adapter`` does, for all but the values.
    """
    config = read_config(adapter)
    _check_readable(adapter)
    same = BaseDigests(base)

    def equal(one: str, two: str) -> bool:
        return len(set(same.record((one, two)).values())) == 1

    skeleton = skeleton_of(base.config, base.tensors, equal)
    found = changes_of(skeleton, adapter, config)
    work = work_of(base, skeleton, found, str(adapter / WEIGHTS))
    if not work.items:
        raise InputError("the adapter changes nothing", where=str(adapter / WEIGHTS))
    return work


def _check_readable(adapter: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not (adapter / WEIGHTS).is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        raise InputError(
            f"there is no {WEIGHTS}",
            where=str(adapter),
            why="adapter_model.bin is a pickle, which can run code" if pickled else None,
            fix="load the adapter with PEFT and save it again",
        )
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(adapter / WEIGHTS)) from error
