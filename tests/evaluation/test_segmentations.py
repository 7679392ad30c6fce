import json
import math

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.segmentations import (
    LesionConfig,
    compare_folders,
    describe_lesions,
    match_cases,
    summarize_cases,
)

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def write(path, *voxels, shape=(8, 8, 8), affine=AFFINE, value=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(shape, dtype=np.uint8)
    for voxel in voxels:
        array[voxel] = value
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def folders(tmp_path):
    """Four cases: right, half right, missed, and rightly empty."""
    lesion = [(2, 2, 2), (2, 2, 3)]
    for case, reference, predicted in (
        ("a", lesion, lesion),
        ("b", lesion, lesion[:1]),
        ("c", lesion, []),
        ("d", [], []),
    ):
        write(tmp_path / "ref" / f"{case}.nii.gz", *reference)
        write(tmp_path / "pred" / f"{case}.nii.gz", *predicted)
    return tmp_path / "ref", tmp_path / "pred"


def test_every_case_is_compared_and_summarised(folders):
    cases = compare_folders(*folders, LesionConfig())
    assert cases["case"].tolist() == ["a", "b", "c", "d"]
    np.testing.assert_allclose(cases["dice"], [1, 2 / 3, 0, 1])
    summary = summarize_cases(cases, LesionConfig())
    assert (summary["n_cases"], summary["n_empty_references"]) == (4, 1)
    metrics = summary["metrics"]
    assert metrics["dice"]["mean"] == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert metrics["detected"]["mean"] == pytest.approx(2 / 3)
    assert (metrics["detected"]["n"], metrics["correctly_empty"]["n"], metrics["hd95_mm"]["n"]) == (3, 1, 3)
    assert metrics["correctly_empty"]["mean"] == 1
    assert metrics["correctly_empty"]["interval"][0] < 0.5, "one healthy control proves little"
    assert "specificity" in describe_lesions(summary)


def test_healthy_controls_count_for_specificity_alone_with_the_fcd_preset(folders):
    cases = compare_folders(*folders, LesionConfig(preset="fcd"))
    summary = summarize_cases(cases, LesionConfig(preset="fcd"))
    assert cases["dice"].tolist()[-1] == 1, "the control itself is scored as ever"
    assert summary["metrics"]["dice"]["mean"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (summary["metrics"]["lesion_f1"]["n"], summary["metrics"]["correctly_empty"]["n"]) == (3, 1)
    assert "all but specificity over the cases with a lesion" in describe_lesions(summary)


def test_the_order_of_cases_does_not_matter(folders):
    cases = compare_folders(*folders, LesionConfig())
    shuffled = cases.iloc[[2, 0, 3, 1]]
    one, other = (summarize_cases(table, LesionConfig())["metrics"]["dice"] for table in (cases, shuffled))
    assert (one["mean"], one["median"]) == (pytest.approx(other["mean"]), other["median"])


@pytest.mark.slow
def test_processes_change_nothing(folders):
    alone, together = (compare_folders(*folders, LesionConfig(), processes=n) for n in (1, 2))
    pd.testing.assert_frame_equal(alone, together)


def test_missing_predictions_are_an_error_unless_only_the_predicted_are_wanted(folders):
    reference, predicted = folders
    (predicted / "b.nii.gz").unlink()
    with pytest.raises(UserError, match=r"1 of 4 cases have no prediction in .*: b\. .*--chill"):
        match_cases(reference, predicted)
    assert [case for case, _, _ in match_cases(reference, predicted, subset=True)] == ["a", "c", "d"]


def test_a_prediction_without_reference_is_an_error_in_any_case(folders):
    reference, predicted = folders
    (reference / "b.nii.gz").unlink()
    for subset in (True, False):
        with pytest.raises(UserError, match=r"1 masks in .* have no reference in .*: b\."):
            match_cases(reference, predicted, subset=subset)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (8, 8, 9)},
        {"affine": np.diag([1.0, 1.0, 2.5, 1.0])},
        {"affine": np.array([[1.0, 0, 0, 5], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])},
        {"affine": np.diag([-1.0, 1.0, 2.0, 1.0])},
    ],
    ids=["shape", "spacing", "origin", "orientation"],
)
def test_masks_on_different_grids_are_an_error_that_shows_both(folders, change):
    reference, predicted = folders
    write(predicted / "b.nii.gz", (2, 2, 2), **change)
    with pytest.raises(UserError, match=r"masks of b do not lie on the same grid. .*8 x 8 x 8 voxels of 1 x 1 x 2 mm"):
        compare_folders(reference, predicted, LesionConfig())


def test_headers_that_differ_by_rounding_are_one_grid(folders):
    reference, predicted = folders
    write(predicted / "b.nii.gz", (2, 2, 2), affine=AFFINE + 1e-6)
    assert len(compare_folders(reference, predicted, LesionConfig())) == 4


def test_one_label_can_be_the_lesion(tmp_path):
    write(tmp_path / "ref" / "a.nii.gz", (2, 2, 2), value=2)
    write(tmp_path / "pred" / "a.nii.gz", (2, 2, 2), value=1)
    folders = tmp_path / "ref", tmp_path / "pred"
    assert compare_folders(*folders, LesionConfig())["dice"].item() == 1
    assert compare_folders(*folders, LesionConfig(label=2))["dice"].item() == 0


