"""A report as one HTML page that opens from disk: no network, no file beside it.
Plotly draws the curves (docs/decisions/0016).

Everything that a run says is text here: escaped by Jinja, or data that the page's script reads as JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.driver.progress import duration
from training.errors import InputError

_TEMPLATES = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="muster report">'
"""By which a report is known again."""


def write(report: Mapping[str, Any], out: Path) -> Path:
    """Write the page. A report that stands there is replaced. Raises InputError for a file of another kind,
    or that cannot be written."""
    try:
        if out.exists() and not out.is_file():
            raise InputError.of(str(out), "is not a file; give a file such as report.html", "--out")
        if out.exists() and not _is_ours(out):
            raise InputError.of(str(out), "exists and is not a report; choose a different file", "--out")
        html = render(report)
        place = out.resolve()
        with tempfile.NamedTemporaryFile(
            "w", dir=place.parent, prefix=f".{place.name}.", encoding="utf-8", delete=False
        ) as draft:
            try:
                draft.write(html)
                draft.close()
                Path(draft.name).chmod(0o644)
                os.replace(draft.name, place)
            except BaseException:
                Path(draft.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise InputError.of(str(out), f"cannot be written: {error.strerror or error}", "--out") from error
    return out


def _is_ours(file: Path) -> bool:
    """A report, or nothing at all."""
    with file.open("rb") as opened:
        begin = opened.read(4096)
    return not begin or MARK.encode() in begin


def render(report: Mapping[str, Any]) -> str:
    """The page."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"figure": figure, "duration": duration, "count": count}
    drawn = {
        "charts": report["charts"],
        "spent_on": report["spent_on"],
        "runs": [_drawn(run) for run in report["runs"]],
    }
    return environment.get_template("report.html").render(
        report=report,
        mark=MARK,
        data=_embedded(drawn),
        css=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        js=(_TEMPLATES / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def _drawn(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the script needs of a run."""
    told = {name: run[name] for name in ("name", "stretches", "moments", "length")}
    return {**told, "phases": [{"name": p["name"], "key": p["key"], "time": p["time"]} for p in run["phases"]]}


def _embedded(data: Any) -> str:
    """JSON that stands in a script element and cannot end it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def figure(value: float | None, fraction: bool = False, digits: int = 4) -> str:
    """A number for people: `84.5 %`, `0.0028`, `1,234`."""
    if value is None:
        return "–"
    if fraction:
        return f"{100 * value:.1f} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits - (abs(value) < 1)}g}"


def count(value: float | None) -> str:
    """A large number in words: `1.1 million`."""
    if value is None:
        return "–"
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"
