"""Write a report to disk: verify.json, verify.md, the plots, and one page of them all."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from bake.verify.html import page
from bake.verify.markdown import markdown
from bake.verify.plots import draw, titles
from bake.verify.report import Report

JSON, MARKDOWN, HTML, PLOTS = "verify.json", "verify.md", "verify.html", "plots"


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
        UsageError: plots or a page are wanted, and matplotlib is not installed.
    """
    drawn = html or (find_spec("matplotlib") is not None if plots is None else plots)
    # A folder's own place on this machine says nothing to whoever reads the record.
    report = replace(report, artifact=Path(report.artifact).name)
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


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")
