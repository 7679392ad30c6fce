"""Which scans of a session share a grid: nothing is cut, guessed or paired in silence."""

import json

import blosc2
import nibabel
import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.corpus.prepared import describe_corpus, open_corpus
from nnunet_ssl.pretraining.views.sampling import SamplingConfig, example_table

WHOLE = {"spacing": 1.0, "shape": (40, 46, 42)}


@pytest.fixture
def session(source, write_scan):
    """Whole-brain T1 and FLAIR of one session; returns its folder."""
    write_scan(source / "sub_1/ses_1/t1.nii.gz", **WHOLE)
    write_scan(source / "sub_1/ses_1/flair.nii.gz", spacing=(1.2, 1.2, 1.5), shape=(34, 40, 30), contrast=0.8)
    return source / "sub_1/ses_1"


@pytest.fixture
def manifest(prepare):
    """A function that prepares and returns the manifest by the file's stem; keywords are PreparationConfig's."""

    def run(**options):
        scans = pd.read_csv(prepare(**options).folder / "manifest.tsv", sep="\t", keep_default_na=False)
        return scans.set_index(scans["scan_id"].str.rpartition("__")[2])

    return run


def rewritten(path, *, moved=None, codes=True):
    """Change a file's header: move the image by a (4, 4) motion, or take the codes away."""
    image = nibabel.load(path)
    affine = image.affine if moved is None else moved @ image.affine
    new = nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), affine)
    if not codes:
        new.set_sform(None, 0)
        new.set_qform(None, 0)
    nibabel.save(new, path)


def shift(*millimetres):
    motion = np.eye(4)
    motion[:3, 3] = millimetres
    return motion


def stored(corpus, stem):
    row = int(np.flatnonzero(corpus.scans["scan_id"].str.endswith(stem))[0])
    return blosc2.open(str(corpus.path(row)))[0].astype(np.float32)


def numbers(text):
    return np.array([int(number) for number in text.split(",")])


def extent(row):
    """How many voxels a scan's foreground measures along each axis."""
    return np.diff(numbers(row["bbox"]).reshape(3, 2))[:, 0]


def slab(path, write_scan):
    write_scan(path, spacing=(0.5, 4.0, 0.5), shape=(50, 4, 44))


def thick_slab(path, write_scan):
    write_scan(path, spacing=(1.5, 8.0, 1.5), shape=(26, 4, 24))


def corner(path, write_scan):
    write_scan(path, spacing=0.5, shape=(30, 30, 30))


def spine(path, write_scan):
    """Sharper than the brain's scans, and it overlaps them a little."""
    data = 50 + 40 * np.random.default_rng(0).random((60, 60, 120)).astype(np.float32)
    data[:10] = data[-10:] = 0
    nibabel.save(nibabel.Nifti1Image(data, shift(-24, -24, -95) @ np.diag([0.8, 0.8, 0.8, 1])), path)


@pytest.mark.parametrize("write", [slab, thick_slab, corner, spine])
def test_a_small_scan_leaves_the_others_as_they_are_without_it(session, manifest, write_scan, write):
    before = manifest()
    write(session / "t2.nii.gz", write_scan)
    after = manifest()
    for stem in ("t1", "flair"):
        np.testing.assert_array_equal(extent(after.loc[stem]), extent(before.loc[stem]))
        assert np.abs(numbers(after.loc[stem, "shape"]) - numbers(before.loc[stem, "shape"])).max() <= 2
        assert after.loc[stem, "foreground_kept"] == 1
    assert after.loc["t1", "aligned_to"] == after.loc["flair", "aligned_to"]
    assert after.loc["t2", "foreground_kept"] >= 0.9, "and it is not cut either"


