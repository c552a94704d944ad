"""What storing an edit in a GGUF costs, type by type: size and noise, before it is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.jobs.request import Request

if TYPE_CHECKING:
    from bake.outputs.gguf.choice import Choice


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The choices that there are, those of one type for all first, and the one that is taken."""

    file: str
    limit: float
    choices: tuple["Choice", ...]
    taken: "Choice"
    other_bytes: int
    """Of the file, without the edited tensors that are stored in blocks."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        rows = [
            {
                "types": dict(choice.types),
                "bytes": self.other_bytes + choice.nbytes,
                "noise": choice.noise,
                "lost": choice.lost,
                "taken": choice is self.taken,
            }
            for choice in self.choices
        ]
        return {"gguf": self.file, "limit": self.limit, "choices": rows}


def storage(request: Request, gguf: Path) -> Storage:
    """Return what the types come to for one file of the base. Some rows of it are read.

    Raises:
        BakeError: the file is no GGUF of the planned model, or cannot hold the plan.
    """
    from bake.checkpoints.gguf.storage import AUTO
    from bake.outputs.gguf.edit import storage_choices

    export = request.export(Path(), gguf=gguf)
    taken = storage_choices(export)[1]
    single, _, other = storage_choices(request.export(Path(), gguf=gguf, gguf_type=AUTO))
    choices = [taken if choice == taken else choice for choice in single]
    if taken not in choices:
        choices.append(taken)
    return Storage(gguf.name, export.most_kl, tuple(choices), taken, other)
