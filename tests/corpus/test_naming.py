"""The names of a store's files: today's, those of 0.1.0, and those of another package in the same folder."""

import json

import pytest

from nnunet_ssl.corpus import naming, plans
from nnunet_ssl.corpus.naming import names_of
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet_folders import FORMER_PLANS_NAME, PLANS_NAME


@pytest.fixture
def prepare_as_0_1_0(prepare, monkeypatch):
    """Prepare a store under the name that plans had in 0.1.0."""

    def run(**options):
        with monkeypatch.context() as patch:
            patch.setattr(naming, "PLANS_NAME", FORMER_PLANS_NAME)
            patch.setattr(naming.StoreNames.__init__, "__defaults__", (FORMER_PLANS_NAME,))
            patch.setattr(plans.make_plans, "__defaults__", (FORMER_PLANS_NAME,))
            return prepare(**options)

    return run


def test_a_store_of_0_1_0_is_opened_and_continued_under_its_name(
    prepare_as_0_1_0, prepare, source, write_scan, contents, monkeypatch
):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare_as_0_1_0().folder
    assert {path.name for path in folder.glob("nn*")} == {
        "nnsslPlans.json",
        "nnsslPlans_journal.jsonl",
        "nnsslPlans_3d_fullres",
    }
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.corpus.session.read_volume", lambda *_: pytest.fail("a scan was read again"))
        prepare()
    assert contents(folder) == before
    write_scan(source / "sub_2/ses_1/t1.nii.gz")
    prepare()
    corpus = open_corpus(500)
    assert len(corpus) == 2
    assert all(corpus.path(row).parent.name == "nnsslPlans_3d_fullres" and corpus.path(row).is_file() for row in (0, 1))
    assert not list(folder.glob(f"{PLANS_NAME}*"))


def test_other_options_than_those_of_a_store_of_0_1_0_are_refused(prepare_as_0_1_0, prepare, source, write_scan):
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    prepare_as_0_1_0()
    with pytest.raises(UserError, match="dtype: float16 there, float32 now"):
        prepare(dtype="float32")


def test_plans_of_nnssl_or_of_a_labelled_data_set_are_no_store(prepare, source, write_scan, nnunet_folders):
    """They lie side by side with ours, and stay."""
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    theirs = nnunet_folders["nnUNet_preprocessed"] / "Dataset500_FOMO60K" / "nnsslPlans.json"
    theirs.parent.mkdir()
    theirs.write_text(json.dumps({"plans_name": "nnsslPlans", "configurations": {"onemmiso": {}}}))
    before = theirs.read_text()
    assert prepare().folder == theirs.parent
    assert theirs.read_text() == before
    assert open_corpus(500).folder.name == "nnUNetSSLPlans_3d_fullres"


def test_two_stores_that_share_a_manifest_are_refused(prepare, source, write_scan):
    """As one gets them who goes back to 0.1.0 for a while: the manifest is of the store that was written last."""
    write_scan(source / "sub_1/ses_1/t1.nii.gz")
    folder = prepare().folder
    (folder / f"{FORMER_PLANS_NAME}.json").write_text((folder / f"{PLANS_NAME}.json").read_text())
    for use in (prepare, lambda: open_corpus(500), lambda: names_of(folder)):
        with pytest.raises(UserError, match=r"holds two stores, nnUNetSSLPlans\.json and .*nnsslPlans\.json"):
            use()
