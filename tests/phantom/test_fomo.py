import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.corpus.layouts import detect_layout, find_scans
from nnunet_ssl.phantom.layouts import write_fomo

FAST = {"voxel_mm": 6.0, "seed": 1}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same eight subjects in both layouts."""
    root = tmp_path_factory.mktemp("corpora")
    return {layout: write_fomo(root / layout / "FOMO", n_subjects=8, layout=layout, **FAST) for layout in "AB"}


@pytest.mark.parametrize("layout", ["A", "B"])
def test_the_corpus_is_read_as_fomo_with_every_quirk_in_it(corpora, layout):
    assert detect_layout(corpora[layout]) == "fomo"
    scans = find_scans(corpora[layout])
    sessions = scans.groupby("session")
    assert scans["subject"].nunique() == 8
    assert scans.groupby("subject")["session"].nunique().max() == 2
    assert (scans["repeat"] == 2).any()
    assert (scans["modality"] == "unknown").any()
    assert (sessions.size() == 1).any()
    assert (sessions["modality"].nunique() >= 2).sum() > 0.6 * len(sessions)
    assert any(corpora[layout].rglob("._*.nii.gz"))
    assert any(np.isnan(nib.load(path).get_fdata()).any() for path in scans["path"])


def test_layout_a_is_flat_and_has_no_tables_and_layout_b_has_sources_and_tables(corpora):
    assert {path.name for path in corpora["A"].iterdir()} == {f"sub_{number}" for number in range(1, 9)}
    assert (corpora["B"] / "PT001_OASIS1" / "sub_1" / "ses_1").is_dir()
    for table, column in (("participants", "age"), ("mapping", "original_path"), ("mri_info", "Manufacturer")):
        content = pd.read_csv(corpora["B"] / f"{table}.tsv", sep="\t", keep_default_na=False)
        assert column in content
    assert "n/a" in set(pd.read_csv(corpora["B"] / "participants.tsv", sep="\t", keep_default_na=False, dtype=str).age)


def test_scans_of_a_session_share_one_grid_which_is_ras_and_not_of_1_mm(corpora):
    scans = find_scans(corpora["B"])
    for _, session in scans.groupby("session"):
        images = [nib.load(path) for path in session["path"]]
        assert all(image.shape == images[0].shape for image in images)
        assert all(np.allclose(image.affine, images[0].affine, atol=1e-4) for image in images)
        assert nib.aff2axcodes(images[0].affine) == ("R", "A", "S")
    spacings = {tuple(np.round(nib.load(path).header.get_zooms(), 2)) for path in scans["path"]}
    assert len(spacings) > 4


def test_only_some_sources_are_stripped(corpora):
    """Outside the brain (at a corner of the middle slice, inside the scalp) the one is zero, the other is not."""
    scans = find_scans(corpora["B"]).query("modality != 'unknown' and modality != 'adc'")
    zeros = {path: (nib.load(path).get_fdata() == 0).mean() for path in scans["path"]}
    by_source = scans.assign(zeros=scans["path"].map(zeros)).groupby("dataset")["zeros"]
    assert by_source.min()["PT001_OASIS1"] > 0.6
    assert by_source.max()["PT003_SOOP"] < 0.6


def test_a_seed_gives_the_same_files_and_another_seed_other_ones(tmp_path):
    def pixels(name, seed):
        folder = write_fomo(tmp_path / name, n_subjects=2, voxel_mm=8, seed=seed)
        return {
            str(path.relative_to(folder)): np.asarray(nib.load(path).dataobj).tobytes()
            for path in sorted(folder.rglob("[!.]*.nii.gz"))
        }

    assert pixels("one", 4) == pixels("two", 4)
    assert pixels("one", 4) != pixels("three", 5)


def test_without_quirks_every_session_has_pairs_and_every_file_is_an_image(tmp_path):
    folder = write_fomo(tmp_path / "clean", n_subjects=7, voxel_mm=8, quirks=False)
    scans = find_scans(folder)
    assert "unknown" not in set(scans["modality"])
    assert (scans.groupby("session")["modality"].nunique() >= 2).all()
    assert not any(folder.rglob(".*"))
    assert not any(np.isnan(nib.load(path).get_fdata()).any() for path in scans["path"])
