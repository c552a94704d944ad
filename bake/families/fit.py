"""One checkpoint against its table: its layout."""

from dataclasses import replace
from pathlib import Path

from bake.checkpoints import Checkpoint
from bake.collection import uncollected
from bake.errors import BakeError, FamilyError
from bake.families.find import find_family
from bake.families.layout import Layout
from bake.families.load import read_family
from bake.families.resolve import resolve
from bake.families.table import TIED, Family


@uncollected()
def layout_of(
    model: Checkpoint,
    table: Family | Path | None = None,
    *,
    declared: bool = False,
) -> Layout:
    """Return the layout of a model, by the shipped tables or by the user's own.

    Args:
        model: the base, or a baked checkpoint.
        table: a table of the user's own, or the file that holds it.
        declared: the model may have been declared as another class since the table was written
            for it (a recast), and then that class's shipped table is used.

    Raises:
        FamilyError: no table fits, or the user's own is for another class.
        CheckpointError: the tensors are not what the table expects.
    """
    shapes = {name: info.shape for name, info in model.tensors.items()}
    dtypes = {name: info.dtype for name, info in model.tensors.items()}
    try:
        chosen, config = _chosen(model, table, declared=declared), model.config
        layout = resolve(chosen, config, shapes, dtypes, model.harmless)
        if not _is_copy(model, layout):
            if chosen.states_tie(config):
                raise _two_heads(layout)
            layout = resolve(chosen, {**config, TIED: False}, shapes, dtypes, model.harmless)
    except BakeError as error:
        where = model.source if error.where is None else f"{model.source}: {error.where}"
        raise type(error)(error.what, where=where, why=error.why, fix=error.fix) from error
    formats = sorted({coded.format for coded in model.coded.values()})
    return replace(layout, coded=", ".join(formats) or None)


def _is_copy(model: Checkpoint, layout: Layout) -> bool:
    """Return whether a tied head that is stored as well has the values of the embedding.

    Where config.json does not say that the head is tied, and only the class would have it so,
    transformers loads one of other values as a head of its own: mirrors ``modeling_utils.py:
    PreTrainedModel.tie_weights``.
    """
    head, embed = layout.unembed.weight, layout.embed
    if not (layout.tied and layout.head_is_stored):
        return True
    same = model.tensors[head].dtype == model.tensors[embed].dtype
    return same and model.tensor_digest(head) == model.tensor_digest(embed)


def _two_heads(layout: Layout) -> FamilyError:
    """Return the error for a head that is said to be the embedding, and is another matrix."""
    return FamilyError(
        f"tie_word_embeddings is true, but the checkpoint stores {layout.unembed.weight} as well, "
        "and it is another matrix than the embedding",
        why="runtimes disagree on which of the two they load",
        fix="set tie_word_embeddings to false in config.json, or remove the tensor",
    )


def _chosen(model: Checkpoint, given: Family | Path | None, *, declared: bool) -> Family:
    if given is None:
        return find_family(model.config)
    table = read_family(given) if isinstance(given, Path) else given
    names = model.config.get("architectures")
    if isinstance(names, list) and not {str(name) for name in names} & set(table.classes):
        if declared:
            return find_family(model.config)
        named = given if isinstance(given, Path) else given.name
        raise FamilyError(
            f"the table {named} is for {', '.join(table.classes)}, "
            f"and the model is a {', '.join(map(str, names))}",
            where="config.json",
            fix="name the table of this architecture, or leave --family out",
        )
    return find_family(model.config, (table,))
