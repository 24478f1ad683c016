"""A report as one HTML page that opens from disk: no network, no file beside it. Plotly draws the curves (docs/decisions/0016).

Everything that a run says is text here: escaped by Jinja, or data that the page's script reads as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.progress import duration
from training.errors import InputError

_TEMPLATES = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="muster report">'
"""By which a report is known again."""


def write(report: Mapping[str, Any], out: Path) -> Path:
    """Write the page. A report that stands there is replaced. Raises InputError for a file of another kind, or that cannot be written."""
    try:
        if out.is_dir():
            raise InputError.of(str(out), "is a folder; give a file such as report.html", "--out")
        if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise InputError.of(str(out), "is there and is no report; choose another file", "--out")
        html = render(report)
        draft = out.with_name(f".{out.name}.tmp")
        draft.write_text(html, encoding="utf-8")
        draft.replace(out)
    except OSError as error:
        raise InputError.of(str(out), f"cannot be written: {error.strerror or error}", "--out") from error
    return out


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
    return (
        f"{value:,.0f}"
        if abs(value) >= 1000
        else f"{value:.{digits - 1}g}"
        if abs(value) < 1
        else f"{value:.{digits}g}"
    )


def count(value: float | None) -> str:
    """A large number in words: `1.1 million`."""
    if value is None:
        return "–"
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"
