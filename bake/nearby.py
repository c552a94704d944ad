"""What a path at which there is nothing may have meant: a neighbour of almost that name."""

import difflib
from pathlib import Path


def nearby(path: Path, otherwise: str = "check the path") -> str:
    """Return advice for a path that does not exist, or what else to do where nothing is near it.

    The first part of it that does not exist is compared with what lies there.
    """
    try:
        missing = path.absolute()
        while not missing.parent.is_dir():
            missing = missing.parent
        names = [other.name for other in missing.parent.iterdir()]
    except OSError:  # a folder that nobody may look into
        return otherwise
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75)
    if not near:
        return otherwise
    meant = missing.with_name(near[0])
    here = Path.cwd()
    inside = not path.is_absolute() and meant.is_relative_to(here)
    return f"did you mean {meant.relative_to(here) if inside else meant}?"
