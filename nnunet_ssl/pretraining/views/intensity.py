"""What scanners do to intensities: batched transforms of single-channel volumes, on the device of the data.

Every function takes views (N, X, Y, Z) in float32 and one plain number (or a few) per view, draws nothing, and returns
new views. MONAI's transforms of the same names are the reference; where we differ, the docstring says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_ssl.pretraining.views.transfer import send

BIAS_DEGREE = 3
BIAS_TERMS = tuple(
    (i, j, k)
    for i in range(BIAS_DEGREE + 1)
    for j in range(BIAS_DEGREE + 1 - i)
    for k in range(BIAS_DEGREE + 1 - i - j)
)
"""Degrees along the three axes of the 20 Legendre products in a bias field: all whose sum is up to BIAS_DEGREE."""

SPACE = (1, 2, 3)

Edge = Literal["nearest", "reflect"]
Transform = Callable[[Tensor, Sequence[Any]], Tensor]
"""Takes views and a parameter for each."""


def apply(views: Tensor, transform: Transform, drawn: Mapping[int, Any]) -> None:
    """Put what `transform` makes of the views that drew it in their place; the others keep every bit.

    Args:
        views: (N, X, Y, Z), changed in place.
        transform: one of this module, or like them.
        drawn: parameters by the view's number.
    """
    if not drawn:
        return
    chosen = send(torch.tensor(list(drawn)), views.device)
    views.index_copy_(0, chosen, transform(views.index_select(0, chosen), list(drawn.values())))


def scale_around_mean(views: Tensor, factors: Sequence[float]) -> Tensor:
    """Stretch the intensities of each view around their mean."""
    mean = views.mean(dim=SPACE, keepdim=True)
    return mean + (views - mean) * per_view(factors, views)


def add_noise(views: Tensor, stds: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """Add Gaussian noise; each view's noise follows from its own seed (and the type of device)."""
    generator = torch.Generator(views.device)
    noise = torch.empty_like(views)
    for field, seed in zip(noise, seeds):
        field.normal_(generator=generator.manual_seed(seed))
    return views + noise * per_view(stds, views)


def smooth(
    views: Tensor, sigmas: Sequence[Sequence[float]], *, reach: tuple[float, float] = (4, 0.5), edge: Edge = "nearest"
) -> Tensor:
    """Blur with a Gaussian of one sigma per axis, in voxels.

    MONAI pads with zeros, which darkens the faces of a patch cut out of a brain.

    Args:
        views: (N, X, Y, Z).
        sigmas: (N, 3).
        reach: (a, b): the Gaussian is cut floor(a sigma + b) voxels from its middle; scipy's by default.
        edge: what lies beyond: "nearest", the edge repeats; "reflect", the view is mirrored in its outermost voxels.
    """
    along = zip(zip(*sigmas), views.shape[1:])
    return _filter(views, [_blur_matrices(sigma, size, reach, edge) for sigma, size in along])


def lower_resolution(views: Tensor, zooms: Sequence[float | Sequence[float]], *, mode: str = "nearest") -> Tensor:
    """Sample each view on a coarser grid of `zoom` times its size, and interpolate back, trilinearly.

    Args:
        views: (N, X, Y, Z).
        zooms: N, a number for all axes or one for each.
        mode: of `F.interpolate`, how the coarse voxels are taken: "nearest" or "nearest-exact".
    """
    by_axis = np.array([np.broadcast_to(zoom, 3) for zoom in zooms]).T
    return _filter(
        views,
        [
            torch.stack([_resampling_matrix(size, max(1, round(size * zoom)), mode) for zoom in along])
            for size, along in zip(views.shape[1:], by_axis)
        ],
    )


def bias_field(views: Tensor, coefficients: Sequence[Sequence[float]]) -> Tensor:
    """Multiply each view by exp of a sum of Legendre products over [-1, 1]^3, one coefficient for each of BIAS_TERMS.

    Source: Van Leemput et al., IEEE Trans Med Imaging 18 (1999), 885.
    """
    weights = np.zeros((len(views), *(BIAS_DEGREE + 1,) * 3), np.float32)
    weights[(slice(None), *np.transpose(BIAS_TERMS))] = coefficients
    field = send(torch.from_numpy(weights), views.device)
    for size in views.shape[1:]:
        field = torch.tensordot(field, _legendre(size, views.device), dims=([1], [0]))
    return views * field.exp()


