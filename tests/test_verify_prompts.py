"""What the models are run on, and what is said of the texts that they write."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import bake, base_at, edit, plan_of, vector
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from words import write_tokenizer

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.errors import InputError, UsageError
from bake.jobs.planned import judged
from bake.verify import prompts as module
from bake.verify.greedy import Generated, agreement, as_answered, disagreement, generate
from bake.verify.inputs import SAMPLES
from bake.verify.interval import Interval
from bake.verify.models import load
from bake.verify.prompts import (
    PromptSet,
    built_in,
    default_prompts,
    given_prompts,
    random_prompts,
    read_prompts,
)
from bake.verify.runner import Runner
from bake.verify.runs import batches_of, run
from bake.verify.scores import scorer
from bake.verify.tokenizer import CHAT, PLAIN, load_tokenizer
from bake.verify.verification import Verification


class Tokenizer:
    """One token a character, with a beginning-of-text token 1; the template writes its own."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(
        self, messages: Sequence[Any], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        said = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return said + "<assistant>" * add_generation_prompt


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    made = Tokenizer("a template")
    monkeypatch.setattr(module, "load_tokenizer", lambda out, **_: made)
    return made


def test_bakes_own_prompts_go_through_the_chat_template() -> None:
    chat, plain = built_in(Tokenizer("a template"), 400), built_in(Tokenizer(None), 400)
    assert chat.tokens[0] == ids("<user>What is the capital of Portugal?<assistant>")
    assert plain.tokens[0] == (1, *ids("What is the capital of Portugal?"))
    assert (chat.form, plain.form) == (CHAT, PLAIN)
    assert chat.digest != plain.digest
    assert chat.digest == built_in(Tokenizer("a template"), 400).digest
    cut = built_in(Tokenizer(None), 7)
    assert max(map(len, cut.tokens)) == 7
    assert len({len(tokens) for tokens in plain.tokens}) > 8  # lengths differ
    assert sum(any(token > 0x250 for token in tokens) for tokens in plain.tokens) >= 4


def test_a_folder_without_a_tokenizer_gets_random_tokens(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    assert default_prompts(tmp_path, 56) == random_prompts(56)
    assert {len(prompt) for prompt in random_prompts(56).tokens} == {8, 24, 48}
    assert max(max(prompt) for prompt in random_prompts(56).tokens) < 56
    (tmp_path / "tokenizer.json").write_text("{}")
    assert default_prompts(tmp_path, 56).source == "built-in"


def test_files_of_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("Once\n\n{half} \n")
    found = read_prompts(text, tmp_path)
    assert found == PromptSet(
        "prompts.txt", (ids("<user>Once<assistant>"), ids("<user>{half} <assistant>")), CHAT
    )
    lines = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    entries = [{"prompt": "a"}, {"text": "b"}, {"messages": messages}]
    lines.write_text("\n".join(map(json.dumps, entries)))
    found = read_prompts(lines, tmp_path)
    assert found.tokens == (
        ids("<user>a<assistant>"), (1, *ids("b")), ids("<user>Hi<assistant>"),
    )  # fmt: skip
    assert found.form == "chat template and plain text"
    assert read_prompts(lines, tmp_path, 2).tokens[2] == ids("<u")
    # A base model has no turns to take.
    tokenizer.chat_template = None
    plain = read_prompts(text, tmp_path)
    assert plain.tokens == ((1, *ids("Once")), (1, *ids("{half} ")))
    assert plain.form == PLAIN and plain.digest != read_prompts(text, tmp_path, 3).digest


def test_a_chat_that_ends_in_the_models_words_asks_for_no_more(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    lines.write_text("\n".join(json.dumps({"messages": turns[:n]}) for n in (1, 2)))
    found = read_prompts(lines, tmp_path)
    assert found.tokens == (ids("<user>Hi<assistant>"), ids("<user>Hi<assistant>Yes"))


@pytest.fixture
def real(tmp_path: Path) -> Any:
    return write_tokenizer(tmp_path)


def test_a_tokenizer_is_read_again_where_its_folder_has_changed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    first = load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path) is first
    # A cache may hold links whose files are gone.
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    second = load_tokenizer(tmp_path)
    assert second is not first and second.chat_template != first.chat_template
    with pytest.raises(InputError, match="no tokenizer that transformers loads"):
        load_tokenizer(tmp_path / "missing")


def test_real_text_through_a_real_template(real: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            map(
                json.dumps,
                [
                    {"prompt": "what is bread"},
                    {"text": "what is bread"},
                    {"messages": [{"role": "system", "content": "it"}]},
                ],
            )
        )
    )
    found = read_prompts(tmp_path / "a.jsonl", tmp_path)
    said = [real.convert_ids_to_tokens(list(row)) for row in found.tokens]
    # The template's own system prompt, no second begin-of-text token, and a turn to answer.
    turn = "<|system|> be kind <|end|> <|user|> what is bread <|end|> <|assistant|>"
    assert said[0] == turn.split()
    assert said[1] == "<s> what is bread".split()
    assert said[2] == "<|system|> it <|end|> <|assistant|>".split()
    assert found.form == "chat template and plain text"
    (tmp_path / "b.txt").write_text("what is bread\n")
    whole = read_prompts(tmp_path / "b.txt", tmp_path)
    assert (whole.tokens, whole.form) == (found.tokens[:1], CHAT)
    own = default_prompts(tmp_path, len(real))
    assert own.form == CHAT and len(own.tokens) == 16
    assert {(row[0], row[-1]) for row in own.tokens} == {tuple(found.tokens[0][::9])}
    # Control: without its template the same folder gives plain text.
    (tmp_path / "chat_template.jinja").unlink()
    bare = read_prompts(tmp_path / "b.txt", tmp_path)
    assert (bare.tokens, bare.form) == (found.tokens[1:2], PLAIN)


