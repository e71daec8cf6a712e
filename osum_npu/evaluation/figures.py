"""Pictures of the report: spectrograms as PNG, learning curves as SVG in the colours of the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

CURVES = {"loss": "Loss", "ctc_loss": "CTC loss", "learning_rate": "Learning rate"}
"""Columns of a training log that are drawn, with their titles."""

POINTS = 300
"""Points of a curve; a longer log is averaged down to them, which also steadies it."""

_PAGE_COLOURS = {"#010101": "var(--muted)", "#020202": "var(--accent)", "#030303": "var(--line)"}
"""Colours matplotlib is given, and the style variables of the page that take their place."""
_TEXT, _CURVE, _RULE = _PAGE_COLOURS


class Curve(NamedTuple):
    """One learning curve."""

    title: str
    svg: str


def stage_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the stages of a training log in the order they were run."""
    return [str(stage) for stage, _ in groupby(row.get("stage", "") for row in rows)]


def learning_curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Draw each of :data:`CURVES` that the log holds against the step, with numbered stages.

    Args:
        rows: rows of a training log in order of ``step``, which counts on over the stages; each has ``stage`` and any
            of the columns. Values that are absent, ``None`` or not finite are passed over.
    """
    stages = [[*group] for _, group in groupby(rows, key=lambda row: row.get("stage", ""))]
    curves = []
    for column, title in CURVES.items():
        lines = [_line(stage, column, POINTS * len(stage) // len(rows)) for stage in stages]
        if any(len(line) > 1 for line in lines):
            curves.append(Curve(title, _draw(lines, [stage[0]["step"] for stage in stages], rows[-1]["step"])))
    return curves


def _line(rows: Sequence[Mapping[str, Any]], column: str, points: int) -> npt.NDArray[np.float64]:
    """Return ``[n, 2]``: step and value, averaged over equal stretches."""
    seen = [(row["step"], row[column]) for row in rows if row.get(column) is not None and math.isfinite(row[column])]
    values = np.asarray(seen, dtype=float).reshape(-1, 2)
    stretches = np.array_split(values, min(len(values), max(2, points)) or 1)
    return np.array([stretch.mean(axis=0) for stretch in stretches if len(stretch)]).reshape(-1, 2)


def _draw(lines: Sequence[npt.NDArray[np.float64]], starts: Sequence[int], end: int) -> str:
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    with _drawing(4.6) as (axes, finish):
        for line in lines:
            axes.plot(line[:, 0], line[:, 1], color=_CURVE, linewidth=1.3, solid_joinstyle="round")
        for number, start in enumerate(starts, 1):
            if number > 1:
                axes.axvline(start, color=_TEXT, linewidth=0.7, dashes=(3, 3))
            if len(starts) > 1:
                axes.text(start, 1.02, str(number), transform=axes.get_xaxis_transform(), color=_TEXT, fontsize=8)
        axes.set_xlim(starts[0], end)
        axes.set_xlabel("step", color=_TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        return finish()


def rate_bars(rates: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Draw shares as bars with their intervals, in groups.

    Args:
        rates: by name of the group and of the bar, ``rate`` (0 to 1, or ``None``) and ``interval``.

    Returns:
        An SVG in the colours of the page. The bars of a group are the page's grey and accent, in order.
    """
    from matplotlib.ticker import PercentFormatter

    bars = list(dict.fromkeys(name for group in rates.values() for name in group))
    width = 0.8 / max(1, len(bars))
    with _drawing(max(3.0, 0.9 * len(rates) + 1.2)) as (axes, finish):
        for number, name in enumerate(bars):
            found = [(i, group[name]) for i, group in enumerate(rates.values()) if group.get(name, {}).get("interval")]
            heights = np.array([bar["rate"] for _, bar in found], dtype=float)
            intervals = np.array([bar["interval"] for _, bar in found], dtype=float).reshape(-1, 2)
            axes.bar(
                [i + (number - (len(bars) - 1) / 2) * width for i, _ in found],
                heights,
                width * 0.9,
                yerr=np.clip([heights - intervals[:, 0], intervals[:, 1] - heights], 0, None),
                color=_CURVE if name == bars[-1] else _TEXT,
                ecolor=_TEXT,
                capsize=3,
                label=name,
            )
        axes.set_ylim(0, 1)
        axes.set_xticks(range(len(rates)), list(rates))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if len(bars) > 1:
            axes.legend(frameon=False, labelcolor=_TEXT, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(bars))
        return finish()


@contextmanager
def _drawing(width: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Give axes to draw on and what then makes an SVG in the colours of the page of them."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, so that the browser sets it in the page's own type; ids and metadata are the same every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "osum-npu", "font.size": 9}):
        figure = Figure(figsize=(width, 2.7), layout="constrained")
        axes = figure.add_subplot()

        def finish() -> str:
            axes.grid(axis="y", color=_RULE, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(colors=_TEXT, length=0)
            for side, spine in axes.spines.items():
                spine.set_visible(side == "bottom")
                spine.set_color(_RULE)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            svg = stream.getvalue()
            svg = svg[svg.index("<svg") :]
            for given, page in _PAGE_COLOURS.items():
                svg = svg.replace(given, page)
            return svg

        yield axes, finish


def spectrogram(mel: npt.NDArray[np.float32]) -> str:
    """Draw a log-mel spectrogram, low frequencies at the bottom.

    Args:
        mel: ``[frames, n_mels]``, on any scale.

    Returns:
        A PNG of a pixel a value, as a ``data:`` address.
    """
    import matplotlib
    from PIL import Image

    mel = np.nan_to_num(mel)
    low, high = np.percentile(mel, [1, 99.9])
    shades = np.clip((mel - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    # A palette needs a third of the bytes of colour pixels.
    image = Image.fromarray(np.ascontiguousarray(shades.T[::-1]))
    image.putpalette(matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3].tobytes())
    stream = io.BytesIO()
    image.save(stream, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
