"""A small scan, oblique and with voxels of three sizes."""

import numpy as np

from nnunet_ssl.imaging.geometry import Volume

# Voxels of 1.5 x 2 x 3 mm, 7 degrees off the scanner's axes.
TURN = np.array([[0.99255, -0.12187, 0.0, 11.0], [0.12187, 0.99255, 0.0, -7.0], [0.0, 0.0, 1.0, 3.5], [0, 0, 0, 1]])
AFFINE = TURN @ np.diag([1.5, 2.0, 3.0, 1.0])


def scan(shape=(14, 13, 12), affine=AFFINE, seed=0) -> Volume:
    """A noisy box with a bright corner, in RAS, alike to no turned copy of itself."""
    rng = np.random.default_rng(seed)
    array = rng.normal(100, 10, shape).astype(np.float32)
    array[: shape[0] // 2, : shape[1] // 3, : max(shape[2] // 2, 1)] += 150
    array[0] = 0
    return Volume(array, affine)
