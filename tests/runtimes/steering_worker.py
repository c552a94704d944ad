"""Let steering packages fit, save and steer with code of their own, on a checkpoint of ours.

    python -I steering_worker.py REQUEST

It runs in the packages' environment (``steering-requirements.txt``), where there is no bake.
REQUEST is a JSON object: ``tokens`` is the batch, ``precision`` bake's file of that name, which
keeps float64 models in float64, and each of ``bases`` has the folder ``base`` of a checkpoint, the
``dtype`` to compute in, and the folder ``out`` to write into: every case's artifact, and
``logits.safetensors`` with those of the base and of the model that each case's package steers.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BLOCK, OTHER = 1, 2
FACTOR = 2.0
"""Of vectors. Some packages multiply in float32, where doubling rounds nothing."""
PAIRS = [(f"w{n} w{n + 1} w{n + 7}", f"w{n} w{n + 2} w{n + 9}") for n in range(3, 40, 3)]
"""Texts of the two classes."""


class Subject:
    """The base, read anew for each case, since packages change the model that they steer."""

    def __init__(self, base: dict[str, str], tokens: Tensor, folder: Path) -> None:
        self.base = Path(base["base"])
        self.dtype: torch.dtype = getattr(torch, base["dtype"])
        self.tokens = tokens
        self.folder = folder

    def model(self) -> Any:
        eager = {"dtype": self.dtype, "attn_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(self.base, **eager).eval()

    def logits(self, model: Any) -> Tensor:
        # repeng makes its mask of padding from positions, and wants a row of them for each text.
        positions = torch.arange(self.tokens.shape[1]).expand_as(self.tokens)
        return model(input_ids=self.tokens, position_ids=positions, use_cache=False).logits

    def tokenizer(self) -> PreTrainedTokenizerFast:
        vocabulary = {f"w{n}": n for n in range(56)}
        words = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="w3"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")

    def activations(self, path: str) -> tuple[Tensor, Tensor]:
        """Return what a module puts out at the last token of every text [n, d], and the classes."""
        model, found = self.model(), []
        module = model.get_submodule(path)
        handle = module.register_forward_hook(lambda _, __, out: found.append(out[0, -1]))
        tokenizer = self.tokenizer()
        for text in (text for pair in PAIRS for text in pair):
            model(**tokenizer(text, return_tensors="pt"))
        handle.remove()
        return torch.stack(found), torch.tensor([1, 0] * len(PAIRS))


def concept_scrubber(subject: Subject) -> Tensor:
    """LEACE of concept-erasure, scrubbing what norms put out."""
    from concept_erasure import ConceptScrubber, LeaceEraser

    scrubber = ConceptScrubber()
    for name in ("layers.1.input_layernorm", "layers.2.post_attention_layernorm"):
        x, z = subject.activations(f"model.{name}")
        scrubber.erasers[name.replace(".", "-")] = LeaceEraser.fit(x, z)
    torch.save(scrubber, subject.folder / "scrubber.pt")
    model = subject.model()
    with scrubber.scrub(model):
        return subject.logits(model)


def repeng(subject: Subject) -> Tensor:
    from repeng import ControlModel, ControlVector, DatasetEntry

    model = subject.model()
    texts = [DatasetEntry(*pair) for pair in PAIRS]
    vector = ControlVector.train(model, subject.tokenizer(), texts)
    vector.export_gguf(subject.folder / "vector.gguf")
    steered = ControlModel(model, sorted(vector.directions))
    steered.set_control(vector, FACTOR)
    return subject.logits(steered)


def dialz(subject: Subject) -> Tensor:
    from dialz import Dataset, SteeringModel, SteeringVector
    from dialz import vector as module

    # It loads what it steers in float16 itself, and finds the tokenizer in the model's folder.
    class Loaded:
        from_pretrained = staticmethod(lambda *_, **__: subject.model())

    module.AutoModelForCausalLM = Loaded
    subject.tokenizer().save_pretrained(subject.folder / "tokenizer")
    steered = SteeringModel(str(subject.folder / "tokenizer"), [BLOCK, OTHER])
    texts = Dataset()
    for positive, negative in PAIRS:
        texts.add_entry(positive, negative)
    vector = SteeringVector.train(steered, texts)
    vector.export_gguf(subject.folder / "vector.gguf")
    steered.set_control(vector, FACTOR)
    return subject.logits(steered)


def steering_vectors(layer_type: str, *, ablate: bool = False) -> Callable[[Subject], Tensor]:
    def made(subject: Subject) -> Tensor:
        from steering_vectors import ablation_operator, train_steering_vector

        model = subject.model()
        fit = {"layers": [BLOCK], "layer_type": layer_type}
        vector = train_steering_vector(model, subject.tokenizer(), PAIRS, **fit)
        torch.save(vector, subject.folder / "vector.pt")
        operator = ablation_operator() if ablate else None
        with vector.apply(model, operator=operator, multiplier=FACTOR):
            return subject.logits(model)

    return made


def _intervened(subject: Subject, steered: Any) -> Tensor:
    """Return the logits under pyvene's intervention at every position, and save it."""
    steered.save(str(subject.folder / "saved"))
    steered.set_device("cpu")
    everywhere = list(range(subject.tokens.shape[1]))
    _, out = steered({"input_ids": subject.tokens}, unit_locations={"base": everywhere})
    return out.logits


