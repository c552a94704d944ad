"""The model that a recipe edits, and where the files that it names lie."""

from pathlib import Path

from bake.errors import UsageError
from bake.recipe.spec import Base

LOCAL_PREFIXES = ("/", "./", "../", "~")


def model_of(model: str, revision: str | None, folder: Path, where: str) -> Base:
    """Return a model by the words that name it: a folder, or ``owner/name`` with its revision.

    Raises:
        UsageError: the words are empty, or name a revision of a folder, or two of them.
    """
    if not model:
        raise UsageError("model is empty", where=where)
    local = local_path(folder, model, where)
    # A Hub id is owner/name, its revision may hold more slashes. A folder of that spelling comes
    # first, as it does for transformers.
    on_hub = model.partition("@")[0].count("/") == 1 and not model.startswith(LOCAL_PREFIXES)
    if not on_hub or local.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision = {revision!r} is given for the folder {model}",
                where=where,
                why="a folder has no revisions",
                fix="leave it out, or give the Hub id of the model",
            )
        return Base(model, None, local)
    named = model.partition("@")[2]
    if revision is not None and named not in ("", revision):
        raise UsageError(
            f"model = {model!r} names a revision, and so does revision = {revision!r}",
            where=where,
            fix="give the revision once",
        )
    return Base(model.partition("@")[0], revision or named or None, None)


def local_path(folder: Path, text: str, where: str) -> Path:
    """Return the path that a text names, from a folder.

    Raises:
        UsageError: it is no path: nothing, or ``~name`` of nobody.
    """
    if not text:
        raise UsageError("a path is empty", where=where)
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:  # ~name of a user that does not exist
        raise UsageError(f"{text!r} names no home folder: {error}", where=where) from error