def test_a_template_that_refuses_a_chat_says_which(real: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "tool", "content": "it"}]}')
    with pytest.raises(InputError, match="does not take this prompt: no such role") as caught:
        read_prompts(tmp_path / "a.jsonl", tmp_path)
    assert "prompt 1" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "the file holds no prompt"),
        ("a.jsonl", "{", "a line is no JSON"),
        ("a.jsonl", "[1]", "a line of the file is no prompt"),
        ("a.jsonl", '{"promt": "a"}', "a line of the file is no prompt"),
        ("a.jsonl", '{"prompt": "a", "text": "b"}', "a line of the file is no prompt"),
        ("a.jsonl", '{"prompt": 3}', "prompt is no text"),
        ("a.jsonl", '{"messages": []}', "messages is no list of role and content"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "messages is no list of role"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(
    name: str, content: str, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name, tmp_path)


def test_messages_need_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        read_prompts(tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(InputError, match="the prompts cannot be read"):
        read_prompts(tmp_path / "absent.txt", tmp_path)
    with pytest.raises(InputError, match="no prompt, or one of them holds no token"):
        given_prompts([[1], []])


# --- scores ---------------------------------------------------------------------


def score(spec: str, texts: Sequence[str]) -> Interval:
    found = scorer(spec)
    return found.interval(found.values(texts))


def test_scores_of_texts(tmp_path: Path) -> None:
    texts = ["I can't do that.", "Sure, here it is.", "SURE thing"]
    found = score("contains:sure", texts)
    assert found.value == pytest.approx(2 / 3)
    script = tmp_path / "count.py"
    script.write_text(
        "import json, sys\nfor line in sys.stdin: print(len(json.loads(line).split()))\n"
    )
    counted = score(f"{sys.executable} {script}", texts)
    assert (counted.value, counted.count) == (pytest.approx(10 / 3), 3)
    half = 1.959964 * math.sqrt(((4 - 10 / 3) ** 2 * 2 + (2 - 10 / 3) ** 2) / 2 / 3)
    assert counted.high - counted.value == pytest.approx(half)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('no model')", "ends with status 1"),
        ("print('yes')", "prints no number"),
        ("print(1)", "prints 1 numbers for 2 texts"),
        ("print(1); print('nan')", "prints 2 numbers for 2 texts"),
    ],
)
def test_a_command_that_gives_no_scores_is_refused(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(body)
    with pytest.raises(InputError, match=message):
        score(f"{sys.executable} {tmp_path / 'bad.py'}", ["a", "b"])


def test_scores_that_say_nothing_are_refused(tmp_path: Path) -> None:
    for spec in ("contains:", "classifier: ", " "):
        with pytest.raises(UsageError):
            score(spec, ["a"])
    with pytest.raises(InputError, match="the classifier cannot be loaded"):
        score(f"classifier:{tmp_path}", ["a"])
    with pytest.raises(InputError, match="the score's command does not run"):
        score(str(tmp_path / "absent"), ["a"])


def test_a_classifier_scores_texts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Tokens
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = Tokens(WordLevel({"[UNK]": 0, "good": 1, "bad": 2, "[PAD]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    )
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    texts = ["good", "bad bad", ""]
    with torch.no_grad():
        want = [
            float(model(**tokenizer(text or " ", return_tensors="pt")).logits.softmax(-1)[0, -1])
            for text in texts[:2]
        ]
    assert score(f"classifier:{tmp_path}", texts[:2]).value == pytest.approx(sum(want) / 2)
    assert abs(want[0] - want[1]) > 1e-4


# --- greedy text -------------------------------------------------------------------------------


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreement([(1, 2, 3), (4, 5, 6)], [(1, 2, 3), (4, 0, 6)]) == 4 / 6
    assert agreement([(1, 2, 3), (4, 5, 6)], [(1, 2, 3), (4, 0)]) == 4 / 6
    made = Generated(((1, 2, 3), (4, 5, 6)), ((9.0, 9.0, 9.0), (9.0, 9.0, 9.0)))
    assert disagreement(made, ((1, 2, 3), (4, 0, 6)), 0.1) == (1, 1)
    assert disagreement(made, made.tokens, 0.1) is None
    # Where the reference was not sure, the rest of that text is not compared.
    unsure = Generated(made.tokens, ((9.0, 9.0, 9.0), (9.0, 0.2, 9.0)))
    assert disagreement(unsure, ((1, 2, 3), (4, 0, 0)), 0.1) is None


def test_a_text_goes_on_behind_its_end_and_asks_for_no_penalty(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Batched, padded and cached, it is the arg-max of a whole pass at every token."""
    base = base_at(tiny_checkpoint("gemma2", dtype=torch.float32))
    live = load(base.checkpoint, torch.float32)
    prompts = random_prompts(base.layout.dims["vocab"]).tokens[:4]
    plain = generate(live, prompts, 12)
    assert {len(tokens) for tokens in plain.tokens} == {12}
    end = plain.tokens[0][2]
    live.model.generation_config = GenerationConfig(eos_token_id=end, repetition_penalty=5.0)
    assert generate(live, prompts, 12).tokens == plain.tokens
    for prompt, tokens in zip(prompts, plain.tokens, strict=True):
        rows = list(prompt)
        for token in tokens:
            logits = run(live, batches_of([rows])).logits[-1]
            assert int(logits.argmax()) == token
            rows.append(token)
    # The control: with hooks it is another text.
    shift = edit(base, "offset", make.offset(5 * vector(base.layout.hidden)), "resid_post.1")
    assert generate(live, prompts, 12, [shift]).tokens != plain.tokens


def test_a_text_that_follows_an_answer_is_known_from_the_run_over_it() -> None:
    """Two answers of two tokens; behind each its last token's own row, which tells nothing."""
    best = torch.tensor([1, 2, 0, 3, 4, 1])
    logits = torch.nn.functional.one_hot(best, 5).float()
    assert as_answered([(1, 2), (3, 4)], logits, 0.4) == [(1, 2), (3, 4)]
    # One that parts is known to the token with which it does, and no further.
    assert as_answered([(1, 2), (3, 3)], logits, 0.4) == [(1, 2), (3, 4)]
    assert as_answered([(0, 2), (3, 4)], logits, 0.4) == [(1,), (3, 4)]
    # A choice that another evaluation may make otherwise tells nothing; a last row may.
    logits[1] = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.0])
    logits[2] = 0.0
    assert as_answered([(1, 2), (3, 4)], logits, 0.34) == [(1, 2), (3, 4)]
    assert as_answered([(1, 2), (3, 4)], logits, 0.36) == [None, (3, 4)]
    assert as_answered([(1, 2), (0, 4)], logits, 0.36) == [None, (3,)]
    assert as_answered([(), (1,)], logits, 0.36) == [(), None]


@pytest.mark.parametrize("spoiled", [False, True], ids=["as exported", "spoiled"])
def test_the_artifacts_own_text_is_what_it_generates(
    spoiled: bool,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that writes the hooked model's answers generates none; one that parts does."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")]
    out = bake(base, plan_of(base, edits), tmp_path / "out")
    if spoiled:
        (shard,) = out.glob("*.safetensors")
        tensors = load_file(shard)
        name = base.layout.unembed.weight
        tensors[name] = torch.cat([tensors[name][:20].flip(0), tensors[name][20:]])
        save_file(tensors, shard, metadata={"format": "pt"})
    found: list[Generated] = []
    real = Runner.stored_text
    monkeypatch.setattr(Runner, "stored_text", lambda *args: found.append(real(*args)) or found[-1])
    said: list[str] = []
    prompts = random_prompts(base.layout.dims["vocab"]).tokens
    report = judged(
        Verification(out, base=str(base.path), prompts=prompts, generate=6, remark=said.append)
    )
    live = load(open_checkpoint(out), torch.float32)
    own, ours = found[0].tokens, generate(live, prompts, 6).tokens
    assert own[:SAMPLES] == ours[:SAMPLES]  # those that the report shows
    assert all(row == text[: len(row)] for row, text in zip(own, ours, strict=True))
    # The others are known as far as they follow the hooked model's, and no further.
    with_hooks = generate(load(base.checkpoint, torch.float32), prompts, 6, edits).tokens
    short = [(row, text) for row, text in zip(own, with_hooks, strict=True) if len(row) < 6]
    assert all(row[:-1] == text[: len(row) - 1] for row, text in short)
    assert all(row[-1] != text[len(row) - 1] for row, text in short)
    assert bool(short) == spoiled
    (same,) = (row.value for row in report.rows if row.name == "same greedy tokens")
    assert (same < 1) == spoiled
    assert ("greedy text of the stored model" in said) == spoiled