def gibbs(views: Tensor, alphas: Sequence[float]) -> Tensor:
    """Ring: cut the spatial frequencies above (1 - alpha) / sqrt(2) cycles per voxel.

    The cut is a sphere around frequency zero, so the result is real; MONAI's is half a step off centre for even sizes.
    """
    limits = per_view([(1 - alpha) ** 2 / 2 for alpha in alphas], views)
    kept = _squared_frequencies(views.shape[1:], views.device) <= limits
    return torch.fft.irfftn(torch.fft.rfftn(views, dim=SPACE).mul_(kept), s=views.shape[1:], dim=SPACE)


def gamma(views: Tensor, exponents: Sequence[float]) -> Tensor:
    """Bend intensities: the range of each view is brought to [0, 1], raised to the exponent, and brought back."""
    low, high = ends(views)
    extent = high - low
    return low + extent * ((views - low) / extent.clamp_min(1e-7)) ** per_view(exponents, views)


def ends(views: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each view: (N, 1, 1, 1) each."""
    low, high = (end.view(-1, 1, 1, 1) for end in views.flatten(1).aminmax(dim=1))
    return low, high


def per_view(values: Sequence[float], views: Tensor) -> Tensor:
    """A number for each view, on the views' device, in a shape that meets them: (N, 1, 1, 1)."""
    return send(torch.tensor(values, dtype=views.dtype), views.device).view(-1, 1, 1, 1)


def _filter(views: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a linear filter that separates into axes: `matrices[axis]` is (N, size, size), output by input.

    Filters are built as matrices because these hold the edge rule too, and their products are fast on every device;
    grouped 3-D convolutions with a kernel per view are not.
    """
    x, y, z = (send(matrix, views.device) for matrix in matrices)
    n, *size = views.shape
    views = (x @ views.reshape(n, size[0], -1)).view(n, *size)
    views = y[:, None] @ views
    return (views.reshape(n, -1, size[2]) @ z.mT).view(n, *size)


def _blur_matrices(sigmas: Sequence[float], size: int, reach: tuple[float, float], edge: Edge) -> Tensor:
    """Gaussian blurs along an axis of `size` voxels, as matrices (N, size, size)."""
    sigma = torch.tensor(sigmas, dtype=torch.float32)[:, None]
    radius = (reach[0] * sigma + reach[1]).floor()
    taps = torch.arange(-int(radius.max()), int(radius.max()) + 1)
    kernels = torch.exp(-0.5 * (taps / sigma) ** 2) * (taps.abs() <= radius)
    kernels /= kernels.sum(dim=1, keepdim=True)
    columns = torch.arange(size)[:, None] + taps
    if edge == "reflect":
        columns = (size - 1) - ((size - 1) - columns.abs()).abs()
    columns = columns.clamp(0, size - 1)  # the edge gathers the weights beyond it
    columns = columns.expand(len(sigma), -1, -1)
    return torch.zeros(len(sigma), size, size).scatter_add_(2, columns, kernels[:, None].expand_as(columns))


@functools.lru_cache(maxsize=256)
def _resampling_matrix(size: int, coarse: int, mode: str) -> Tensor:
    """Nearest-voxel sampling to `coarse` voxels and linear interpolation back, as a matrix (size, size)."""
    responses = F.interpolate(torch.eye(size)[None], size=coarse, mode=mode)
    return F.interpolate(responses, size=size, mode="linear", align_corners=False)[0].T.contiguous()


@functools.lru_cache(maxsize=16)
def _legendre(size: int, device: torch.device) -> Tensor:
    """Legendre polynomials of degree 0 to BIAS_DEGREE at `size` points from -1 to 1: (BIAS_DEGREE + 1, size)."""
    values = np.polynomial.legendre.legvander(np.linspace(-1, 1, size), BIAS_DEGREE)
    return send(torch.from_numpy(values.T.astype(np.float32)), device)


@functools.lru_cache(maxsize=4)
def _squared_frequencies(size: Sequence[int], device: torch.device) -> Tensor:
    """The squared length of each spatial frequency, in cycles per voxel, in the layout of `torch.fft.rfftn`."""
    frequencies = [*map(torch.fft.fftfreq, size[:-1]), torch.fft.rfftfreq(size[-1])]
    x, y, z = torch.meshgrid(*(frequency.square() for frequency in frequencies), indexing="ij")
    return send(x + y + z, device)
