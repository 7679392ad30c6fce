"""The limits beyond which a scan, a pair, a case or a file counts as wrong: all in one place, with their reasons."""

# Headers and images

VOXEL_RANGE_MM = (0.05, 30.0)
"""mm; edges of a voxel outside this range are no brain scan's: a header in microns or metres, or a broken one."""

MAXIMUM_EXTENT_MM = 700.0
"""mm; no scanner's field of view is longer along an axis."""

VOXEL_SIZE_TOLERANCE = 0.05
"""Share; pixdim and affine may disagree by rounding, but a header that disagrees by more contradicts itself."""

MINIMUM_FOREGROUND_ML = 2.0
"""ml; a scan with less that is not zero shows no brain (1,000 ml and more), nor a slab through one (100 ml)."""

MINIMUM_FOREGROUND_MM = 4.0
"""mm along each axis; a foreground thinner than this is a picture, not a volume."""

# Scans of one session

MINIMUM_FOREGROUND_KEPT = 0.9
"""Share of a scan's foreground that must lie on the grid it shares with others; else it keeps its own. The ears and
the neck, which fields of view cut at will, are less than this; a lobe of the brain is more."""

MUTUAL_COVERAGE = 0.5
"""Share of each other's foreground that two scans must have in their fields of view for the one to widen the other's
grid. A slab through the hippocampus covers a fifth of a head, and a spine's scan is covered by a third."""

AS_WHOLE = 0.9
"""Share of the best scan's coverage of the session that makes a scan as good a reference: the sharpest one is it."""

MINIMUM_AGREEMENT = 1.25
"""Ratio of mutual information: where two images lie, over the best among 15 mm and 15 degrees away from there (see
:func:`nnunet_ssl.imaging.registration.agreement`). On the 21 pairs of T1, T1c, T2, FLAIR, DWI and ADC of five real
sessions 1.4 to 4.5; on four of them, once displaced by 8 mm or turned by 8 degrees, at most 1.0."""

# Lesion masks on their way to an image's grid

LESION_LOSS_TO_CHECK = 0.03
"""Share of a mask's volume: a case that loses more than this is noted with CHECK. Resampling keeps the volume to half a
voxel, and published masks lie on their image's grid; what is left is a lesion that reaches beyond the image."""

LESION_LOSS_TO_SKIP = 0.5
"""Share of the volume of all of a case's masks: beyond this the label shows another disease than the reader drew, and
the case is left out."""
