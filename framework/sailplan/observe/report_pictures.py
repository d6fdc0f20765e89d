"""Curves of a report as inline SVG, drawn by matplotlib without a display.

Colours are placeholders that become CSS variables of the page, so that the same picture fits the
light and the dark scheme; text stays text. Long series are averaged into a few hundred points, so a
report of a million steps stays small.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sailplan.config.fields import Options
from sailplan.observe.report_data import Series

POINTS = 400  # points of a curve
SERIES_COLOURS = 10  # --series-0 .. --series-9 of the page
INK, GRID, SHADE = "#fe0101", "#fe0102", "#fe0103"
_PLACEHOLDERS = {INK: "var(--muted)", GRID: "var(--line)", SHADE: "var(--shade)"}
_PLACEHOLDERS.update(
    {f"#fd00{number:02x}": f"var(--series-{number})" for number in range(SERIES_COLOURS)}
)
_STYLE: Options = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sailplan",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
}
Spans = Sequence[tuple[str, int, int]]


def colour(position: int) -> str:
    return f"#fd00{position % SERIES_COLOURS:02x}"


def thin(series: Series, points: int = POINTS) -> Series:
    """At most `points` values: means of equal runs of neighbours, each at its run's middle step."""
    if len(series) <= points:
        return series
    size = math.ceil(len(series) / points)
    runs = [series[begin : begin + size] for begin in range(0, len(series), size)]
    return [(run[len(run) // 2][0], sum(value for _, value in run) / len(run)) for run in runs]


def smooth(series: Series) -> Series:
    """Centred moving average over about a twelfth of the series: no lag, unlike an exponential
    average.
    """
    half = max(2, len(series) // 24)
    sums = [0.0, *itertools.accumulate(value for _, value in series)]
    result = []
    for position, (step, _) in enumerate(series):
        begin, end = max(0, position - half), min(len(series), position + half + 1)
        result.append((step, (sums[end] - sums[begin]) / (end - begin)))
    return result


def _pieces(series: Series, spans: Spans) -> list[Series]:
    """The series cut at stage edges: what is averaged or joined by a line must belong to one
    stage.
    """
    if not spans:
        return [series]
    return [
        piece
        for _, first, last in spans
        if (piece := [point for point in series if first <= point[0] <= last])
    ]


def _shade(axes: Axes, spans: Spans, names: bool) -> None:
    for position, (name, first, last) in enumerate(spans):
        if position % 2 == 0:
            axes.axvspan(first - 0.5, last + 0.5, facecolor=SHADE, edgecolor="none", zorder=0)
        if names:
            axes.annotate(
                name,
                ((first + last) / 2, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8.5,
            )


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element: ids made unique, colours made variables, no fixed size."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", svg)
    for placeholder, variable in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    clean = re.sub(r'[<>&"]', " ", label)
    return re.sub(r"<svg", f'<svg role="img" aria-label="{clean}"', svg, count=1)


def curves(
    name: str,
    label: str,
    lines: Mapping[str, Series],
    spans: Spans,
    *,
    wide: bool = False,
    smoothed: bool = False,
    markers: bool = False,
    logarithmic: bool = False,
) -> str:
    """One picture with a line per series and the stages shaded behind; "" when there is nothing
    to draw.

    name: unique in the page, used for element ids. smoothed: thin raw values behind their moving
    average, cut at stage edges.
    markers: points on the values (few values, as of evaluations). Values that are not positive are
    left out of a logarithmic picture.
    """
    kept = {
        title: [point for point in series if not logarithmic or point[1] > 0]
        for title, series in lines.items()
    }
    kept = {title: series for title, series in kept.items() if series}
    if not kept:
        return ""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(10.2, 3.3) if wide else (4.9, 2.5), layout="constrained")
        axes = figure.add_subplot()
        _shade(axes, spans, names=wide)
        for position, (title, series) in enumerate(kept.items()):
            for number, piece in enumerate([series] if markers else _pieces(series, spans)):
                shown = title if number == 0 else "_hidden"
                if smoothed and len(piece) > 3:
                    raw = thin(piece)
                    axes.plot(
                        *zip(*raw, strict=True), color=colour(position), linewidth=0.7, alpha=0.28
                    )
                    piece = smooth(piece)
                x, y = zip(*thin(piece), strict=True)
                axes.plot(
                    x,
                    y,
                    color=colour(position),
                    linewidth=1.6,
                    marker="o" if markers else None,
                    markersize=3.5,
                    label=shown,
                    clip_on=not markers,
                )
        if logarithmic:
            axes.set_yscale("log")
        axes.grid(True, axis="y", linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9 if wide else 5, integer=True))
        axes.tick_params(length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        if spans:
            axes.set_xlim(
                spans[0][1] - 0.5, spans[-1][2] + 0.5
            )  # all pictures of a page share the axis
        if len(kept) > 1:
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(1.0, 1.02),
                frameon=False,
                fontsize=8.5,
                handlelength=1.2,
            )
        return _svg(figure, name, label)