def pyvene(subject: Subject) -> Tensor:
    import pyvene as pv

    x, z = subject.activations(f"model.layers.{BLOCK}")
    vector = x[z == 1].mean(0) - x[z == 0].mean(0)
    kind = pv.AdditionIntervention
    where = {"layer": BLOCK, "component": "block_output", "source_representation": vector}
    config = pv.IntervenableConfig([{**where, "intervention_type": kind}])
    return _intervened(subject, pv.IntervenableModel(config, subject.model()))


def pyreft(subject: Subject) -> Tensor:
    from pyreft import LoreftIntervention, ReftConfig, get_reft_model

    torch.manual_seed(0)
    model = subject.model()
    size = {"embed_dim": model.config.hidden_size, "low_rank_dimension": 3}
    intervention = LoreftIntervention(**size, dtype=subject.dtype).to(subject.dtype).eval()
    where = {"layer": BLOCK, "component": "mlp_output", "low_rank_dimension": 3}
    config = ReftConfig(representations=[{**where, "intervention": intervention}])
    return _intervened(subject, get_reft_model(model, config))


def _autoencoder(subject: Subject, kind: str) -> Any:
    """Return a random autoencoder of the stream, saved, whose features are active at times."""
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)
    model = subject.model()
    config = {"d_in": model.config.hidden_size, "d_sae": 64, "architecture": kind}
    config |= {"dtype": str(subject.dtype).removeprefix("torch."), "device": "cpu"}
    sae = SAE.from_dict(config)
    sae.cfg.metadata = SAEMetadata(hook_name=f"blocks.{BLOCK}.hook_resid_post")
    for name, parameter in sae.named_parameters():
        scale = 0.2 if name.startswith("b_") else 0.3
        parameter.data = scale * torch.randn_like(parameter)
        if name == "threshold":
            parameter.data = parameter.data.abs() + 0.1
    sae.save_model(subject.folder / "sae")
    return sae


def sae_lens(subject: Subject) -> Tensor:
    """A decoder's row, added. SAELens saves it; its own tutorial adds it by a hook like this."""
    sae, model = _autoencoder(subject, "standard"), subject.model()
    row = sae.W_dec[FEATURE]
    model.model.layers[BLOCK].register_forward_hook(lambda _, __, out: out + FACTOR * row)
    return subject.logits(model)


def sae_clamp(kind: str) -> Callable[[Subject], Tensor]:
    def made(subject: Subject) -> Tensor:
        """SAELens's own forward pass with its error term, one feature set to a level."""
        sae, model = _autoencoder(subject, kind), subject.model()
        sae.use_error_term = True

        def set_to(acts: Tensor, hook: Any) -> Tensor:
            acts = acts.clone()
            acts[..., FEATURE] = LEVEL
            return acts

        sae.add_hook("hook_sae_acts_post", set_to)
        model.model.layers[BLOCK].register_forward_hook(lambda _, __, out: sae(out))
        return subject.logits(model)

    return made


FEATURE, LEVEL = 7, 1.5


def heretic(subject: Subject) -> Tensor:
    """``Model.abliterate`` on rows that are fitted as ``heretic.main`` does; it saves adapters."""
    from heretic.config import RowNormalization
    from heretic.model import AbliterationParameters, Model

    model = subject.model()
    positive, negative = (
        torch.stack(
            [
                torch.stack(
                    model(
                        **subject.tokenizer()(text, return_tensors="pt"), output_hidden_states=True
                    ).hidden_states
                )[:, 0, -1]
                for text in texts
            ]
        ).mean(0)
        for texts in zip(*PAIRS, strict=True)
    )
    rows = torch.nn.functional.normalize(positive - negative, dim=1).float()
    torch.save(rows, subject.folder / "refusal_directions.pt")
    steered = Model.__new__(Model)  # its constructor wants a chat model of the Hub
    steered.settings = SimpleNamespace(row_normalization=RowNormalization.NONE)
    steered.model = model
    steered._apply_lora()
    weights = AbliterationParameters(1.0, 1.0, 0.25, 1.5)
    components = steered.get_abliterable_components()
    steered.abliterate(rows, None, dict.fromkeys(components, weights))
    return subject.logits(steered.model)


CASES: dict[str, Callable[[Subject], Tensor]] = {
    "concept-erasure": concept_scrubber,
    "repeng": repeng,
    "dialz": dialz,
    "steering-vectors": steering_vectors("decoder_block"),
    "steering-vectors-mlp": steering_vectors("mlp"),
    "steering-vectors-ablation": steering_vectors("mlp", ablate=True),
    "pyvene": pyvene,
    "pyreft": pyreft,
    "sae-lens": sae_lens,
    "sae-lens-clamp": sae_clamp("standard"),
    "sae-lens-clamp-jumprelu": sae_clamp("jumprelu"),
    "heretic": heretic,
}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("precision", request["precision"])
    assert spec is not None and spec.loader is not None
    precision = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(precision)
    tokens = torch.tensor(request["tokens"])
    for base in request["bases"]:
        out = Path(base["out"])
        plain = Subject(base, tokens, out)
        with torch.no_grad(), precision.double_precision():
            found = {"base": plain.logits(plain.model())}
            for name, case in CASES.items():
                folder = out / name
                folder.mkdir(parents=True)
                found[name] = case(Subject(base, tokens, folder)).contiguous()
        save_file(found, out / "logits.safetensors")


if __name__ == "__main__":
    main()
