"""What a configuration that nobody vouches for may cost: time at a regular expression, memory.

Keys of an adapter's configuration are regular expressions that PEFT matches with the path of every
module. One that backtracks without end would never return, and Python cannot interrupt it: unless
it is a plain path, it is tried in a process of its own first.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from bake.errors import InputError

_SECONDS = 10.0
_PATH = re.compile(r"[\w.-]*")
"""Nothing of it repeats, so that nothing can be matched in many ways."""
_TRY = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
for pattern in patterns:
    for path in paths:
        re.match(pattern, path)
"""


def check_patterns(config: Mapping[str, Any], paths: Sequence[str], where: str) -> None:
    """Require that the regular expressions of an adapter can be matched, in seconds.

    Mirrors how PEFT 0.21 makes them: ``peft/tuners/tuners_utils.py: check_target_module_exists``,
    ``peft/utils/other.py: get_pattern_key`` and ``match_target_against_key``.

    Args:
        config: the adapter's configuration.
        paths: of the modules that they are matched with.
        where: the file, for messages.

    Raises:
        InputError: one is no regular expression, or takes more than ten seconds.
    """
    patterns = [whole for given, whole in _patterns(config) if not _PATH.fullmatch(given)]
    if not patterns:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=json.dumps([patterns, list(paths)]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"the regular expressions of the adapter take more than {_SECONDS:.0f} seconds",
            where=where,
            why=f"they are matched with the paths of {len(paths)} modules: {', '.join(patterns)}",
            fix="write the paths of the modules in their place",
        ) from error
    if done.returncode:
        raise InputError(
            "the adapter's configuration holds what is no regular expression: "
            + ", ".join(patterns),
            where=where,
            why=(done.stderr.strip().splitlines() or ["no reason was given"])[-1],
        )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a configuration gives, each with what PEFT makes of it."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield config[key], config[key]
    for key in ("rank_pattern", "alpha_pattern"):
        yield from ((given, rf"(.*\.)?({given})$") for given in config.get(key) or {})
    for given in map(str, config.get("modules_to_save") or ()):
        yield given, rf"(^|.*\.){given}($|\..*)"
    layers = config.get("layers_pattern") or ()
    for given in map(str, [layers] if isinstance(layers, str) else layers):
        yield given, rf"(?:^|.*?\.){given}\.(?P<idx>\d+)\."


class _Counted(TorchFunctionMode):
    """Counts the tensors that are made, and stops at too many."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it would make far more tensors than the checkpoint holds")
        return func(*args, **(kwargs or {}))


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Let torch make no more than some hundred tensors for each one of a checkpoint.

    Raises:
        ValueError: more are made: the configuration speaks of another model than the files.
    """
    with _Counted(10_000 + 200 * tensors):
        yield
