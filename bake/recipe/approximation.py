"""``[calibrate]`` and ``[verify]``: how stand-ins are fitted, and what they are held to."""

from pathlib import Path

from bake.errors import UsageError
from bake.recipe.base import local_path
from bake.recipe.section import Section
from bake.recipe.spec import CalibrateSpec, VerifySpec

TOKENS, RANK = 128, 8  # of a calibration, where the recipe does not say


def read_verify(table: Section) -> VerifySpec:
    """Return the limits of ``[verify]``.

    Raises:
        UsageError: an unknown key, or a limit that nothing can meet.
    """
    most_kl = table.optional("most_kl", float)
    table.close()
    if most_kl is not None and most_kl <= 0:
        raise UsageError(
            f"most_kl = {most_kl} is not above zero",
            where=table.where,
            why="it is what KL(hooked ‖ baked) may be of KL(hooked ‖ base), and no plan that is "
            "not exact reaches 0",
        )
    return VerifySpec(most_kl)


def read_calibrate(table: Section, folder: Path) -> CalibrateSpec | None:
    """Return how ``[calibrate]`` has stand-ins fitted, or None where there is no such table.

    Args:
        table: ``[calibrate]``.
        folder: the recipe's own, which the texts' path is taken from.

    Raises:
        UsageError: a missing or unknown key, or a number below its least.
    """
    if table.empty:
        return None
    prompts = table.take("prompts", str)
    tokens = table.take("tokens", int, TOKENS)
    rank = table.take("rank", int, RANK)
    corrections = table.optional("corrections", int)
    constant = table.take("constant", bool, True)
    table.close()
    for key, value, least in (
        ("tokens", tokens, 1),
        ("rank", rank, 1),
        ("corrections", corrections, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{key} = {value} is below {least}", where=table.where)
    path = local_path(folder, prompts, table.where)
    return CalibrateSpec(prompts, path, tokens, rank, corrections, constant)
