from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.conversion.discovery import ImageFile, choose_one, find_images, lesion_masks, refuse_two_homes
from nnunet_ssl.errors import UserError

KINDS = {"t1w": "t1", "flair": "flair", "roi": "mask", "dwi": "dwi"}


def image(*parts):
    return ImageFile(Path(*parts), parts[:-1])


@pytest.mark.parametrize(
    ("parts", "kind", "scan_id"),
    [
        (("ds", "sub-00048_acq-32ch10_FLAIR_roi.nii.gz"), "mask", "sub-00048"),
        (("ds", "sub-1", "ses-2", "anat", "scan_T1w.nii.gz"), "t1", "sub-1_ses-2"),
        (("ds", "sub-1_ses-01_run-2_FLAIR.NII.GZ"), "flair", "sub-1_ses-01"),
        (("new", "Mr X dwi.nii"), "dwi", "Mr_X"),
        (("new", "p.12_0000.nii.gz"), None, "p-12"),
        (("patient7", "T1w.nii.gz"), "t1", "patient7"),
        (("new", "A", "scan_dwi.nii.gz"), "dwi", "A_scan"),
        (("new", "sub_1", "ses_1", "flair.nii.gz"), "flair", "sub_1_ses_1"),
        (("new", "Dr. Who", "ses_1", "anat", "Dr Who_ses_1_T1w.nii.gz"), "t1", "Dr-_Who_Dr_Who_ses_1"),
        (("new", "Smith", "Smith_T1w.nii.gz"), "t1", "Smith"),
        (("new", "DWI", "Smith_dwi.nii.gz"), "dwi", "Smith"),
        (("new", "FLAIR", "Smith_dwi.nii.gz"), "dwi", "FLAIR_Smith"),
        (("new", "anat", "T1w.nii.gz"), "t1", "new"),
    ],
)
def test_kind_and_case_are_read_off_names_and_folders(parts, kind, scan_id):
    assert image(*parts).kind(KINDS) == kind
    assert image(*parts).scan_id(KINDS) == scan_id


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("new", "siteA", "sub-1", "dwi", "sub-1_dwi.nii.gz"), ("new", "siteB", "sub-1", "anat", "sub-1_FLAIR.nii.gz")),
        (("new", "2019", "sub-1_dwi.nii.gz"), ("new", "2020", "sub-1_FLAIR.nii.gz")),
        (("new", "A", "B_dwi.nii.gz"), ("new", "A_B", "flair.nii.gz")),
        (("new", "Smith_dwi.nii.gz"), ("new", "Smith", "flair.nii.gz")),
    ],
)
def test_one_name_in_two_folders_is_refused_naming_both(first, second):
    files = [image(*first), image(*second)]
    assert len({file.scan_id(KINDS) for file in files}) == 1
    with pytest.raises(UserError, match="two patients") as caught:
        refuse_two_homes("x", files, KINDS)
    assert all(file.relative in str(caught.value) for file in files)


NAMES = st.from_regex(r"[A-Za-z]{2,8}", fullmatch=True).filter(lambda word: word.lower() not in KINDS)


@settings(deadline=None)
@given(
    name=NAMES,
    numbers=st.lists(st.from_regex(r"[0-9]{1,5}", fullmatch=True), min_size=2, max_size=4, unique=True),
    separator=st.sampled_from(["_", " ", "__"]),
    order=st.sampled_from([("name", "number", "kind"), ("name", "kind", "number"), ("kind", "name", "number")]),
)
def test_patients_who_differ_by_a_number_are_never_one_case(name, numbers, separator, order):
    def file(number, kind):
        words = {"name": name, "number": number, "kind": kind}
        return image("new", separator.join(words[part] for part in order) + ".nii.gz")

    found = {}
    for number in numbers:
        for kind in ("dwi", "flair", "roi"):
            one = file(number, kind)
            found.setdefault(one.scan_id(KINDS), []).append((number, one))
    for scan_id, of_case in found.items():
        if len({number for number, _ in of_case}) > 1:
            with pytest.raises(UserError, match="two patients"):
                refuse_two_homes(scan_id, [one for _, one in of_case if one.kind(KINDS) == "dwi"], KINDS)
        else:
            assert {one.kind(KINDS) for _, one in of_case} == {"dwi", "flair", "mask"}