def test_a_label_that_no_mask_holds_is_refused_and_one_that_a_single_mask_holds_is_not(folders):
    with pytest.raises(UserError, match="holds the label 2: every score would be perfect"):
        compare_folders(*folders, LesionConfig(label=2))
    for folder in folders:
        write(folder / "d.nii.gz", (2, 2, 2), value=2)
        assert compare_folders(*folders, LesionConfig(label=2))["dice"].tolist() == [1, 1, 1, 0]
        write(folder / "d.nii.gz")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"labels": []}', '{"labels": null}'])
def test_a_description_that_tells_no_labels_is_an_error_in_one_sentence(folders, text):
    (folders[0].parent / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json has no labels that nnU-Net could read"):
        compare_folders(*folders, LesionConfig())


@pytest.mark.parametrize("label", [None, 1])
def test_voxels_that_the_data_set_ignores_count_as_nothing_and_are_refused(folders, label):
    description = folders[0].parent / "dataset.json"
    description.write_text(json.dumps({"labels": {"background": 0, "lesion": 1, "ignore": 2}}))
    assert len(compare_folders(*folders, LesionConfig(label=label))) == 4, "no voxel is to be ignored"
    write(folders[0] / "d.nii.gz", (2, 2, 2), value=2)
    with pytest.raises(UserError, match=r"d\.nii\.gz has voxels to ignore \(label 2\)"):
        compare_folders(*folders, LesionConfig(label=label))
    description.write_text(json.dumps({"labels": {"background": 0, "lesion": [1, 2], "core": 2}}))
    assert len(compare_folders(*folders, LesionConfig(label=label))) == 4


def test_two_masks_of_one_case_are_refused(folders):
    for folder in folders:
        write(folder / "a.nii", (1, 1, 1))
        with pytest.raises(UserError, match=r"a\.nii\.gz and a\.nii are masks of one case"):
            match_cases(*folders)
        (folder / "a.nii").unlink()
    assert len(match_cases(*folders)) == 4


def test_presets_and_explicit_connectivity(tmp_path):
    diagonal = [(2, 2, 2), (3, 3, 3)]
    for folder in ("ref", "pred"):
        write(tmp_path / folder / "a.nii.gz", *diagonal)
    folders = tmp_path / "ref", tmp_path / "pred"
    counts = [
        compare_folders(*folders, config)["reference_lesions"].item()
        for config in (LesionConfig(preset="isles"), LesionConfig(preset="atlas"), LesionConfig(connectivity=6))
    ]
    assert counts == [1, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "brats"}, "no preset 'brats'"),
        ({"connectivity": 8}, "connectivity is 8"),
        ({"tolerance_mm": -1.0}, "negative"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LesionConfig(**options)


def test_empty_and_missing_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no mask"):
        match_cases(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        match_cases(tmp_path / "nowhere", tmp_path / "empty")


def test_hidden_and_foreign_files_are_no_cases(folders):
    reference, predicted = folders
    (predicted / "._a.nii.gz").write_bytes(b"")
    (predicted / "plans.json").write_text("{}")
    assert len(match_cases(reference, predicted)) == 4


def test_the_command_writes_json_tsv_and_figure_and_prints_pure_json(folders, tmp_path, monkeypatch, capsys):
    reference, predicted = folders
    out = tmp_path / "out"
    arguments = ["nnssl_evaluate", "lesions", "-ref", str(reference), "-pred", str(predicted), "-o", str(out), "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    evaluate()
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "lesions.json").read_text())
    assert printed["metrics"]["dice"]["n"] == 4
    assert printed["cases"][2]["hd95_mm"] is None
    table = pd.read_csv(out / "lesions.tsv", sep="\t")
    assert math.isnan(table["hd95_mm"][2])
    assert (out / "lesions.png").read_bytes().startswith(b"\x89PNG")


def compare(monkeypatch, folders, *more):
    reference, predicted = folders
    call = ["nnssl_evaluate", "lesions", "-ref", reference, "-pred", predicted, *more]
    monkeypatch.setattr("sys.argv", list(map(str, call)))
    evaluate()


def test_no_processes_are_refused(folders, monkeypatch, capsys):
    for number in ("0", "-1", "two"):
        with pytest.raises(SystemExit):
            compare(monkeypatch, folders, "-np", number)
        assert f"argument -np: '{number}' is not a whole number above 0" in capsys.readouterr().err


def test_without_a_folder_the_result_lies_beside_the_predictions(folders, monkeypatch):
    compare(monkeypatch, folders)
    assert {"lesions.json", "lesions.tsv", "lesions.png"} <= {path.name for path in folders[1].iterdir()}


def test_what_was_measured_is_shown_even_where_it_cannot_be_written(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*file"):
        compare(monkeypatch, folders, "-o", tmp_path / "file")
    assert "4 cases (1 without a lesion)" in capsys.readouterr().out


def test_the_figure_is_drawn_without_any_lesion(tmp_path, monkeypatch):
    for folder in ("ref", "pred"):
        write(tmp_path / folder / "a.nii.gz")
    compare(monkeypatch, (tmp_path / "ref", tmp_path / "pred"), "-o", tmp_path / "out")
    assert (tmp_path / "out" / "lesions.png").is_file()
