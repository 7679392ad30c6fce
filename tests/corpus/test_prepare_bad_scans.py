import gzip

import nibabel
import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.corpus.volumes import BadScan, read_volume
from nnunet_ssl.errors import UserError


def _zeros(path, good):
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.float32), np.eye(4)), path)


def _constant(path, good):
    image = nibabel.load(good)
    nibabel.save(nibabel.Nifti1Image((image.get_fdata() > 0).astype(np.uint8), image.affine), path)


def _all_nan(path, good):
    nibabel.save(nibabel.Nifti1Image(np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), path)


def _truncated(path, good):
    content = good.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _empty(path, good):
    path.write_bytes(b"")


def _text(path, good):
    path.write_text("version https://git-lfs.github.com/spec/v1")


def _four_dimensions(path, good):
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 9, 9, 4), np.float32), np.eye(4)), path)


def _complex(path, good):
    image = nibabel.load(good)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata().astype(np.complex64), image.affine), path)


def _colours(path, good):
    colours = np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), path)


def _flat_affine(path, good):
    image = nibabel.load(good)
    image.set_sform(np.diag([2, 2, 0, 1]), code=1)
    image.header["qform_code"] = 0
    nibabel.save(image, path)


def _contradiction(path, good):
    image = nibabel.load(good)
    nibabel.save(image, path.with_suffix(""))
    content = bytearray(path.with_suffix("").read_bytes())
    content[80:92] = np.array([5, 5, 5], "<f4").tobytes()  # pixdim[1:4]
    path.with_suffix("").unlink()
    path.write_bytes(gzip.compress(bytes(content)))


def _kilometres(path, good):
    image = nibabel.load(good)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), np.diag([1000.0, 1000, 1000, 1])), path)


def _microns(path, good):
    image = nibabel.load(good)
    header = image.header.copy()
    header.set_xyzt_units("micron")
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), image.affine @ np.diag([1000, 1000, 1000, 1]), header), path)


def _two_voxels(path, good):
    image = nibabel.load(good)
    data = np.zeros(image.shape, np.float32)
    data[10, 10, 10:12] = 1, 2
    nibabel.save(nibabel.Nifti1Image(data, image.affine), path)


def _one_slice(path, good):
    image = nibabel.load(good)
    data = np.zeros(image.shape, np.float32)
    data[:, :, 10] = np.random.default_rng(0).random(image.shape[:2])
    nibabel.save(nibabel.Nifti1Image(data, image.affine), path)


def _plain_as_zipped(path, good):
    path.write_bytes(gzip.decompress(good.read_bytes()))


def _dangling(path, good):
    path.symlink_to("../../.git/annex/objects/absent")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_zeros, "all zero"),
        (_constant, "constant"),
        (_all_nan, "no finite voxel"),
        (_truncated, "truncated or corrupt"),
        (_empty, "empty file"),
        (_text, "not a readable NIfTI"),
        (_four_dimensions, "4-D"),
        (_complex, "voxels of type complex64"),
        (_colours, "only real numbers"),
        (_flat_affine, "affine is not finite or not invertible"),
        (_contradiction, "by pixdim"),
        (_kilometres, "no brain scan's"),
        (_two_voxels, "only 2 voxels"),
        (_one_slice, "a layer of 2 mm"),
        (_microns, "no brain scan's"),
        (_plain_as_zipped, "rename it to end in .nii"),
        (_dangling, "a link that leads nowhere"),
    ],
)
def test_a_bad_scan_is_reported_and_the_rest_of_its_session_goes_on(prepare, source, write_scan, spoil, reason):
    good = write_scan(source / "sub_1/ses_1/t1.nii.gz")
    spoil(good.with_name("t2.nii.gz"), good)
    report = prepare()
    failures = pd.read_csv(report.folder / "failures.tsv", sep="\t")
    assert list(failures["scan_id"]) == ["fomo__sub_1__ses_1__t2"]
    assert reason in failures["reason"][0]
    assert list(open_corpus(500).scans["scan_id"]) == ["fomo__sub_1__ses_1__t1"]
    assert not list((report.folder / "nnUNetSSLPlans_3d_fullres").glob("*t2*"))


def test_any_nonsense_in_a_header_is_a_bad_scan_or_a_readable_one_and_never_another_error(write_scan, tmp_path):
    """A hundred headers with some bytes overwritten at random."""
    write_scan(tmp_path / "good.nii")
    good, rng, path = (tmp_path / "good.nii").read_bytes(), np.random.default_rng(0), tmp_path / "bad.nii"
    outcomes = []
    for _ in range(100):
        content = np.frombuffer(good, np.uint8).copy()
        places = rng.integers(0, 348, rng.integers(1, 12))
        content[places] = rng.integers(0, 256, len(places))
        path.write_bytes(content.tobytes())
        try:
            outcomes.append(np.isfinite(read_volume(path)[0].array).all())
        except BadScan as reason:
            assert len(str(reason).splitlines()) == 1
            outcomes.append(False)
    assert 10 < sum(outcomes) < 90


def test_a_corpus_without_a_good_scan_is_an_error_that_names_the_reasons(prepare, source):
    (source / "sub_1/ses_1").mkdir(parents=True)
    _zeros(source / "sub_1/ses_1/t1.nii.gz", None)
    with pytest.raises(UserError, match=r"Not one of 1 scans.*failures\.tsv"):
        prepare()
