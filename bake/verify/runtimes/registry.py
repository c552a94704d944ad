"""Every runtime that a verification can ask, and which of them one verification asks, where.

To add one, write a file of facts and a worker beside this one, and name it in ``_ALL``.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from bake.artifact.carrier import KINDS
from bake.converter import find_converter
from bake.errors import UsageError
from bake.process import find
from bake.verify.runtimes.hf import TRANSFORMERS
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.peft import PEFT
from bake.verify.runtimes.runtime import Runtime
from bake.verify.runtimes.vllm import VLLM

_ALL = (TRANSFORMERS, PEFT, VLLM, LLAMA_CPP)
RUNTIMES: Mapping[str, Runtime] = MappingProxyType({runtime.name: runtime for runtime in _ALL})


def serving(kind: str) -> tuple[str, ...]:
    """Return the names of the runtimes that load a kind of artifact."""
    return tuple(runtime.name for runtime in _ALL if kind in runtime.serves)


@dataclass(frozen=True, slots=True)
class Runtimes:
    """Which runtimes to ask, and where they are.

    Raises:
        UsageError: there is none of that name.
    """

    names: tuple[str, ...]
    pythons: Mapping[str, Path] = field(default_factory=dict)
    """The interpreter of each runtime's environment; this one where none is named."""
    converter: Path | None = None
    """llama.cpp's ``convert_hf_to_gguf.py``."""
    timeout: float = 3600.0
    """Seconds until one is killed; starting vLLM takes 10 to 50 of them."""

    def __post_init__(self) -> None:
        for name in (*self.names, *self.pythons):
            if name not in RUNTIMES:
                raise UsageError(
                    f"there is no runtime {name!r}", fix=f"they are {', '.join(RUNTIMES)}"
                )

    def python(self, name: str) -> Path:
        """Return the interpreter that a runtime is asked through."""
        return self.pythons.get(name, Path(sys.executable))

    def check(self, kind: str) -> None:
        """Require that every runtime loads artifacts of a kind.

        Raises:
            UsageError: one does not.
        """
        for name in self.names:
            if kind not in RUNTIMES[name].serves:
                fitting = ", ".join(serving(kind))
                fix = f"a {kind} is for {fitting}" if fitting else None
                raise UsageError(f"{name} loads no {kind}", fix=fix)

    def find(self, kind: str, *, base: bool = False) -> None:
        """Require that every runtime, and what it needs, is there. Nothing is started or measured.

        Args:
            kind: of the artifact that they are to load.
            base: whether the GGUF of the base that it goes over lies beside it.

        Raises:
            RuntimeMissing: one is not installed where it should be, or there is no converter.
        """
        carrier = KINDS[kind]
        converted = not base and not (carrier.whole and carrier.suffix == ".gguf")
        for name in self.names:
            runtime = RUNTIMES[name]
            find(runtime.title, self.python(name), runtime.packages)
            if runtime.gguf and converted:
                find_converter(self.converter)
