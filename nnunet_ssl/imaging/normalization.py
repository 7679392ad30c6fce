"""The intensity normalisation of pre-training, as a scheme with nnU-Net's interface."""

from __future__ import annotations

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization


class PercentileZScoreNormalization(ImageNormalization):
    """Clip to the 0.5-99.5 percentiles of the foreground, then z-score inside it; the background stays at zero.

    The foreground is where `seg` is not negative, as in nnU-Net's own schemes. nnU-Net finds schemes by name inside its
    own package only, so this one is used directly, not through a plans file.
    """

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = True
    percentiles = (0.5, 99.5)

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Normalise `image` (X, Y, Z) where `seg` (X, Y, Z) >= 0.

        Raises:
            ValueError: no foreground was given, or its intensities do not vary.
        """
        if seg is None:
            raise ValueError("PercentileZScoreNormalization needs the foreground: seg is None.")
        foreground = seg >= 0
        values = image[foreground].astype(np.float64)
        values = np.clip(values, *np.percentile(values, self.percentiles))
        deviation = values.std()
        if not deviation > 1e-12 * np.abs(values).max():
            raise ValueError("the foreground is constant between its 0.5 and 99.5 percentiles")
        normalised = np.zeros(image.shape, self.target_dtype)
        normalised[foreground] = (values - values.mean()) / deviation
        return normalised
