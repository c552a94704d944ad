"""``Report``: what a verification measured, against which limits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number; ``passed`` is None where nothing is demanded of it."""

    name: str
    value: float
    limit: float | None
    passed: bool | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A verification of one artifact."""

    artifact: str
    base: str
    plan_digest: str
    exactness: str
    dtype: str
    rows: tuple[Row, ...]
    environment: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether something was demanded, and every demand was met."""
        verdicts = [row.passed for row in self.rows if row.passed is not None]
        return bool(verdicts) and all(verdicts)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "environment": dict(self.environment), "passed": self.passed}
