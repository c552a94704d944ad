"""Let three models speak: the base, the base under hooks, and the baked checkpoint.

    python recipes/quickstart/generate.py out/quickstart

The baked one is loaded as any user would load it. Under hooks and baked, the words are the same.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from bake.checkpoints import open_checkpoint
from bake.steer import steered
from bake.verify.artifact import open_baked
from bake.verify.models import layout_of

HERE = Path(__file__).resolve().parent
SAD, NEW_TOKENS = (1, 5, 6), 40  # the prompts that the base model goes on with sadly


def main() -> None:
    """Print one row a prompt, one column a model."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    out = Path(sys.argv[1])
    base, baked = load(HERE / "model"), load(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    layout, edits = layout_of(open_checkpoint(HERE / "model")), open_baked(out).edits
    table = Table("base", "base under hooks", "baked", title="Greedy text", show_lines=True)
    prompts = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()
    for prompt in (prompts[index] for index in SAD):
        before = speak(base, tokenizer, prompt)
        with steered(base, layout, edits):
            hooked = speak(base, tokenizer, prompt)
        table.add_row(before, hooked, speak(baked, tokenizer, prompt))
    Console().print(table)


def load(path: Path) -> PreTrainedModel:
    """Return a model in float32, in eval mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def speak(model: PreTrainedModel, tokenizer: object, prompt: str) -> str:
    """Return the prompt with its greedy continuation."""
    tokens = tokenizer(prompt, return_tensors="pt")  # type: ignore[operator]
    made = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(made[0], skip_special_tokens=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