def test_a_sharper_scan_that_misses_a_part_of_the_head_does_not_cut_the_others(source, manifest, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz", **WHOLE)
    alone = manifest().loc["t1"]
    path = write_scan(source / "sub_1/ses_1/flair.nii.gz", spacing=0.9, shape=(44, 50, 46), contrast=0.8)
    cut = nibabel.load(path).slicer[:, :, 8:]
    nibabel.save(cut, path)
    scans = manifest()
    assert scans.loc["t1", "aligned_to"] == scans.loc["flair", "aligned_to"]
    assert np.abs(extent(scans.loc["t1"]) - extent(alone)).max() <= 2, (
        "the same head, up to a rim that resampling blurs"
    )
    assert (scans["foreground_kept"] == 1).all()


@pytest.mark.parametrize("stem", ["flair", "t1"])
def test_a_scan_without_orientation_is_laid_voxel_by_voxel_on_one_of_its_shape(source, manifest, write_scan, stem):
    for name, contrast in (("t1", 1.0), ("flair", 0.8)):
        path = write_scan(source / f"sub_1/ses_1/{name}.nii.gz", **WHOLE, contrast=contrast, axes="LPS")
        rewritten(path, moved=shift(6, -12, 18), codes=name != stem)
    scans = manifest(dtype="float32")
    assert scans.loc["t1", "aligned_to"] == scans.loc["flair", "aligned_to"]
    assert "voxel by voxel" in scans.loc[stem, "notes"]
    corpus = open_corpus(500)
    one, other = stored(corpus, "t1") != 0, stored(corpus, "flair") != 0
    np.testing.assert_array_equal(one, other)


def test_a_scan_without_orientation_and_of_another_shape_is_registered_or_kept_apart(session, manifest):
    rewritten(session / "t1.nii.gz", moved=shift(0, 0, 12))
    rewritten(session / "flair.nii.gz", codes=False)
    scans = manifest()
    assert "no orientation in its header" in scans.loc["flair", "notes"]
    assert "regist" in scans.loc["flair", "notes"]
    together = scans.loc["t1", "aligned_to"] == scans.loc["flair", "aligned_to"]
    assert together == ("registered to" in scans.loc["flair", "notes"])


def test_a_session_without_any_orientation_says_so(session, manifest):
    for path in session.iterdir():
        rewritten(path, codes=False)
    assert manifest()["notes"].str.contains("no orientation in its header").all()


@pytest.mark.parametrize("motion", [shift(20, 0, 0), shift(0, -30, 10), shift(0, 0, 400)])
def test_scans_that_do_not_agree_are_kept_for_mim_and_enter_no_pair(session, manifest, write_scan, motion):
    write_scan(session.parents[1] / "sub_2/ses_1/t1.nii.gz", **WHOLE, seed=1)
    write_scan(session.parents[1] / "sub_2/ses_1/t2.nii.gz", **WHOLE, seed=1, contrast=-1)
    rewritten(session / "flair.nii.gz", moved=motion)
    scans = manifest()
    assert len(scans) == 4, "nothing is lost"
    corpus = open_corpus(500)
    summary = corpus.summary()
    assert (summary["pairs"], summary["pairs_apart"], summary["sessions_mcl"]) == (2, 1, 1)
    assert "1 of them do not lie in one place" in describe_corpus(summary)
    subjects = corpus.scans["subject"].str[-1].to_numpy()
    for kind in ("mcl", "cl"):
        assert set(subjects[example_table(corpus, kind, SamplingConfig()).rows].ravel()) == {"2"}
    assert set(subjects[corpus.unpaired_scans()]) == {"1"}
    assert len(example_table(corpus, "mim", SamplingConfig()).rows) == 4
    value = float(scans.loc["flair", "agreement"].rpartition("=")[2])
    assert value < 1.25


def test_scans_that_agree_stay_together_when_a_third_one_does_not(session, manifest, write_scan):
    write_scan(session / "t2.nii.gz", **WHOLE, contrast=-1)
    rewritten(session / "t2.nii.gz", moved=shift(25, 0, 0))
    scans = manifest()
    assert scans.loc["t1", "aligned_to"] == scans.loc["flair", "aligned_to"] != scans.loc["t2", "aligned_to"]
    summary = open_corpus(500).summary()
    assert (summary["pairs"], summary["pairs_apart"], summary["sessions_mcl"]) == (3, 2, 1)


def test_registration_brings_a_displaced_scan_back(session, manifest):
    rewritten(session / "flair.nii.gz", moved=shift(0, 14, 10))
    scans = manifest(register="rigid", dtype="float32")
    assert scans.loc["t1", "aligned_to"] == scans.loc["flair", "aligned_to"]
    assert "registered to" in scans.loc["flair", "notes"]
    corpus = open_corpus(500)
    t1, flair = stored(corpus, "t1"), stored(corpus, "flair")
    assert corpus.summary()["pairs_apart"] == 0
    assert corpus.preprocessing["register"] == "rigid"
    brain = t1 != 0
    overlap = 2 * (brain & (np.abs(flair) > 0.01)).sum() / (brain.sum() + (np.abs(flair) > 0.01).sum())
    assert overlap > 0.9


def test_a_store_of_the_time_before_opens_and_pairs_its_sessions_as_then(session, manifest):
    manifest()
    folder = open_corpus(500).folder.parent
    scans = pd.read_csv(folder / "manifest.tsv", sep="\t", keep_default_na=False)
    old = scans.drop(columns=["aligned_to", "agreement", "foreground_kept", "notes"])
    old.to_csv(folder / "manifest.tsv", sep="\t", index=False)
    corpus = open_corpus(500)
    assert len(corpus.paired_scans()) == 2
    assert "pairs" not in corpus.summary()


def test_a_store_of_the_time_before_is_kept_and_the_command_says_what_it_lacks(session, manifest, monkeypatch):
    manifest()
    folder = open_corpus(500).folder.parent
    journal = folder / "nnUNetSSLPlans_journal.jsonl"
    results = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in results[0]["rows"]:
        for column in ("aligned_to", "agreement", "foreground_kept", "notes"):
            del row[column]
    journal.write_text("".join(f"{json.dumps(result)}\n" for result in results))
    monkeypatch.setattr("nnunet_ssl.corpus.session.read_volume", lambda *_: pytest.fail("a scan was read again"))
    assert "aligned_to" not in manifest()
    assert len(open_corpus(500).paired_scans()) == 2


def test_a_column_of_the_corpus_own_tables_never_hides_what_was_found(session, source, manifest):
    (source / "participants.tsv").write_text("participant_id\tnotes\nsub_1\tleft-handed\n")
    rewritten(session / "flair.nii.gz", codes=False)
    scans = manifest()
    assert set(scans["notes_in_table"]) == {"left-handed"}
    assert "no orientation" in scans.loc["flair", "notes"]


def test_scans_that_were_normalised_before_agree_too(session, manifest):
    for path in session.iterdir():
        image = nibabel.load(path)
        data = image.get_fdata()
        inside = data != 0
        data[inside] = (data[inside] - data[inside].mean()) / data[inside].std()
        nibabel.save(nibabel.Nifti1Image(data.astype(np.float32), image.affine), path)
    scans = manifest()
    assert scans.loc["t1", "aligned_to"] == scans.loc["flair", "aligned_to"]
