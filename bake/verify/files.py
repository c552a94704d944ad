"""Write a report to disk: verify.json, verify.md, the plots, and one page of them all."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bake.errors import UsageError
from bake.verify.html import page
from bake.verify.markdown import markdown
from bake.verify.plots import draw, titles
from bake.verify.report import Report

JSON, MARKDOWN, HTML, PLOTS = "verify.json", "verify.md", "verify.html", "plots"
# What stands before the last name of an absolute path. An address (https://…) is none, and neither
# is a fraction or a path from here.
_PLACE = re.compile(
    r"(?<![\w./\\])(?:/(?:[^\s/'\"(),;]+/)*|[A-Za-z]:[\\/]+(?:[^\s\\/'\"(),;]+[\\/]+)*)"
    r"(?=[\w.])"
)


def write_report(
    report: Report, folder: Path, *, plots: bool | None = None, html: bool = False
) -> tuple[Path, ...]:
    """Write a report and return the files.

    Args:
        report: what was measured.
        folder: where; made if it is not there.
        plots: whether to draw; when None, where matplotlib is installed.
        html: whether to write the page as well.

    Raises:
        UsageError: as ``check_place`` says.
    """
    check_place(folder, plots=plots, html=html)
    drawn = html or (_drawable() if plots is None else plots)
    report = placeless(report)
    images = {title: draw(report, title) for title in titles(report)} if drawn else {}
    vectors = {title: draw(report, title, "svg") for title in titles(report)} if html else {}
    folder.mkdir(parents=True, exist_ok=True)
    names = {title: f"{PLOTS}/{_slug(title)}.png" for title in images}
    if images:
        (folder / PLOTS).mkdir(exist_ok=True)
    written = []
    for title, image in images.items():
        written.append(folder / names[title])
        written[-1].write_bytes(image)
    texts = {
        JSON: json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN: markdown(report, names),
        **({HTML: page(report, vectors)} if html else {}),
    }
    for name, text in texts.items():
        written.append(folder / name)
        written[-1].write_text(text, encoding="utf-8")
    return tuple(written)


def check_place(folder: Path, *, plots: bool | None, html: bool) -> None:
    """Require that a report can be written to a folder: known before anything is measured.

    Raises:
        UsageError: plots or a page are wanted and matplotlib is not installed, or the folder or a
            file of an earlier report cannot be written to.
    """
    if (html or plots) and not _drawable():
        raise UsageError(
            "plots need matplotlib, which is not installed",
            fix="install bake-directions[plots], or ask for neither --plots nor --html",
        )
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    earlier = [folder / name for name in (JSON, MARKDOWN, HTML, PLOTS)]
    locked = [p for p in (place, *earlier) if p.exists() and not os.access(p, os.W_OK)]
    if locked or not place.is_dir():
        raise UsageError(
            f"the report cannot be written to {folder}",
            why=f"{locked[0]} is read-only" if locked else f"{place} is a file",
            fix="name another folder with --report",
        )


def _drawable() -> bool:
    return find_spec("matplotlib") is not None


def placeless(report: Report) -> Report:
    """Return a report without a path of this machine: it may be published, and says nothing there.

    A folder or a file keeps its last name.
    """
    artifact = Path(report.artifact)
    name = artifact.resolve().name if artifact.is_dir() else report.artifact
    return replace(
        report,
        artifact=without_paths(name),
        base=without_paths(report.base),
        rows=tuple(replace(row, note=without_paths(row.note)) for row in report.rows),
        prompts=without_paths(report.prompts),
        environment=without_paths(report.environment),
        samples=tuple(
            replace(sample, **{key: without_paths(text) for key, text in asdict(sample).items()})
            for sample in report.samples
        ),
        runtimes=without_paths(report.runtimes),
        effects=without_paths(report.effects),
        text=without_paths(report.text),
        gate=without_paths(report.gate),
    )


def without_paths(value: Any) -> Any:
    """Return JSON values with every absolute path in a text cut down to its last name."""
    if isinstance(value, str):
        return _PLACE.sub("", value)
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_paths(item) for item in value)
    return value


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")