def test_the_folders_of_one_session_are_one_home():
    files = [
        image("ds", "sub-1", "ses-2", "dwi", "sub-1_ses-2_dwi.nii.gz"),
        image("ds", "sub-1", "ses-2", "anat", "sub-1_ses-2_FLAIR.nii.gz"),
        image("ds", "rawdata", "sub-1", "ses-2", "sub-1_ses-2_T1w.nii.gz"),
        image("ds", "T1w", "sub-1_ses-2_T1w.nii.gz"),
    ]
    assert {file.scan_id(KINDS) for file in files} == {"sub-1_ses-2"}
    refuse_two_homes("sub-1_ses-2", files, KINDS)


def test_usable_images_are_listed_sorted_and_the_rest_has_reasons(tmp_path):
    names = ["b/2.nii.gz", "b/1.nii", "a/x.nii.gz", "a/x.nii", ".git/y.nii.gz", "a/._x.nii.gz", "a/note.txt", "a/e.nii"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("data")
    (tmp_path / "a" / "e.nii").write_bytes(b"")
    (tmp_path / "a" / "dead.nii.gz").symlink_to("nowhere.nii.gz")
    (tmp_path / "a" / "annexed.nii.gz").symlink_to("../.git/annex/objects/1.nii.gz")
    (tmp_path / "a" / "pointer.nii.gz").write_text("/annex/objects/MD5E-s1--a.nii.gz\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "earlier" / "conversion" / "cases").mkdir(parents=True)
    (tmp_path / "earlier" / "p_0000.nii.gz").write_text("data")
    images, skipped = find_images(tmp_path)
    assert [found.relative for found in images] == ["a/x.nii.gz", "b/1.nii", "b/2.nii.gz"]
    hint = "git-annex link without content; fetch it with `datalad get` or `git annex get`"
    assert {item.what: item.reason for item in skipped} == {
        "a/._x.nii.gz": "hidden file",
        "a/annexed.nii.gz": hint,
        "a/dead.nii.gz": "link to a file that doesn't exist",
        "a/e.nii": "empty file",
        "a/note.txt": "not a NIfTI image",
        "a/pointer.nii.gz": hint,
        "a/x.nii": "the same image is there compressed",
    }


def test_an_image_whose_compressed_twin_dangles_is_used(tmp_path):
    (tmp_path / "x.nii").write_text("data")
    (tmp_path / "x.nii.gz").symlink_to(".git/annex/objects/x")
    assert [found.relative for found in find_images(tmp_path)[0]] == ["x.nii"]


def test_linked_folders_are_followed(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sub-1_T1w.nii.gz").write_text("data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sub-1").symlink_to(tmp_path / "store")
    assert [found.relative for found in find_images(tmp_path / "data")[0]] == ["sub-1/sub-1_T1w.nii.gz"]


def test_a_clone_without_any_content_is_refused(tmp_path):
    (tmp_path / "x.nii.gz").symlink_to(".git/annex/objects/x")
    with pytest.raises(UserError, match=r"All 1 images .* git-annex links.*datalad get"):
        find_images(tmp_path)


def test_of_several_images_that_named_like_the_mask_is_chosen():
    files = [image("sub-1_acq-T2sel_FLAIR.nii.gz"), image("sub-1_acq-tse3dvfl_FLAIR.nii.gz")]
    chosen, others = choose_one(files, like=image("sub-1_acq-tse3dvfl_FLAIR_roi.nii.gz"))
    assert chosen is files[1] and others == [files[0]]
    assert choose_one(files, like=None)[0] is files[0]


def test_brain_masks_are_no_lesion_masks():
    files = [image("sub-1_brain_mask.nii.gz"), image("sub-1_desc-brain_mask.nii.gz"), image("sub-1_lesion_mask.nii.gz")]
    assert lesion_masks(files) == files[2:]
