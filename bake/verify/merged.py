"""Compare a merged checkpoint with PEFT's adapter at work on the base, logit by logit.

The reference is PEFT itself in transformers: the base with the adapter beside it, nothing merged.
It shares no code with ``bake merge``, which never loads a model. Everything else is as for a baked
checkpoint: the effect of the adapter, the floor of the dtype, controls that have to fail.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bake.checkpoints.adapter import FILES, find_adapter
from bake.errors import InputError, UsageError
from bake.verify.artifact import Baked, changed_files
from bake.verify.assemble import environment, report_of
from bake.verify.effects import effects
from bake.verify.evidence import TORCH, Evidence, Measured, Subject, controls_of
from bake.verify.greedy import Generated, generate
from bake.verify.models import Live, load
from bake.verify.observe import block_sites
from bake.verify.prompts import PromptSet
from bake.verify.report import Report
from bake.verify.runs import Batch, Trace, batches_of, halves, run
from bake.verify.serving import GREEDY, Target, asked_of, narrow_dtypes, target_from

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
    match artifact.record.get("adapter"):
        case {"path": str(found), "sha256": str(recorded)}:
            folder = named or artifact.path / found
        case {"path": None, "name": str(repo), "revision": str(commit), "sha256": str(recorded)}:
            folder = named or find_adapter(f"{repo}@{commit}").folder
        case _:
            raise InputError(
                "the record says nothing of an adapter", where=str(artifact.path / "bake.json")
            )
    fix = "name the adapter's folder with --adapter"
    files = [folder / name for name in FILES]
    if not all(file.is_file() for file in files):
        raise InputError("the adapter that was merged is not there", where=str(folder), fix=fix)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    if digest.hexdigest() != recorded:
        raise InputError(
            "this is not the adapter that was merged",
            where=str(folder),
            why=f"its digest is {digest.hexdigest()}, the record has {recorded}",
            fix=fix,
        )
    return folder


def compare_merged(
    subject: Subject, adapter: Path, prompts: PromptSet, scores: Sequence[str] = ()
) -> Report:
    """Return the report of a merged checkpoint.

    Args:
        subject: the merged checkpoint and its base.
        adapter: the adapter's folder.
        prompts: what the models are run on.
        scores: what the generated texts are scored by.

    Raises:
        UsageError: the model is to be streamed, which PEFT cannot do.
        InputError: PEFT does not take up the whole adapter.
    """
    if subject.streamed:
        raise UsageError(
            "a merge is compared with the model in memory, since PEFT loads it whole",
            where=str(subject.artifact.path),
            fix="use --no-stream, on a machine that holds the base in float64",
        )
    subject.progress("digests of the artifact's files")
    changed = changed_files(subject.artifact)
    evidence = _collect(subject, adapter)
    report = report_of(subject, evidence, changed, prompts, None)
    return replace(
        report,
        rows=tuple(replace(row, name=_renamed(row.name)) for row in report.rows),
        environment={**environment(subject.device), "peft": _peft_version()},
        effects=effects(evidence, prompts, scores, subject.artifact.path),
        timing={"forward": evidence.seconds},
    )


def target_of_merge(subject: Subject, adapter: Path) -> Target:
    """Return what every runtime is held against: PEFT's adapter at work, in float64."""
    asked, layout = asked_of(subject.prompts), subject.layout
    batches, reference = batches_of(asked), _Reference(subject, adapter)
    plain = subject.trace("base model for the runtimes", "base", torch.float64, batches=batches)
    working = reference.trace("adapter at work", torch.float64, batches)
    greedy = reference.greedy(torch.float64, asked, GREEDY)
    narrow = {
        dtype: reference.trace("adapter at work", dtype, batches).logits
        for dtype in narrow_dtypes(layout)
    }
    reference.release()
    return target_from(layout, asked, plain.logits, working.logits, narrow, greedy, GREEDY)


def _renamed(name: str) -> str:
    """Return a row's name: the reference is no model with hooks, and nothing was baked."""
    return name.replace("hooked", "adapter at work").replace("baked", "merged")


def _peft_version() -> str:
    from importlib.metadata import version

    return version("peft")


def _collect(subject: Subject, adapter: Path) -> Evidence:
    """Run everything: float64 with controls, then float32 and the storage dtype."""
    reference = _Reference(subject, adapter)
    double, sites = torch.float64, block_sites(subject.layout)
    evidence = Evidence(subject.trace("base model", "base", double, sites=sites, writes=True))
    working = reference.trace("adapter at work", double, subject.batches)
    reference.release()
    merged = subject.trace("merged model", "baked", double, sites=sites, writes=True)
    evidence.runs[double] = Measured(working, None, merged)
    evidence.controls = controls_of(subject, (), evidence.exact)
    storage = TORCH[subject.layout.dtype]
    for dtype in dict.fromkeys((torch.float32, storage)):
        if dtype == double:
            continue
        working = reference.trace("adapter at work", dtype, subject.batches)
        again = reference.trace("adapter in other batches", dtype, halves(subject.batches))
        reference.release()
        merged = subject.trace("merged model", "baked", dtype, sites=sites)
        evidence.runs[dtype] = Measured(working, again, merged)
    if subject.generate:
        serving = torch.float32 if storage == double else storage
        evidence.texts = {
            "baked": subject.greedy("merged model", "baked", serving, subject.generate),
            "hooked": reference.greedy(serving, subject.prompts, subject.generate),
        }
        reference.release()
        if subject.texts:
            evidence.texts["base"] = subject.greedy("base model", "base", serving, subject.generate)
    subject.release()
    return evidence


class _Reference:
    """The base with the adapter at work, loaded by PEFT; one dtype in memory at a time."""

    def __init__(self, subject: Subject, adapter: Path) -> None:
        self._subject, self._adapter = subject, adapter
        self._live: tuple[torch.dtype, Live] | None = None

    def trace(self, name: str, dtype: torch.dtype, batches: Sequence[Batch]) -> Trace:
        """Return one run, with the stream behind every block."""
        subject = self._subject
        subject.progress(f"{name} in {str(dtype).removeprefix('torch.')}")
        return run(self._model(dtype), batches, sites=block_sites(subject.layout))

    def greedy(self, dtype: torch.dtype, prompts: Sequence[Sequence[int]], count: int) -> Generated:
        """Return the greedy text after every prompt."""
        self._subject.progress("greedy text of the adapter at work")
        return generate(self._model(dtype), prompts, count)

    def release(self) -> None:
        """Let go of the model in memory."""
        self._live = None

    def _model(self, dtype: torch.dtype) -> Live:
        if self._live is not None and self._live[0] == dtype:
            return self._live[1]
        self._live = None
        self._subject.release()
        live = load(
            self._subject.base,
            dtype,
            family=self._subject.family,
            device_map=self._subject.device_map,
        )
        live.model = self._adapted(live.model)
        self._live = (dtype, live)
        return live

    def _adapted(self, model: Any) -> Any:
        """Return the model with the adapter's layers in it, as any user of PEFT gets it.

        Raises:
            InputError: a tensor of the adapter found no place.
        """
        from peft import PeftModel

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, str(self._adapter))
        for warning in said:
            text = str(warning.message)
            if any(words in text for words in _LOST):
                raise InputError(
                    "PEFT does not take up the whole adapter",
                    where=str(self._adapter),
                    why=text,
                    fix="save the adapter again with the PEFT that is installed",
                )
        return wrapped.get_base_model().eval()
