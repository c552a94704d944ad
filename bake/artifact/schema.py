"""``Record`` and its parts: what ``bake.json`` says, key for key, as frozen values.

The order of the fields is the order of the keys. A field without a default is always written, null
or not; one with a default is left out where it has that value. ``docs/record.schema.json`` is made
of these classes.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from bake.artifact.carrier import KINDS
from bake.checkpoints.hub_names import is_commit, split_hub_id

VERSION: Literal[2] = 2
"""Of the record's form; the key ``schema`` has it."""

Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Kind = Annotated[str, Meta(extra_json_schema={"enum": list(KINDS)})]
Finite = Annotated[float, Meta(gt=-1e308, lt=1e308)]
Sha256 = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$", max_length=71)]
Outtype = Literal["f32", "f16", "bf16", "q8_0"]
Status = Literal["exact", "approximate", "refused", "not tested"]
"""What a runtime makes of a carrier: the hooked function, something near it, nothing (it would
refuse the files, or silently serve another model), or something that nobody has run."""
Level = Literal["exact", "relocated", "nulling", "approximate", "impossible"]
Part = TypeVar("Part", bound="RecordPart")


class RecordPart(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What every part of a record is: frozen, and of no other keys than its fields."""

    @classmethod
    def of(cls: type[Part], content: object) -> Part:
        """Return the part that JSON values describe.

        Raises:
            msgspec.ValidationError: they do not.
        """
        return msgspec.convert(content, cls)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, with the keys in the record's order."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class RecipeRecord(RecordPart, frozen=True, kw_only=True):
    """The recipe that the edits were made from."""

    title: str
    file: str
    digest: str
    text: str
    settings: tuple[str, ...] = ()
    """``KEY=VALUE``, which were given instead of values of the text."""


class BaseCard(RecordPart, frozen=True, kw_only=True):
    """What the card beside the base states, of what a card of the artifact takes over."""

    license: str | tuple[str, ...] | None = None
    license_name: str | tuple[str, ...] | None = None
    license_link: str | tuple[str, ...] | None = None
    language: str | tuple[str, ...] | None = None
    pipeline_tag: str | tuple[str, ...] | None = None
    unreadable: str | None = None
    """Why the card could not be read."""


class BaseRef(RecordPart, frozen=True, kw_only=True):
    """The base model: what it is called, and what tells it from others."""

    model: str
    """A Hub id, or a folder as the recipe names it."""
    revision: str | None
    """The commit on the Hub, or None for a folder."""
    digest: str | None
    """``Checkpoint.digest``: over config and headers."""
    path: str | None
    """A folder, as seen from the artifact; None for a model on the Hub."""
    tensors: Count | None = None
    dtypes: dict[str, Count] = {}
    """How many tensors there are of each type."""
    card: BaseCard | None

    @property
    def on_hub(self) -> bool:
        """Whether it is a repository on the Hub, and not somebody's folder."""
        return self.path is None and split_hub_id(self.model) is not None

    @property
    def repo(self) -> str:
        """The id on the Hub, without the revision."""
        return self.model.partition("@")[0]

    @property
    def pinned(self) -> bool:
        """Whether the record names the commit that the base was read at."""
        return is_commit(self.revision)

    @property
    def address(self) -> str:
        """The name with the commit, as ``open_checkpoint`` takes it."""
        return f"{self.repo}@{self.revision}" if self.revision else self.model


class FittedTensor(RecordPart, frozen=True, kw_only=True):
    """One tensor of a fitted direction."""

    layer: int | None
    site: str | None
    role: str
    shape: tuple[Count, ...]
    dtype: str
    norm: float


class DirectionRecord(RecordPart, frozen=True, kw_only=True):
    """A fitted direction that the recipe names."""

    file: str
    concept: str
    format: str
    digest: str
    metadata: dict[str, str]
    """What its file says of itself."""
    tensors: tuple[FittedTensor, ...]


class FamilyRecord(RecordPart, frozen=True, kw_only=True):
    """The user's own table of the base's family: all of it, to make the plan again."""

    file: str
    digest: str
    text: str


class GivenText(RecordPart, frozen=True, kw_only=True):
    """A file of texts that the recipe names: all of it, to measure the same again."""

    file: str
    text: str


class Bounds(RecordPart, frozen=True, kw_only=True):
    """What a mean of the baked model is held to: by itself, or against the base's."""

    least: Finite | None = None
    most: Finite | None = None
    drop: Finite | None = None
    """By how much it may lie below the base's."""
    rise: Finite | None = None
    """By how much it may lie above the base's."""


class RefusalsGate(RecordPart, frozen=True, kw_only=True):
    """Which share of what the base refuses the baked model still has to refuse."""

    prompts: GivenText
    least: Annotated[float, Meta(gt=0, lt=1)]
    phrases: tuple[str, ...] = ()
    """What a refusal begins with; none for bake's own."""


class Gate(RecordPart, frozen=True, kw_only=True):
    """What the edit may cost elsewhere: limits of the baked model against its base."""

    perplexity: Annotated[float, Meta(ge=1, lt=1e308)] | None = None
    """What it may be over the base's, on the recipe's own text."""
    scores: dict[str, Bounds] = {}
    refusals: RefusalsGate | None = None
    tasks: dict[str, Bounds] = {}
    """Of lm-evaluation-harness, by their names there."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What each limit is called in ``verify.json``."""
        bounds = [("scores", self.scores), ("tasks", self.tasks)]
        return (
            *(() if self.perplexity is None else ("perplexity",)),
            *(() if self.refusals is None else ("refusals",)),
            *(f"{kind} {n} {b}" for kind, of in bounds for n in of for b in of[n].to_json()),
        )


class Limits(RecordPart, frozen=True, kw_only=True):
    """What the recipe holds a verification to."""

    most_kl: Annotated[float, Meta(gt=0, lt=1e308)] | None = None
    """The share of the effect's KL that may be lost."""
    text: GivenText | None = None
    """Held-out text, one passage a line, that side effects are measured on."""
    gate: Gate | None = None


class PromptsRecord(RecordPart, frozen=True, kw_only=True):
    """The texts that stand-ins were fitted on."""

    source: str
    form: str | None = None
    """What made tokens of them: a chat template, or nothing but the tokenizer."""
    prompts: Count
    tokens: Count
    digest: str


class FitRecord(RecordPart, frozen=True, kw_only=True):
    """One writer's fitted update, and what it explained."""

    site: str
    rank: Count
    ridge: float
    r2: float
    kl: float


class CalibrationRecord(RecordPart, frozen=True, kw_only=True):
    """How stand-ins were fitted for edits without an exact fold, and what they lose."""

    stands_for: tuple[str, ...]
    kept: Count
    """How many findings are of edits that were kept; the stand-ins' come after them."""
    tokens: Count
    held_out_tokens: Count
    effect_kl: float
    kl: float
    share: float
    constant: bool
    fits: tuple[FitRecord, ...]
    prompts: PromptsRecord | None = None


class GgufFile(RecordPart, frozen=True, kw_only=True):
    """One file of the base in GGUF, by its digest."""

    name: str
    sha256: str


class StorageRecord(RecordPart, frozen=True, kw_only=True):
    """Why edited matrices of a GGUF are stored in their types."""

    asked: dict[str, str]
    """By the kind of tensor: a type, ``keep``, or ``auto`` for the smallest within the limit."""
    lost: float
    """Of the edit's KL, by the noise of a sample."""
    limit: float


class ExportOptions(RecordPart, frozen=True, kw_only=True):
    """The options of the export that decide this carrier's bytes."""

    gguf: tuple[GgufFile, ...] = ()
    """The base in GGUF that was edited, or that an adapter was made for."""
    gguf_type: dict[str, str] = {}
    """The type of edited matrices by the kind of tensor; ``keep`` where each kept its own."""
    storage: StorageRecord | None = None
    edited_type: str | UnsetType | None = UNSET
    """Instead of ``gguf_type`` in records of earlier versions: for all, None to keep."""
    rounding: Literal["nearest", "feedback"] | None = None
    converter: str | None = None
    """The sha256 of llama.cpp's converter."""
    outtype: Outtype | None = None
    name: str | None = None
    """Of the output folder, which the converter writes into the file."""
    dequantize: bool = False
    """Whether a quantised base was written in floating point."""


class AdapterRecord(RecordPart, frozen=True, kw_only=True):
    """The adapter that a merge merged."""

    name: str
    """Its id on the Hub, or the last part of its folder."""
    path: str | None
    """Its folder, as seen from the artifact; None for one on the Hub."""
    sha256: str
    config: dict[str, Any]
    """Its ``adapter_config.json``."""
    revision: str | None = None


class FindingRecord(RecordPart, frozen=True, kw_only=True):
    """What the plan found of one edit."""

    kind: str
    concept: str
    sites: tuple[str, ...]
    exactness: Level
    reason: str
    remedy: str | None


class TensorChange(RecordPart, frozen=True, kw_only=True):
    """A weight that is changed or created."""

    name: str
    source: str
    """The base's tensor that it is made from."""
    shape: tuple[Count, ...]
    output_axis: Annotated[int, Meta(ge=0, le=1)] | None = None
    created: bool | None = None
    """Said of a merge. In an export what has another source is new."""
    sides: tuple[str, ...]
    """What is done to it: output, input, update or replaced, or copied alone."""
    bytes: Count

    @property
    def is_new(self) -> bool:
        """Whether the base has no such tensor."""
        return self.source != self.name if self.created is None else self.created


class BiasChange(RecordPart, frozen=True, kw_only=True):
    """A bias that is changed or created."""

    name: str
    size: Count
    experts: Count | None = None
    """How many experts' biases of this size the tensor has; not said of one bias."""
    created: bool
    zero: bool
    """Whether it is new and holds zeros."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return (self.size,) if self.experts is None else (self.experts, self.size)


class KeyChange(RecordPart, frozen=True, kw_only=True):
    """A key of ``config.json`` that is changed; a new value of None removes it."""

    key: str
    old: Any
    new: Any


class RuntimeVerdict(RecordPart, frozen=True, kw_only=True):
    """What a runtime makes of the artifact."""

    runtime: str
    status: Status
    reason: str
    wanted: bool
    """Whether the recipe names the runtime as a target."""
    reads: bool
    """Whether the runtime is one that such files are for. A target need not read every carrier."""
    known: bool
    """Whether the table says anything of the runtime with this carrier."""

    @property
    def stops(self) -> bool:
        """Whether the verdict keeps the carrier from being written."""
        return self.wanted and self.reads and (self.status == "refused" or not self.known)


class PlanRecord(RecordPart, frozen=True, kw_only=True):
    """Everything of a plan but the values of its maps, which its digest stands for."""

    digest: str
    exactness: Level
    family: str | None
    """None for a merge that needed no table."""
    loader: str | None = None
    """The class of transformers that loads the model, where AutoModelForCausalLM does not."""
    findings: tuple[FindingRecord, ...]
    tensors: tuple[TensorChange, ...]
    biases: tuple[BiasChange, ...]
    config: tuple[KeyChange, ...]
    runtimes: tuple[RuntimeVerdict, ...]
    notes: tuple[str, ...]
    created_bytes: Count

    @property
    def changed(self) -> frozenset[str]:
        """The tensors that the plan changes or adds."""
        names = [row.name for row in self.tensors]
        return frozenset([*names, *(row.name for row in self.biases)])

    @property
    def created(self) -> frozenset[str]:
        """Those of them that the base does not have."""
        new = [row.name for row in self.tensors if row.is_new]
        return frozenset([*new, *(row.name for row in self.biases if row.created)])

    @property
    def edited(self) -> frozenset[str]:
        """Those of them that the base has."""
        return self.changed - self.created


class GgufPart(RecordPart, frozen=True, kw_only=True):
    """One file of the GGUF that was edited."""

    name: str
    bytes: Count


class CodedTensor(RecordPart, frozen=True, kw_only=True):
    """A tensor that was written anew; measured where it was rounded to codes."""

    name: str
    type: str
    base_type: str | None
    """None where the base has no such tensor."""
    rounding: str | None = None
    change: float | None = None
    """How much of the edit is left, 1 for all of it."""
    leak: float | None = None
    """How much of what the edit removes is back; None for an edit that removes nothing."""
    error: float | None = None
    """Of the rounding, relative to the tensor's norm."""


class GgufTensor(CodedTensor, frozen=True, kw_only=True):
    """A tensor of a GGUF file that was written anew."""


class GgufRecord(RecordPart, frozen=True, kw_only=True):
    """Where a GGUF file came from: a base in GGUF that was edited, or llama.cpp's converter."""

    base: tuple[GgufPart, ...] = ()
    architecture: str | None = None
    file_type: int | None = None
    tensors: tuple[GgufTensor, ...] = ()
    converter: str | None = None
    outtype: str | None = None


class Provenance(RecordPart, frozen=True, kw_only=True):
    """What an artifact was made from, and how: all of its record that no output computes."""

    recipe: RecipeRecord | None = None
    base: BaseRef
    adapter: AdapterRecord | None = None
    directions: dict[str, DirectionRecord] = {}
    allow: tuple[str, ...]
    """What the plan was allowed to do beside what is exact."""
    target: tuple[str, ...]
    """The runtimes that have to serve the result."""
    widen: int | None = None
    """How many dimensions a model that is widened was to get, where the recipe says it."""
    sketch: dict[str, tuple[float, ...]] | None = None
    """``bake.plan.sketch`` of the plan."""
    family: FamilyRecord | None = None
    assume_harmless: tuple[str, ...] = ()
    """Keys of the base's config.json that its table does not know and the user let through."""
    verify: Limits | None = None
    calibration: CalibrationRecord | None = None
    export: ExportOptions | None = None


class Record(Provenance, frozen=True, kw_only=True):
    """``bake.json``."""

    bake: str | None = None
    """The version that wrote the artifact."""
    schema: Literal[2]
    kind: Kind
    plan: PlanRecord
    base_tensors: dict[str, Sha256] = {}
    """Of every tensor that was edited, the sha256 that it has in the base."""
    gguf: GgufRecord | None = None
    codes: tuple[CodedTensor, ...] = ()
    """The weights of a quantised base that were written back as codes."""
    files: dict[str, str] | None = None
    """The sha256 of every other file that the export wrote."""

    @property
    def provenance(self) -> Provenance:
        """What of the record an output is given."""
        return Provenance(**{name: getattr(self, name) for name in Provenance.__struct_fields__})

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, the version and the kind first."""
        found = super().to_json()
        first = [key for key in ("bake", "schema", "kind") if key in found]
        return {key: found[key] for key in (*first, *found)}


def json_schema(of: type) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of values of a type, such as ``Record``."""
    found = msgspec.json.schema(of)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
