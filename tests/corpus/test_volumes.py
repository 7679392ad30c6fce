import gzip

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

from nnunet_ssl.corpus.volumes import BadScan, read_volume
from nnunet_ssl.imaging.geometry import canonical


@pytest.mark.parametrize("axes", ["RAS", "PIL", "LSA"])
def test_a_volume_in_ras_is_what_nnunets_reader_gives(write_scan, tmp_path, axes):
    path = write_scan(tmp_path / "a.nii.gz", axes=axes, spacing=(1.0, 2.0, 3.0), shape=(20, 24, 22))
    volume = canonical(read_volume(path)[0])
    images, properties = NibabelIOWithReorient().read_images([str(path)])
    np.testing.assert_array_equal(volume.array.transpose(2, 1, 0), images[0])
    np.testing.assert_allclose(volume.affine, properties["nibabel_stuff"]["reoriented_affine"], rtol=1e-6)
    np.testing.assert_allclose(volume.spacing[::-1], properties["spacing"], rtol=1e-6)


def test_voxels_that_are_not_finite_become_background_and_are_counted(write_scan, tmp_path):
    volume, nan_voxels = read_volume(write_scan(tmp_path / "a.nii.gz", nan=7))
    assert nan_voxels == 7
    assert np.isfinite(volume.array).all()


def test_a_disk_that_does_not_answer_is_a_transient_failure(write_scan, tmp_path, monkeypatch):
    path = write_scan(tmp_path / "a.nii.gz")

    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "__array__", stale)
    with pytest.raises(BadScan, match="Stale file handle") as failure:
        read_volume(path)
    assert failure.value.transient
    path.write_bytes(path.read_bytes()[:500])
    monkeypatch.undo()
    with pytest.raises(BadScan, match="truncated or corrupt") as failure:
        read_volume(path)
    assert not failure.value.transient


def test_a_compression_that_the_name_denies_is_named(write_scan, tmp_path):
    zipped = write_scan(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii").write_bytes(zipped.read_bytes())
    (tmp_path / "c.nii.gz").write_bytes(gzip.decompress(zipped.read_bytes()))
    with pytest.raises(BadScan, match=r"compressed by gzip, though named \.nii: rename it to end in \.nii\.gz"):
        read_volume(tmp_path / "b.nii")
    with pytest.raises(BadScan, match=r"not compressed, though named \.nii\.gz: rename it to end in \.nii$"):
        read_volume(tmp_path / "c.nii.gz")


def test_trailing_axes_of_length_one_are_dropped(write_scan, tmp_path):
    image = nibabel.load(write_scan(tmp_path / "a.nii.gz"))
    nibabel.save(nibabel.Nifti1Image(image.get_fdata()[..., None, None], image.affine), tmp_path / "b.nii.gz")
    plain, deep = (read_volume(tmp_path / f"{name}.nii.gz")[0] for name in "ab")
    np.testing.assert_array_equal(plain.array, deep.array)
    np.testing.assert_allclose(plain.affine, deep.affine)


def test_a_map_over_a_surface_is_no_image(tmp_path):
    cortex = nibabel.cifti2.BrainModelAxis.from_surface(np.arange(8), 8, name="cortex_left")
    axes = (nibabel.cifti2.ScalarAxis(["thickness"]), cortex)
    nibabel.save(nibabel.Cifti2Image(np.ones((1, 8), np.float32), axes), tmp_path / "a.dscalar.nii")
    with pytest.raises(BadScan, match="a Cifti2Image: only images of voxels are used"):
        read_volume(tmp_path / "a.dscalar.nii")
