"""The statistics of a data set as one page for people and one JSON file for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from osum_npu.data.statistics import Statistics
from osum_npu.files import write_text

SHOWN = 200
"""Duplicates and faults named on the page; the JSON file names all."""
_WIDTH, _HEIGHT = 800, 220


def write_statistics(found: Statistics, out: Path) -> Path:
    """Write ``stats.json`` and ``stats.html`` into the folder ``out``.

    Returns:
        The path of ``stats.html``: one file that needs no network.

    Raises:
        ValueError: the page needs jinja2, which is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ValueError("the page needs jinja2: pip install 'osum-npu[eval]'") from error
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "stats.json", json.dumps(asdict(found), ensure_ascii=False, indent=1) + "\n")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("osum_npu.data").joinpath("statistics.html.j2").read_text("utf-8")
    highest = max(count for _, count in found.histogram)
    bar = _WIDTH / len(found.histogram)
    page = environment.from_string(template).render(
        found=found,
        same_keys=[f"{key}: {', '.join(paths)}" for key, paths in found.same_key.items()],
        same_sounds=[", ".join(group) for group in found.same_sound],
        shown=SHOWN,
        size=(_WIDTH, _HEIGHT),
        bars=[
            (round(i * bar, 2), round(_HEIGHT * (1 - count / highest), 2), round(bar - 1, 2), start, count)
            for i, (start, count) in enumerate(found.histogram)
        ],
        ticks=[(round(i * bar, 2), f"{found.histogram[i][0]:.1f}") for i in range(0, len(found.histogram), 5)],
    )
    write_text(out / "stats.html", page)
    return out / "stats.html"
