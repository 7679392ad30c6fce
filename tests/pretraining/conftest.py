import nibabel
import numpy as np
import pytest


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """nnU-Net's three folders, empty, as its variables name them."""
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return folders


@pytest.fixture
def write_scan():
    """A function that writes a small "brain": an ellipsoid of smooth tissue and noise, zero outside.

    The tissue is drawn in mm, so that scans of one brain agree whatever their grids; `contrast` varies its look.
    """

    def write(path, *, seed=0, contrast=1.0, shape=(20, 24, 22), spacing=2.0, axes="RAS", nan=0, dtype=np.float32):
        affine = np.diag([*np.broadcast_to(spacing, 3).astype(float), 1.0])
        affine[:3, 3] = -0.5 * affine[:3, :3] @ (np.array(shape) - 1)
        x, y, z = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)).transpose(3, 0, 1, 2)
        tissue = 100 + 40 * np.sin(x / 5 + seed) * contrast + 30 * np.cos(y / 7) + 10 * np.sin(z / 3)
        tissue += np.random.default_rng(seed).normal(0, 2, shape)
        data = np.where((x / 15) ** 2 + (y / 20) ** 2 + (z / 17) ** 2 < 1, tissue, 0)
        data[tuple(np.argwhere(data)[:nan].T)] = np.nan
        image = nibabel.Nifti1Image(data.astype(dtype), affine)
        target = nibabel.orientations.axcodes2ornt(axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(
            image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), target)), path
        )
        return path

    return write
