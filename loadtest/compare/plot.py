"""The picture of a comparison, run by an environment that has matplotlib: `plot.py RESULTS.json PICTURE.png`.

Imports nothing of this project: it reads the points that `report` prepared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

_COLUMNS = 3


def draw(points: dict[str, dict[str, float]], picture: Path) -> None:
    """A panel for each kind of work, a bar for each contender: tokens per second. `points[work][contender]`."""
    contenders = list(dict.fromkeys(name for bars in points.values() for name in bars))
    colours: dict[str, Any] = dict(zip(contenders, colormaps["tab10"].colors, strict=False))
    columns = min(_COLUMNS, len(points))
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.6))
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(points) :]:
        panel.set_visible(False)
    for panel, (work, bars) in zip(panels.flat, points.items(), strict=False):
        drawn = panel.bar(range(len(bars)), list(bars.values()), color=[colours[name] for name in bars])
        panel.bar_label(drawn, fmt="%.0f", fontsize=8)
        panel.set_title(work, fontsize=10)
        panel.tick_params(labelsize=8)
        panel.set_ylabel("tok/s", fontsize=8)
        panel.set_xticks([])
        panel.margins(y=0.15)
    handles = [Rectangle((0, 0), 1, 1, color=colours[name]) for name in contenders]
    figure.legend(handles, contenders, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / rows, 1, 1))
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
