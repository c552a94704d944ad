"""A Modelfile, with which Ollama takes up a GGUF file: ``ollama create NAME -f Modelfile``.

It names the weights and nothing else. Ollama then reads template and parameters from the GGUF
file's own metadata, which an edit leaves as they are.
"""

from bake.errors import UsageError

MODELFILE = "Modelfile"


def modelfile(model: str, adapter: str | None = None) -> str:
    """Return the text of a Modelfile.

    Args:
        model: the GGUF file's name, in the Modelfile's own folder.
        adapter: the name of a GGUF adapter there; Ollama applies one at most.

    Raises:
        UsageError: a name that a Modelfile cannot hold.
    """
    lines = [("FROM", model)] + ([("ADAPTER", adapter)] if adapter is not None else [])
    for _, name in lines:
        if not name.isprintable() or "/" in name or '"' in name:
            raise UsageError(f"{name!r} cannot be named in a Modelfile", fix="rename the file")
    return "".join(f"{instruction} ./{name}\n" for instruction, name in lines)
