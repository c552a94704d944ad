"""``Carrier``: what an edit can be written as. Facts only; the writers are in ``bake.outputs``.

Everything that depends on what kind of files an artifact has asks here: the plan what they hold,
the writers in which order they run, publishing which files are weights, cards what the Hub calls
them. To add one, add it to ``_ALL``, say in ``loading`` how its readers are told to load it, and
add a writer to ``bake.outputs.registry``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from bake.artifact import loading
from bake.artifact.loading import Loading
from bake.errors import UsageError


class Part(StrEnum):
    """What of a model files can change."""

    WEIGHTS = "weights"
    """Any change of a weight."""
    LOW_RANK = "low-rank changes of weights"
    BIASES = "biases"
    NORMS = "norms"
    CONFIG = "config.json"
    CONSTANTS = "constants behind blocks"


@dataclass(frozen=True, slots=True)
class Carrier:
    """One kind of artifact."""

    name: str
    """As ``--to`` and the record's ``kind`` spell it."""
    suffix: str
    """Of the files that hold weights."""
    whole: bool
    """Whether it is a model of its own, rather than something that is loaded over the base."""
    holds: frozenset[Part]
    readers: tuple[str, ...]
    """The runtimes that load such files, by themselves or through their own converter."""
    library: str
    """The Hub's ``library_name``."""
    relation: str
    """The Hub's ``base_model_relation``: finetune, adapter, quantized or merge."""
    template: str
    """Of the card, in ``model_cards/``."""
    loading: tuple[Loading, ...]
    """How its readers are told to load it, those that a card names."""
    tags: tuple[str, ...] = ()
    loader: str | None = None
    """The one program whose code loads such files, whatever runtime starts it."""
    exported: bool = True
    """Whether ``bake export`` writes it."""
    checkpoint: bool = False
    """Whether it is a folder that transformers loads as a model, with config.json."""
    without: str | None = None
    """How to do without one that is loaded over the base."""
    beside: str | None = None
    """A file of the base that lies beside an adapter where the base has to be another one for it:
    llama.cpp takes a tied head and the embedding for one tensor, which an adapter of it kills."""
    unread: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Why a runtime that is no reader is none."""
    unread_otherwise: str | None = None
    """The same for every runtime that ``unread`` does not name; None where nobody has looked."""


_CHECKPOINT_HOLDS = frozenset({Part.WEIGHTS, Part.BIASES, Part.NORMS, Part.CONFIG})
_CHECKPOINT_READERS = ("transformers", "vllm", "llama.cpp", "sglang", "ollama", "mlx-lm")
_LLAMA_CPP = "llama.cpp"  # Ollama starts its server
_PEFT_ADDS = "it adds adapters to a model that transformers loads"

_ALL = (
    Carrier(
        name="checkpoint",
        suffix=".safetensors",
        whole=True,
        holds=_CHECKPOINT_HOLDS,
        readers=_CHECKPOINT_READERS,
        library="transformers",
        relation="finetune",
        template="checkpoint.md.jinja",
        loading=loading.CHECKPOINT,
        checkpoint=True,
        unread_otherwise=_PEFT_ADDS,
    ),
    Carrier(
        name="lora",
        suffix=".safetensors",
        whole=False,
        holds=frozenset({Part.LOW_RANK}),
        readers=("transformers", "peft", "vllm", "sglang"),
        library="peft",
        relation="adapter",
        template="adapter.md.jinja",
        loading=loading.LORA,
        tags=("lora",),
        without="leave the adapter away when you load the base",
        unread=MappingProxyType(
            {
                "llama.cpp": "it reads GGUF adapters: write --to gguf-lora",
                "ollama": "its importer of PEFT adapters knows no embedding, and turns the rows "
                "of the wrong factor (convert/convert_llama_adapter.go): write --to gguf-lora",
                "mlx-lm": "it reads adapters in a format of its own (tuner/utils.py: "
                "load_adapters)",
            }
        ),
    ),
    Carrier(
        name="gguf-lora",
        suffix=".gguf",
        whole=False,
        holds=frozenset({Part.LOW_RANK}),
        readers=("llama.cpp", "ollama"),
        loader=_LLAMA_CPP,
        library="gguf",
        relation="adapter",
        template="adapter.md.jinja",
        loading=loading.GGUF_LORA,
        tags=("gguf", "lora"),
        without="start the base's GGUF without --lora",
        beside="base.gguf",
        unread_otherwise="it reads no adapters in GGUF",
    ),
    Carrier(
        name="control-vector",
        suffix=".gguf",
        whole=False,
        holds=frozenset({Part.CONSTANTS}),
        readers=("llama.cpp",),
        loader=_LLAMA_CPP,
        library="gguf",
        relation="adapter",
        template="adapter.md.jinja",
        loading=loading.CONTROL_VECTOR,
        tags=("gguf", "control-vector"),
        without="start the base's GGUF without --control-vector",
        unread=MappingProxyType({"ollama": "it has no option for a control vector"}),
        unread_otherwise="it adds no control vectors",
    ),
    Carrier(
        name="gguf",
        suffix=".gguf",
        whole=True,
        # What llama.cpp's loader has a slot for, which the plan looks up in the family's table.
        holds=_CHECKPOINT_HOLDS,
        readers=("llama.cpp", "ollama"),
        loader=_LLAMA_CPP,
        library="gguf",
        relation="quantized",
        template="gguf.md.jinja",
        loading=loading.GGUF,
        tags=("gguf",),
        unread=MappingProxyType(
            {
                "peft": _PEFT_ADDS,
                "vllm": "it has no reader of GGUF files of its own",
                "mlx-lm": "it writes GGUF files and reads none (mlx_lm/gguf.py)",
            }
        ),
    ),
    Carrier(
        name="merge",
        suffix=".safetensors",
        whole=True,
        holds=_CHECKPOINT_HOLDS,
        readers=_CHECKPOINT_READERS,
        library="transformers",
        relation="finetune",
        template="checkpoint.md.jinja",
        loading=loading.CHECKPOINT,
        tags=("merged-lora",),
        exported=False,
        checkpoint=True,
        unread_otherwise=_PEFT_ADDS,
    ),
)

KINDS: Mapping[str, Carrier] = MappingProxyType({carrier.name: carrier for carrier in _ALL})
"""Every kind of artifact, by the name that its record states."""

CARRIERS: tuple[str, ...] = tuple(carrier.name for carrier in _ALL if carrier.exported)
"""The names of those that ``bake export`` writes."""


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank`` (vllm/config/lora.py: MaxLoRARanks)."""


def vllm_room(rank: int) -> int | None:
    """Return the rank that vLLM has to be started with for an adapter, None where it takes none."""
    return next((room for room in VLLM_RANKS if room >= rank), None)


def carrier_of(name: str) -> Carrier:
    """Return a carrier that ``bake export`` writes.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in CARRIERS:
        raise UsageError(
            f"there is no carrier {name!r}", fix=f"the carriers are {', '.join(CARRIERS)}"
        )
    return KINDS[name]


def in_writing_order(names: Iterable[str]) -> list[str]:
    """Return carriers as one run writes them: whole models first, which adapters then draw on."""
    return sorted(names, key=lambda name: (not KINDS[name].whole, CARRIERS.index(name)))


def read_by(runtime: str) -> tuple[str, ...]:
    """Return the carriers that a runtime loads."""
    return tuple(name for name in CARRIERS if runtime in KINDS[name].readers)
