"""A comparison as one page for people and one JSON file for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from osum_npu.comparison.training import Curve
from osum_npu.files import write_text
from osum_npu.parity import Row

_WIDTH, _HEIGHT = 420, 160
"""Size of a plot in its own units."""


class Cell(NamedTuple):
    """The worst of one op or module in one dtype."""

    level: str
    name: str
    dtype: str
    provider: str
    cases: int
    forward: str
    gradient: str
    ok: bool
    heat: float
    """Worst error as a share of what is allowed, 0 to 1."""


def summary(rows: Sequence[Row]) -> list[Cell]:
    """Sum up the rows of each op or module, dtype and provider."""

    def place(row: Row) -> tuple[str, str, str, str]:
        return row.level, row.name, row.dtype, row.provider

    return [_cell([*group]) for _, group in groupby(rows, key=place)]


def _cell(rows: list[Row]) -> Cell:
    forward, gradient = (max(rows, key=lambda row, i=i: _share(row, i)) for i in (0, 1))  # type: ignore[misc]
    return Cell(
        level=rows[0].level,
        name=rows[0].name,
        dtype=rows[0].dtype,
        provider=rows[0].provider,
        cases=len(rows),
        forward=f"{forward.forward_error:.1e}",
        gradient="" if rows[0].level == "run" else f"{gradient.gradient_error:.1e}",
        ok=all(row.ok for row in rows),
        heat=min(1.0, max(_share(forward, 0), _share(gradient, 1))),
    )


def _share(row: Row, i: int) -> float:
    error, allowed = (row.forward_error, row.gradient_error)[i], row.tolerance[i]
    if math.isnan(error):
        return math.inf
    return error / allowed if allowed else 0.0


def format_table(rows: Sequence[Row]) -> str:
    """Write the summary as text, with what failed below it."""
    head = ("level", "name", "dtype", "computed by", "cases", "values", "gradients", "")
    lines = [
        (c.level, c.name, c.dtype, c.provider, str(c.cases), c.forward, c.gradient, "ok" if c.ok else "FAILED")
        for c in summary(rows)
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in (head, *lines)]
    return "\n".join([*table, *_failures(rows)])


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if not row.ok:
            why = row.fault or (
                f"values {row.forward_error:.2e} of {row.tolerance[0]:.0e} allowed, "
                f"gradients {row.gradient_error:.2e} of {row.tolerance[1]:.0e}"
            )
            yield f"FAILED {row.level}/{row.name} {row.dtype} {row.provider}, case {row.case}: {why}"


def write_report(rows: Sequence[Row], curves: Sequence[Curve], facts: Mapping[str, str], out: Path) -> Path:
    """Write ``out/parity.json`` and ``out/parity.html``; return the page.

    Args:
        rows: all that was compared.
        curves: losses of trainings.
        facts: device, versions, date and so on, by name.
        out: folder.

    Raises:
        ValueError: the page needs jinja2, which is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ValueError("the page needs jinja2: pip install 'osum-npu[eval]'") from error
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "ok": bool(rows) and all(row.ok for row in rows),
        "facts": dict(facts),
        "rows": [_plain({**asdict(row), "ok": row.ok}) for row in rows],
        "curves": [_plain(asdict(curve)) for curve in curves],
    }
    write_text(out / "parity.json", json.dumps(content, ensure_ascii=False, indent=1))
    template = files("osum_npu.comparison").joinpath("parity.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=f"Parity of {facts.get('device', 'a device')}",
        failures=[*_failures(rows)],
        facts=facts,
        cells=summary(rows),
        count=len(rows),
        plots=[_plot(curve) for curve in curves],
        size=(_WIDTH, _HEIGHT),
    )
    write_text(out / "parity.html", page)
    return out / "parity.html"


def _plain(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not know, by ``null``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _plot(curve: Curve) -> dict[str, Any]:
    """Place the losses of both trainings in one plot."""
    finite = [loss for loss in (*curve.device, *curve.reference) if math.isfinite(loss)]
    low, high = min(finite), max(finite)
    span, last = (high - low) or 1.0, max(1, len(curve.reference) - 1)

    def points(losses: Sequence[float]) -> str:
        placed = (
            (i / last * _WIDTH, (high - loss) / span * _HEIGHT) for i, loss in enumerate(losses) if math.isfinite(loss)
        )
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)

    return {
        "dtype": curve.dtype,
        "steps": len(curve.reference),
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "device": points(curve.device),
        "reference": points(curve.reference),
    }
