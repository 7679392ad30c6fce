import dataclasses

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

from nnunet_ssl.pretraining.volumes import BadScan, Grid, on_grid, read_volume

GRID = Grid(shape=(40, 50, 60), spacing=(3.0, 2.0, 1.0), affine=np.diag([1.0, 2.0, 3.0, 1.0]))


def moved(grid, *, turn=0.0, shift=(0.0, 0.0, 0.0)):
    motion = np.eye(4)
    motion[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    motion[:3, 3] = shift
    return dataclasses.replace(grid, affine=motion @ grid.affine)


def test_grids_are_the_same_up_to_a_tenth_of_a_voxel_at_the_corners():
    assert GRID.same_as(GRID)
    assert GRID.same_as(moved(GRID, shift=(0.09, 0, 0)))
    assert not GRID.same_as(moved(GRID, shift=(0, 0, 0.11)))
    assert not GRID.same_as(moved(GRID, turn=0.002)), "a small turn moves far corners"
    assert not GRID.same_as(dataclasses.replace(GRID, shape=(40, 50, 61)))


def test_a_volume_is_read_in_ras_with_its_geometry(write_scan, tmp_path):
    path = write_scan(tmp_path / "a.nii.gz", axes="PIL", spacing=(1.0, 2.0, 3.0), shape=(20, 24, 22))
    volume = read_volume(path, NibabelIOWithReorient())
    assert volume.data.shape == volume.grid.shape == (22, 24, 20)
    np.testing.assert_allclose(volume.grid.spacing, (3.0, 2.0, 1.0), rtol=1e-6)
    assert nibabel.aff2axcodes(volume.grid.affine) == ("R", "A", "S")
    original = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_array_equal(volume.as_nifti().get_fdata(), original.get_fdata())


def test_a_volume_on_its_grid_is_not_resampled(write_scan, tmp_path):
    volume = read_volume(write_scan(tmp_path / "a.nii.gz"), NibabelIOWithReorient())
    assert on_grid(volume, moved(volume.grid, shift=(0.01, 0, 0))) is volume


def test_a_whole_voxel_shift_moves_the_voxels_by_one(write_scan, tmp_path):
    volume = read_volume(write_scan(tmp_path / "a.nii.gz", spacing=2.0), NibabelIOWithReorient())
    shifted = on_grid(volume, moved(volume.grid, shift=(2.0, 0, 0)))
    np.testing.assert_allclose(shifted.data[..., :-1], volume.data[..., 1:], atol=1e-3)


def test_a_disk_that_does_not_answer_is_a_transient_failure(write_scan, tmp_path, monkeypatch):
    path = write_scan(tmp_path / "a.nii.gz")

    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(NibabelIOWithReorient, "read_images", stale)
    with pytest.raises(BadScan, match="Stale file handle") as failure:
        read_volume(path, NibabelIOWithReorient())
    assert failure.value.transient
    path.write_bytes(path.read_bytes()[:500])
    monkeypatch.undo()
    with pytest.raises(BadScan, match="truncated or corrupt") as failure:
        read_volume(path, NibabelIOWithReorient())
    assert not failure.value.transient
