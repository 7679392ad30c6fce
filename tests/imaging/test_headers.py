"""Headers of NIfTI files: what is believed, and what nothing depends on."""

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.imaging.headers import open_nifti

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
UNITS = 123  # place of the byte for the units in a NIfTI-1 header


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("header") / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 8, 7), np.float32), AFFINE), path)
    return path


@settings(deadline=None)
@given(unit=st.integers(0, 255))
def test_a_scan_is_read_whatever_its_byte_for_the_units_says(file, unit):
    content = bytearray(file.read_bytes())
    content[UNITS] = unit
    file.write_bytes(content)
    opened = open_nifti(file)
    np.testing.assert_array_equal(opened.affine, AFFINE)
    assert not opened.notes


def test_nibabel_says_nothing_of_a_header_that_it_mends(file, capfd):
    content = bytearray(file.read_bytes())
    content[76:80] = np.float32(-3).tobytes()  # the handedness, which is 1 or -1
    file.write_bytes(content)
    open_nifti(file)
    assert not "".join(capfd.readouterr()).strip()
