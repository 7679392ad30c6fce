"""What the conversions do to the images of a case, for those who segment images that no conversion has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nnunet_ssl.conversion import atlas_v2, atlas_v3, bids, fcd_bonn, isles2022
from nnunet_ssl.conversion.channels import Facts, finite
from nnunet_ssl.imaging.geometry import Volume

PutTogether = Callable[[Mapping[str, Volume], Facts], dict[str, Volume]]
"""From the images of a case, by channel, to those that the network sees, on the grid of the first."""

PREPARATIONS: dict[str, PutTogether] = {
    atlas_v2.INFO.name: lambda images, facts: dict(images),
    atlas_v3.INFO.name: atlas_v3.put_together,
    isles2022.INFO.name: isles2022.put_together,
    fcd_bonn.INFO.name: fcd_bonn.put_together,
    bids.INFO.preparation: bids.put_together,
}
"""By the name that dataset.json of a converted data set has as ``prepared_as``."""


def prepared_as(name: str, images: Mapping[str, Volume]) -> tuple[dict[str, Volume], list[str]]:
    """Prepare the images of a case as the conversion `name` prepares its own.

    Args:
        name: a key of `PREPARATIONS`.
        images: by channel (``"dwi"``), the one that gives the grid first.

    Returns:
        The images, by channel, on one grid, and what is worth telling of them.

    Raises:
        UserError: an image cannot be used.
    """
    facts: Facts = {}
    together = PREPARATIONS[name]({channel: finite(image, facts) for channel, image in images.items()}, facts)
    return together, facts.get("notes", [])
