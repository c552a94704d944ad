"""The quickstart's text, model and direction: made by the scripts beside them, and good enough."""

import importlib.util
import json
import math
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.directions import Role, read_directions

FOLDER = Path(__file__).parents[1] / "recipes" / "quickstart"
MODEL = FOLDER / "model"
FRESH_SEED = 977
"""No script of the quickstart draws from this seed."""


def _script(name: str) -> ModuleType:
    """Load a script of the quickstart under the name by which the others import it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


stories = _script("stories")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return _script("train")


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    return _script("fit")


@pytest.fixture(scope="module")
def measure(fit: ModuleType) -> ModuleType:
    return _script("measure")


@pytest.fixture(scope="module")
def quickstart(fit: ModuleType) -> Any:
    return fit.Quickstart(MODEL)


@pytest.fixture(scope="module")
def pieces() -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


# ── stories ────────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_writes_the_same_stories_and_another_seed_others() -> None:
    first, again, other = (stories.write_stories(seed, 50) for seed in (1, 1, 2))
    assert first == again
    assert not {story.text for story in first} & {story.text for story in other}


def test_stories_hardly_ever_repeat() -> None:
    texts = [story.text for story in stories.write_stories(FRESH_SEED, 2000)]
    assert len(set(texts)) == len(texts)


def test_moods_are_balanced_and_share_no_mood_word() -> None:
    written = stories.write_stories(FRESH_SEED, 1000)
    assert Counter(story.mood for story in written) == {"happy": 500, "sad": 500}
    assert not stories.mood_words("happy") & stories.mood_words("sad")
    for story in written:
        other = "sad" if story.mood == "happy" else "happy"
        assert stories.mood_words(story.mood) & set(_words(story.text)), story.text
        assert not stories.mood_words(other) & set(_words(story.text)), story.text


def test_the_other_attributes_are_independent_of_the_mood() -> None:
    # Each count is a sum of n independent draws, half of which are happy: four standard deviations.
    written = stories.write_stories(FRESH_SEED, 4000)
    for name in ("place", "animal", "weather", "problem", "ending"):
        both: dict[str, Counter[str]] = {}
        for story in written:
            both.setdefault(getattr(story, name), Counter())[story.mood] += 1
        assert len(both) >= 5
        for value, counts in both.items():
            spread = 4 * math.sqrt(counts.total()) / 2
            assert abs(counts["happy"] - counts.total() / 2) < spread, (name, value, counts)


def test_a_story_keeps_its_attributes_and_fills_every_slot() -> None:
    for story in stories.write_stories(FRESH_SEED, 500):
        assert story.hero in story.text and story.animal in story.text
        assert "{" not in story.text and "  " not in story.text
        assert not re.search(r"\b[Aa] [aeiou]", story.text), story.text
        assert re.fullmatch(r"[A-Z\"].*[.\"]", story.text)


def test_an_object_is_spoken_of_only_once_it_has_been_seen() -> None:
    names = "|".join(stories.grammar()["objects"]["names"])
    for story in stories.write_stories(FRESH_SEED, 1000):
        spoken = re.search(rf"\bthe ({names})\b", story.text)
        if spoken is not None:
            before = story.text[: spoken.start()]
            assert re.search(rf"\ban? (\w+ )*{spoken.group(1)}\b", before), story.text


def test_prompts_say_nothing_of_the_mood() -> None:
    prompts = stories.write_prompts(FRESH_SEED, 200)
    assert len(set(prompts)) == 200
    for prompt in prompts:
        moods = stories.mood_words("happy") | stories.mood_words("sad")
        assert not moods & set(_words(prompt)), prompt


def test_the_shipped_prompts_and_texts_are_those_of_the_script(fit: ModuleType) -> None:
    prompts = (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == stories.write_prompts(fit.PROMPT_SEED, 8)
    texts = (FOLDER / "eval.txt").read_text(encoding="utf-8").splitlines()
    held_out = stories.write_stories(fit.HELD_OUT_SEED, 64)
    assert texts == [story.text for story in held_out]


# ── tokenizer ──────────────────────────────────────────────────────────────────────────────────


def test_both_tokenizers_agree_and_lose_nothing(pieces: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [story.text for story in stories.write_stories(FRESH_SEED, 300)]
    # Letters, digits and spacing that no story has go through the byte pieces. No text begins with
    # a space: transformers' LlamaTokenizer puts no second one before it, SentencePiece does.
    texts += ["Zoë drew 17 naïve ☂ and ran\n\tfast", "two  spaces   three "]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == [pieces.bos_id(), *pieces.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert pieces.decode(ids[1:]) == text
    assert len(tokenizer) == pieces.vocab_size()
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2)


def test_stories_need_no_unknown_and_no_byte_piece(pieces: Any) -> None:
    for story in stories.write_stories(FRESH_SEED, 300):
        assert not any(pieces.is_byte(i) or pieces.is_unknown(i) for i in pieces.encode(story.text))


# ── model ──────────────────────────────────────────────────────────────────────────────────────


def test_the_checkpoint_loads_whole_and_says_what_runtimes_need() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not any(name.endswith(".bias") for name in model.state_dict())
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is True
    assert config["attention_bias"] is False and config["mlp_bias"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_the_weights_are_float32_in_shards() -> None:
    index = json.loads((MODEL / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) >= 2
    for shard in shards:
        with safe_open(MODEL / shard, framework="pt") as file:
            names = list(file.keys())
            assert all(file.get_slice(name).get_dtype() == "F32" for name in names)
            assert all(index["weight_map"][name] == shard for name in names)


def test_everything_shipped_is_small() -> None:
    files = [
        path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert max(path.stat().st_size for path in files) < 5_000_000
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def _cross_entropy(rows: list[list[int]], seen: list[list[int]], size: int) -> float:
    """Nats per token of the unigram model of `seen` on `rows`, each piece counted once more."""
    counts = Counter(token for row in seen for token in row[1:])
    total = counts.total() + size
    spent = [-math.log((counts[token] + 1) / total) for row in rows for token in row[1:]]
    return sum(spent) / len(spent)


def _bigram_cross_entropy(rows: list[list[int]]) -> float:
    """Nats per token of the bigram model fitted on `rows` themselves: no bigram model does better.

    A model below it has looked further back than one token.
    """
    pairs = Counter(pair for row in rows for pair in pairwise(row))
    firsts = Counter(token for row in rows for token in row[:-1])
    return -sum(n * math.log(n / firsts[a]) for (a, _), n in pairs.items()) / pairs.total()


@torch.no_grad()
def test_the_model_predicts_fresh_stories_better_than_any_bigram_model(
    quickstart: Any, pieces: Any, train: ModuleType
) -> None:
    def encode(seed: int, count: int) -> list[list[int]]:
        written = stories.write_stories(seed, count)
        return [[train.BOS, *pieces.encode(story.text), train.EOS] for story in written]

    rows, seen = encode(FRESH_SEED, 150), encode(train.TRAINING_SEED, 1000)
    unigram = _cross_entropy(rows, seen, pieces.vocab_size())
    bigram = _bigram_cross_entropy(rows)
    trained = train.held_out_loss(quickstart.model, rows)
    untrained = train.held_out_loss(train.build_model().eval(), rows)
    assert trained < bigram < unigram < untrained
    assert math.exp(trained) < math.exp(unigram) / 10


@torch.no_grad()
def test_the_model_remembers_who_and_where(quickstart: Any, pieces: Any) -> None:
    # Where the text names the place or the animal again and the model expects one of their kind,
    # it expects the right one. A model without memory picks one of sixteen.
    groups = {name: set(stories.grammar()[name]) for name in ("places", "animals")}
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for story in stories.write_stories(FRESH_SEED, 100):
        ids = [1, *pieces.encode(story.text)]
        guesses = quickstart.model(input_ids=torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
        words = [pieces.id_to_piece(i).strip("▁") for i in ids]
        expected = [pieces.id_to_piece(i).strip("▁") for i in guesses]
        for name, group in groups.items():
            named = {story.place, story.animal} & group
            for position in range(1, len(words)):
                again = words[position] in named and words[position] in words[:position]
                if again and expected[position - 1] in group:
                    asked[name] += 1
                    right[name] += expected[position - 1] == words[position]
    for name in groups:
        assert asked[name] > 50
        assert right[name] / asked[name] > 0.9, (name, right, asked)


# ── direction ──────────────────────────────────────────────────────────────────────────────────


def test_the_direction_is_in_bakes_own_format(quickstart: Any) -> None:
    directions = read_directions(FOLDER / "mood.safetensors")
    assert directions.concept == "mood"
    assert [item.layer for item in directions.items] == list(range(6))
    for item in directions.items:
        assert item.site == f"resid_post.{item.layer}"
        assert set(item.tensors) == {Role.VECTOR, Role.MEAN}
        assert item.width == quickstart.model.config.hidden_size
        assert all(tensor.dtype == torch.float32 for tensor in item.tensors.values())


def _area(scores: Tensor, happy: Tensor) -> float:
    """Probability that a happy story's score is above a sad story's."""
    return float((scores[happy][:, None] > scores[~happy][None]).double().mean())


def test_the_direction_separates_fresh_stories_and_a_shuffled_one_does_not(
    quickstart: Any, measure: ModuleType
) -> None:
    written = stories.write_stories(FRESH_SEED, 120)
    outputs = [quickstart.block_outputs(story.text)[measure.LAYER] for story in written]
    activations = torch.stack([positions.mean(dim=0) for positions in outputs])
    happy = torch.tensor([story.mood == "happy" for story in written])
    vector = measure.read_means(FOLDER / "mood.safetensors").vector[measure.LAYER]
    assert _area(activations @ vector, happy) > 0.95
    # The control is fitted like the direction, on the first half, to labels that say nothing. Its
    # sign is chance, so that only the mean over many shuffles is known: one half.
    half = len(written) // 2
    first, second = activations[:half], activations[half:]
    areas = []
    for seed in range(200):
        mixed = happy[:half][torch.randperm(half, generator=torch.Generator().manual_seed(seed))]
        control = first[mixed].mean(dim=0) - first[~mixed].mean(dim=0)
        areas.append(_area(second @ control, happy[half:]))
    deviation = torch.tensor(areas).std() / math.sqrt(len(areas))
    assert abs(sum(areas) / len(areas) - 0.5) < 4 * deviation


def test_other_stories_give_the_same_direction_and_shuffled_moods_another(quickstart: Any) -> None:
    written = stories.write_stories(FRESH_SEED, 100)
    outputs = [quickstart.block_outputs(story.text).mean(dim=1) for story in written]
    activations = torch.stack(outputs)
    happy = torch.tensor([story.mood == "happy" for story in written])

    def cosines(labels: Tensor) -> Tensor:
        fitted = activations[labels].mean(dim=0) - activations[~labels].mean(dim=0)
        return torch.cosine_similarity(fitted, shipped, dim=-1)

    items = read_directions(FOLDER / "mood.safetensors").items
    shipped = torch.stack([item.tensors[Role.VECTOR] for item in items]).double()
    generators = (torch.Generator().manual_seed(seed) for seed in range(200))
    shuffled = [cosines(happy[torch.randperm(len(happy), generator=g)]) for g in generators]
    # Two hundred draws put the true labels above the 99th percentile of the false ones.
    assert bool((cosines(happy) > torch.stack(shuffled).max(dim=0).values).all())


def _prompts() -> list[str]:
    return (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines()


def test_the_unedited_model_writes_stories_of_one_mood_each(
    quickstart: Any, measure: ModuleType
) -> None:
    happy, sad, mixed = measure.run(quickstart, _prompts(), []).stories
    assert (happy + sad, mixed) == (len(_prompts()), 0)
    assert happy and sad


@pytest.mark.parametrize("mood", ["happy", "sad"])
@pytest.mark.parametrize("kind", ["offset", "affine"])
def test_an_edit_turns_every_greedy_story_and_a_random_direction_does_not(
    quickstart: Any, fit: ModuleType, measure: ModuleType, mood: str, kind: str
) -> None:
    means = measure.read_means(FOLDER / "mood.safetensors")
    noise = torch.randn(means.vector.shape, generator=torch.Generator().manual_seed(1)).double()
    noise *= (means.vector.norm(dim=-1) / noise.norm(dim=-1))[:, None]
    turned = []
    for used in (means, fit.ClassMeans(means.sad + noise, means.sad)):
        if kind == "offset":
            edits = measure.offset(
                quickstart, used, measure.LAYER, 1.0 if mood == "happy" else -1.0
            )
        else:
            alpha = measure.HAPPY if mood == "happy" else measure.SAD
            edits = measure.affine(quickstart, used, measure.LAYER, alpha)
        counts = measure.run(quickstart, _prompts(), edits).stories
        turned.append(counts[("happy", "sad").index(mood)])
    assert turned[0] == len(_prompts())
    assert turned[1] < len(_prompts())


def test_ablation_makes_the_moods_of_one_story_disagree(
    quickstart: Any, measure: ModuleType
) -> None:
    means = measure.read_means(FOLDER / "mood.safetensors")
    edits = measure.affine(quickstart, means, measure.ABLATED_LAYER, None)
    _, _, mixed = measure.run(quickstart, _prompts(), edits).stories
    assert mixed > len(_prompts()) // 2


# ── remaking it ────────────────────────────────────────────────────────────────────────────────


def _few_steps(train: ModuleType, pieces: Any, seed: int) -> list[Tensor]:
    texts = [story.text for story in stories.write_stories(train.TRAINING_SEED, 80)]
    rows = [[train.BOS, *pieces.encode(text), train.EOS] for text in texts]
    model = train.build_model(seed=seed)
    train.train(model, rows, seed=seed)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.slow
def test_training_twice_gives_the_same_weights(train: ModuleType, pieces: Any) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, again, other = (_few_steps(train, pieces, seed) for seed in (1, 1, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_the_tokenizer_is_remade_byte_for_byte(train: ModuleType) -> None:
    texts = [s.text for s in stories.write_stories(train.TRAINING_SEED, train.TOKENIZER_STORIES)]
    shipped = (MODEL / "tokenizer.model").read_bytes()
    assert train.train_tokenizer(texts) == shipped
    assert train.train_tokenizer(texts[:500]) != shipped


@pytest.mark.slow
def test_the_direction_is_remade(fit: ModuleType, quickstart: Any, tmp_path: Path) -> None:
    fit.write(quickstart, tmp_path / "mood.safetensors")
    shipped, again = (read_directions(folder / "mood.safetensors") for folder in (FOLDER, tmp_path))
    for old, new in zip(shipped.items, again.items, strict=True):
        for role, tensor in old.tensors.items():
            # Another processor sums in another order; float32 keeps seven digits of each term.
            scale = float(tensor.abs().max())
            assert torch.allclose(tensor, new.tensors[role], rtol=0, atol=1e-4 * scale)
