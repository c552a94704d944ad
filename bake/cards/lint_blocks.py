"""Blocks of code in a card: each has to parse in its language. None of it is run."""

import ast
import json
import shlex
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Iterator

from bake.artifact.names import CARD, Problem
from bake.cards.markdown import Block
from bake.cards.text import printable

_MANY = 1000  # more than any card has, and few enough to look at
_SHELLS = ("sh", "bash", "shell", "console")


def lint_blocks(blocks: tuple[Block, ...]) -> Iterator[Problem]:
    """Yield the blocks of code that are not of their language."""
    if len(blocks) > _MANY:
        yield Problem(CARD, f"has {len(blocks)} blocks of code")
        return
    for number, block in enumerate(blocks, start=1):
        error = _parse(block)
        if error is not None:
            language = printable(block.language)
            yield Problem(
                CARD, f"has a block of code that is no {language} (number {number}): {error}"
            )


def _parse(block: Block) -> str | None:
    """Return why a block is not of its language, or None."""
    try:
        match block.language:
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case "python" | "py":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of escapes in strings, say
                    ast.parse(block.text)
            case _ if block.language in _SHELLS:
                return _parse_shell(block.text)
    except (
        ValueError,
        SyntaxError,
        RecursionError,
        MemoryError,
        subprocess.TimeoutExpired,
    ) as error:
        return printable(str(error), 100)
    return None


def _parse_shell(text: str) -> str | None:
    """Return what the shell finds wrong; it reads the text and runs nothing."""
    shell = shutil.which("bash")
    if shell is None:
        shlex.split(text, comments=True)
        return None
    done = subprocess.run(
        [shell, "--norc", "--noprofile", "-n"],
        input=text,
        capture_output=True,
        text=True,
        timeout=10,
        env={},
    )
    return None if done.returncode == 0 else printable(done.stderr, 100)
