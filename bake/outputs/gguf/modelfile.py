"""A Modelfile, with which Ollama takes up a GGUF file: ``ollama create NAME -f Modelfile``.

It names the weights and nothing else. Ollama then reads template and parameters from the GGUF
file's own metadata, which an edit leaves as they are.
"""

from bake.errors import UsageError

MODELFILE = "Modelfile"


def modelfile(model: str, adapter: str | None = None) -> str:
    """Return the text of a Modelfile.

    Args:
        model: the GGUF file's path from the Modelfile's own folder on, with ``/``: Ollama takes
            relative paths from there (``parser/parser.go: expandPath``).
        adapter: the name of a GGUF adapter in that folder; Ollama applies one at most.

    Raises:
        UsageError: a name that a Modelfile cannot hold.
    """
    lines = [("FROM", model)] + ([("ADAPTER", adapter)] if adapter is not None else [])
    for _, path in lines:
        # Ollama trims what an instruction names and unquotes it.
        if not path.isprintable() or '"' in path or path != path.strip() or path.startswith("/"):
            raise UsageError(f"{path!r} cannot be named in a Modelfile", fix="rename the file")
    return "".join(f"{instruction} {_dotted(path)}\n" for instruction, path in lines)


def _dotted(path: str) -> str:
    """Return a relative path that cannot be taken for the name of a model in a registry."""
    return path if path.startswith("../") else f"./{path}"
