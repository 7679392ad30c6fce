"""What scanners do to intensities: batched transforms of single-channel volumes, on the device of the data.

Every function takes views (N, X, Y, Z) in float32 and one plain number (or a few) per view, draws nothing, and returns
new views. MONAI's transforms of the same names are the reference; where we differ, the docstring says so.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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


def scale_around_mean(views: Tensor, factors: Sequence[float]) -> Tensor:
    """Stretch the intensities of each view around their mean."""
    mean = views.mean(dim=SPACE, keepdim=True)
    return mean + (views - mean) * _per_view(factors, views)


def add_noise(views: Tensor, stds: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """Add Gaussian noise; each view's noise follows from its own seed (and the type of device)."""
    generator = torch.Generator(views.device)
    noise = torch.empty_like(views)
    for field, seed in zip(noise, seeds):
        field.normal_(generator=generator.manual_seed(seed))
    return views + noise * _per_view(stds, views)


def smooth(views: Tensor, sigmas: Sequence[Sequence[float]]) -> Tensor:
    """Blur with a Gaussian of one sigma per axis, in voxels, cut at four sigma; the edge repeats (scipy's "nearest").

    MONAI pads with zeros, which darkens the faces of a patch cut out of a brain.
    """
    return _filter(views, [_blur_matrices(sigma, size) for sigma, size in zip(zip(*sigmas), views.shape[1:])])


def lower_resolution(views: Tensor, zooms: Sequence[float]) -> Tensor:
    """Sample each view on a coarser grid of `zoom` times its size (nearest voxel), and interpolate back (trilinear)."""
    sizes = views.shape[1:]
    return _filter(views, [torch.stack([_resolution_matrix(size, zoom) for zoom in zooms]) for size in sizes])


def bias_field(views: Tensor, coefficients: Sequence[Sequence[float]]) -> Tensor:
    """Multiply each view by exp of a sum of Legendre products over [-1, 1]^3, one coefficient for each of BIAS_TERMS.

    Source: Van Leemput et al., IEEE Trans Med Imaging 18 (1999), 885.
    """
    weights = np.zeros((len(views), *(BIAS_DEGREE + 1,) * 3), np.float32)
    weights[(slice(None), *np.transpose(BIAS_TERMS))] = coefficients
    field = send(torch.from_numpy(weights), views.device)
    for size in views.shape[1:]:
        field = torch.tensordot(field, send(_legendre(size), views.device), dims=([1], [0]))
    return views * field.exp()


def gibbs(views: Tensor, alphas: Sequence[float]) -> Tensor:
    """Ring: cut the spatial frequencies above (1 - alpha) / sqrt(2) cycles per voxel.

    The cut is a sphere around frequency zero, so the result is real; MONAI's is half a step off centre for even sizes.
    """
    *size, last = views.shape[1:]
    frequencies = [torch.fft.fftfreq(n, device=views.device) for n in size]
    frequencies.append(torch.fft.rfftfreq(last, device=views.device))
    x, y, z = torch.meshgrid(*(frequency.square() for frequency in frequencies), indexing="ij")
    kept = x + y + z <= _per_view([(1 - alpha) ** 2 / 2 for alpha in alphas], views)
    return torch.fft.irfftn(torch.fft.rfftn(views, dim=SPACE) * kept, s=views.shape[1:], dim=SPACE)


def gamma(views: Tensor, exponents: Sequence[float]) -> Tensor:
    """Bend intensities: the range of each view is brought to [0, 1], raised to the exponent, and brought back."""
    low = views.amin(dim=SPACE, keepdim=True)
    extent = views.amax(dim=SPACE, keepdim=True) - low
    return low + extent * ((views - low) / extent.clamp_min(1e-7)) ** _per_view(exponents, views)


def _per_view(values: Sequence[float], views: Tensor) -> Tensor:
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


def _blur_matrices(sigmas: Sequence[float], size: int) -> Tensor:
    """Gaussian blurs along an axis of `size` voxels, as matrices (N, size, size)."""
    sigma = torch.tensor(sigmas, dtype=torch.float32)[:, None]
    radius = (4 * sigma + 0.5).floor()
    taps = torch.arange(-int(radius.max()), int(radius.max()) + 1)
    kernels = torch.exp(-0.5 * (taps / sigma) ** 2) * (taps.abs() <= radius)
    kernels /= kernels.sum(dim=1, keepdim=True)
    columns = (torch.arange(size)[:, None] + taps).clamp(0, size - 1)  # the edge gathers the weights beyond it
    columns = columns.expand(len(sigma), -1, -1)
    return torch.zeros(len(sigma), size, size).scatter_add_(2, columns, kernels[:, None].expand_as(columns))


def _resolution_matrix(size: int, zoom: float) -> Tensor:
    return _resampling_matrix(size, max(1, round(size * zoom)))


@functools.lru_cache(maxsize=256)
def _resampling_matrix(size: int, coarse: int) -> Tensor:
    """Nearest-voxel sampling to `coarse` voxels and linear interpolation back, as a matrix (size, size)."""
    responses = F.interpolate(torch.eye(size)[None], size=coarse, mode="nearest")
    return F.interpolate(responses, size=size, mode="linear", align_corners=False)[0].T.contiguous()


@functools.lru_cache(maxsize=16)
def _legendre(size: int) -> Tensor:
    """Legendre polynomials of degree 0 to BIAS_DEGREE at `size` points from -1 to 1: (BIAS_DEGREE + 1, size)."""
    values = np.polynomial.legendre.legvander(np.linspace(-1, 1, size), BIAS_DEGREE)
    return torch.from_numpy(values.T.astype(np.float32))
