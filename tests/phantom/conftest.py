import numpy as np
import pytest

from nnunet_ssl.phantom.anatomy import build_anatomy, draw_person, mni_grid

VOXEL_MM = 3.0


@pytest.fixture(scope="session")
def head():
    """A function that builds the head of the subject with a number, with a 3 mm voxel."""
    made = {}

    def build(number=0):
        if number not in made:
            made[number] = build_anatomy(draw_person(np.random.default_rng(number)), mni_grid(VOXEL_MM))
        return made[number]

    return build


@pytest.fixture
def rng():
    return np.random.default_rng(0)
