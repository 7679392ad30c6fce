"""One look for every figure: colours that colour-blind readers can tell apart, few lines, legible at page width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_ssl.files import written_beside

# Okabe and Ito's palette (2008) with a darker yellow, then two further greys.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A100", "#000000", "#777777", "#AAAAAA")
QUIET = "#C8C8C8"
MODALITY_COLOURS = dict(
    zip(("t1", "t2", "flair", "dwi", "pd", "adc", "t1c", "t2s", "swi", "unknown"), PALETTE, strict=True)
)


@contextmanager
def figure(path: Path, size: tuple[float, float], **options: Any) -> Iterator[Figure]:
    """Yield a figure of `size` (inches) in this style; when the block succeeds, write it to `path`.

    Args:
        options: passed to :class:`matplotlib.figure.Figure`. No window system is touched.
    """
    with mpl.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "savefig.dpi": 150,
        }
    ):
        drawing = Figure(figsize=size, **{"layout": "constrained", **options})
        yield drawing
        with written_beside(path) as temporary:
            drawing.savefig(temporary)


def colour_of(name: str, names: Iterable[str]) -> str:
    """Return the fixed colour of a modality, else one by the place of `name` in `names`."""
    return MODALITY_COLOURS.get(name) or PALETTE[list(names).index(name) % len(PALETTE)]


def without_scales(axes: Axes) -> None:
    """Leave only what is drawn: for axes whose coordinates mean nothing (a t-SNE map)."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
