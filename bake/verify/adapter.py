"""The adapter of a merge, which is the reference of its verification: PEFT, with nothing merged.

It shares no code with ``bake merge``, which never loads a model.
"""

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bake.artifact.record import RECORD
from bake.checkpoints.adapter import FILES, adapter_digest, find_adapter
from bake.errors import InputError
from bake.verify.artifact import Baked

# What PEFT says when a tensor of the adapter found no place, or a place no tensor.
_LOST = ("missing adapter keys", "unexpected keys", "unexpected adapter keys")


def adapter_of(artifact: Baked, named: Path | None) -> Path:
    """Return the folder of the adapter that was merged.

    Args:
        artifact: the merged checkpoint.
        named: where the adapter is now; where it was when None.

    Raises:
        InputError: it is not there, or another one.
        HubError: it is on the Hub, which refuses or cannot be reached.
    """
    adapter = artifact.record.adapter
    if adapter is None or (adapter.path is None and adapter.revision is None):
        raise InputError(
            "the record does not say which adapter was merged", where=str(artifact.path / RECORD)
        )
    if named is not None:
        folder = named
    elif adapter.path is not None:
        folder = artifact.path / adapter.path
    else:
        folder = find_adapter(f"{adapter.name}@{adapter.revision}").folder
    fix = "name the adapter's folder with --adapter"
    if not all((folder / name).is_file() for name in FILES):
        raise InputError("the adapter that was merged is not there", where=str(folder), fix=fix)
    digest = adapter_digest(folder)
    if digest != adapter.sha256:
        raise InputError(
            "this is not the adapter that was merged",
            where=str(folder),
            why=f"its digest is {digest}, the record has {adapter.sha256}",
            fix=fix,
        )
    return folder


def with_adapter(model: Any, adapter: Path, *, streamed: bool) -> Any:
    """Return a model of transformers with an adapter's layers in it, as any user of PEFT gets it.

    Args:
        model: the base.
        adapter: a folder.
        streamed: whether the base has no values yet, so that nothing can be copied into it.

    Raises:
        InputError: a tensor of the adapter found no place.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=streamed)
    for warning in caught:
        text = str(warning.message)
        if any(words in text for words in _LOST):
            raise InputError(
                "PEFT does not take up the whole adapter",
                where=str(adapter),
                why=text,
                fix="save the adapter again with the PEFT that is installed",
            )
    return wrapped.get_base_model().eval()


def peft_version() -> str:
    """Return the version of the PEFT that is installed."""
    return version("peft")


def as_merge(name: str) -> str:
    """Return a row's name for a merge: its reference has no hooks, and nothing was baked."""
    return name.replace("hooked", "adapter at work").replace("baked", "merged")
