"""The operating point: scored as the evaluation scores, chosen without seeing what it is measured on, applied alike."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from held_out import CASES, READER, SPACING, lesion_map, save_case, write_models
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.postprocessing.remove_connected_components import entry_point_apply_postprocessing, load_postprocess_save

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import operating
from nnunet_ssl.evaluation.lesions import PRESETS, compare_masks
from nnunet_ssl.evaluation.operate_cli import operate
from nnunet_ssl.evaluation.operating import Goal, candidates, choose, score
from nnunet_ssl.evaluation.operating_point import FILE, OperatingPoint, load, postprocess
from nnunet_ssl.evaluation.out_of_fold import find_held_out, only_label, read_case
from nnunet_ssl.evaluation.ranking import rank_cases
from nnunet_ssl.evaluation.unmirrored import predict_unmirrored

ISLES26 = Goal(preset="isles26", metrics=PRESETS["isles26"].official)
EVERYTHING = tuple(name for name in operating.METRICS)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.booleans())
def test_a_candidate_scores_what_its_mask_scores(seed, number, empty):
    truth, values = lesion_map(seed)
    truth &= not empty
    points = candidates("isles26")
    chosen = [points[number % len(points)], OperatingPoint(threshold=0.999, constant_map_when_empty=True)]
    found = score(truth, {True: values}, chosen, EVERYTHING, SPACING)
    for point, row in zip(chosen, found):
        mask = point.segment(values, 3.0)
        expected = compare_masks(truth, mask, spacing=SPACING, probabilities=point.finish(values, mask))
        np.testing.assert_allclose(row, [getattr(expected, name) for name in EVERYTHING], rtol=1e-9)


def test_where_nothing_is_and_nothing_is_found_all_candidates_are_right():
    nothing = np.zeros((4, 5, 6))
    found = score(nothing > 0, {True: nothing.astype(np.float32)}, candidates("isles26"), ISLES26.metrics, SPACING)
    assert (found == [1, 1, 0, 0, 1]).all()


def test_unmirrored_maps_are_scored_by_themselves():
    truth, values = lesion_map(1)
    points = candidates("isles26", (True, False))
    found = score(truth, {True: np.zeros_like(values), False: values}, points, ("dice",), SPACING)[:, 0]
    mirrored = np.array([point.mirroring for point in points])
    assert not found[mirrored].any() and found[~mirrored].max() > 0.5


def test_candidates_begin_with_nnunets_own_and_hold_none_twice():
    points = candidates("isles26", (True, False))
    own = points[0]
    assert (own.threshold, own.minimum_mm3, own.saving_peak, own.mirroring) == (0.5, 0.0, None, True)
    assert len(set(points)) == len(points)
    assert candidates("atlas")[0].connectivity == 6 and not candidates("atlas")[0].constant_map_when_empty


@pytest.mark.parametrize(("voxels", "kept"), [(9, False), (10, True), (11, True)])
def test_a_lesion_of_just_the_minimum_size_stays(voxels, kept):
    values = np.zeros((20, 3, 3), np.float32)
    values[:voxels, 1, 1] = 0.6
    point = OperatingPoint(minimum_mm3=30.0)
    assert point.segment(values, 2.9999999).any() == kept
    values[0, 1, 1] = 0.95
    assert replace(point, saving_peak=0.9).segment(values, 3.0).sum() == voxels, "its peak saves it"


def test_the_rank_is_the_challenges():
    rng = np.random.default_rng(0)
    scores = np.round(rng.random((7, 4, len(ISLES26.metrics))), 1)
    scores[2, 1, 0] = np.nan
    scores[3, :, 4] = np.nan
    tables = {
        str(point): pd.DataFrame(scores[:, point], columns=list(ISLES26.metrics), index=list("abcdefg"))
        for point in range(4)
    }
    expected = pd.concat(rank_cases(tables, ISLES26.metrics).values()).groupby(level=0).mean()
    np.testing.assert_allclose(operating._losses(scores, ISLES26), expected.to_numpy())


def test_of_one_metric_the_mean_counts_and_a_missing_value_is_the_worst():
    scores = np.array([[[5.0], [3.0], [np.nan]], [[np.nan], [np.nan], [np.nan]], [[1.0], [2.0], [0.0]]])
    goal = Goal(preset="isles26", metrics=("hd95_mm",))
    losses = operating._losses(scores, goal)
    assert losses[0].tolist() == [5, 3, 5] and np.isnan(losses[1]).all()
    assert choose(scores, candidates("isles26")[:3], ["a", "b", "c"], goal).report["n_cases"] == 3


def test_a_gain_is_the_difference_of_the_means_beside_it_also_where_a_mask_has_no_distance():
    scores = np.random.default_rng(0).uniform(1, 5, (12, 3, 1))
    scores[:, 1] -= 1
    scores[:4, 0] = scores[3:6, 1] = np.nan
    goal = Goal(preset="isles26", metrics=("hd95_mm",))
    choice = choose(scores, candidates("isles26")[:3], [str(case) for case in range(12)], goal)
    gain = choice.report["gain"]["hd95_mm"]
    assert gain["chosen"] - gain["plain"] == pytest.approx(gain["difference"])
    assert gain["n_cases"] < 12 and f"over the {gain['n_cases']} cases that have it" in operating.describe(choice)


def dice(scores):
    """Scores of one metric, (cases, points, 1)."""
    return np.asarray(scores, dtype=float)[:, :, None], Goal(preset="isles26", metrics=("dice",))


def test_no_unit_is_measured_on_what_was_chosen_by_it():
    # Each of two units has a point that is perfect for its cases and useless for the other's.
    units = np.repeat([0, 1], 10)
    scores = np.full((20, 3), 0.0)
    scores[:, 0] = 0.5
    scores[np.arange(20), units + 1] = 6.0
    values, goal = dice(scores)
    points = candidates("isles26")[:3]
    gain = choose(values, points, [f"unit {unit}" for unit in units], goal).report["gain"]["dice"]
    assert gain["difference"] == -0.5 and not gain["gained"]
    split = choose(values, points, [str(case) for case in range(20)], goal).report["gain"]["dice"]
    assert split["difference"] > 1, "units that are split give themselves away"


def test_where_nothing_is_to_be_gained_none_is_reported():
    differences, claims = [], 0
    for seed in range(60):
        values, goal = dice(np.random.default_rng(seed).normal(size=(40, 30)))
        choice = choose(values, candidates("isles26")[:30], [str(case) for case in range(40)], goal)
        differences.append(choice.report["gain"]["dice"]["difference"])
        claims += choice.report["gain"]["dice"]["gained"]
    assert abs(np.mean(differences)) < 4 * np.std(differences) / np.sqrt(60)
    assert claims <= 6, "one in forty is expected"


def test_a_point_that_is_better_everywhere_is_found_and_its_gain_is_told():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.5, 0.05, (30, 5))
    scores[:, 3] += 0.2
    values, goal = dice(scores)
    points = candidates("isles26")[:5]
    choice = choose(values, points, [str(case) for case in range(30)], goal)
    gain = choice.report["gain"]["dice"]
    assert choice.point == points[3] and gain["gained"]
    assert gain["interval"][0] < 0.2 < gain["interval"][1]
    assert gain["difference"] == pytest.approx((scores[:, 3] - scores[:, 0]).mean())
    assert "may be as good" not in operating.describe(choice)


def test_of_equally_good_points_nnunets_own_is_kept():
    values, goal = dice(np.full((6, 9), 0.7))
    choice = choose(values, candidates("isles26")[:9], list("abcdef"), goal)
    assert choice.point == candidates("isles26")[0]
    assert "may be as good" in operating.describe(choice)


def test_one_unit_alone_can_not_be_measured():
    values, goal = dice(np.zeros((4, 2)))
    with pytest.raises(UserError, match="All cases are of one unit"):
        choose(values, candidates("isles26")[:2], ["same"] * 4, goal)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["nnssl_operate", *map(str, arguments)])
    operate()


# Files as nnU-Net leaves them


def test_the_command_stores_a_choice_that_gains_and_says_what_comes_next(operated, monkeypatch, capsys):
    root, models = operated
    run(monkeypatch, models[0], "-ref", root / "labelsTr", "--metric", "dice", "-o", root / "again")
    shown = capsys.readouterr().out
    assert "--save_probabilities" in shown and "nnUNetv2_apply_postprocessing" in shown
    report = json.loads((root / "again" / FILE).read_text())
    assert report["point"]["threshold"] < 0.5 and report["n_units"] == 6
    assert report["gain"]["dice"]["difference"] > 0.02
    assert load(root / "both" / FILE).constant_map_when_empty


def segmented(folder):
    return {path.name: nib.load(path).get_fdata() for path in sorted(folder.glob("*.nii.gz"))}


def test_nnunets_postprocessing_applies_it(operated, tmp_path):
    _, models = operated
    functions, arguments = pickle.loads((models[0] / "postprocessing.pkl").read_bytes())
    assert functions == [postprocess] and arguments[0]["threshold"] != 0.5
    fold = models[0] / "fold_0" / "validation"
    reader = recursive_find_reader_writer_by_name(READER)()
    for held_out in find_held_out(models[:1], operated[0] / "labelsTr"):
        if held_out.folders[0] == fold:
            source, target = (str(place / held_out.reference.name) for place in (fold, tmp_path))
            load_postprocess_save(source, target, reader, functions, arguments)
            reference, values = read_case(held_out)
            expected = load(models[0] / FILE).segment(values, reference.voxel_ml * 1000)
            assert np.array_equal(nib.load(target).get_fdata() > 0, expected)


@pytest.mark.slow
def test_stock_commands_apply_it_to_a_model_and_to_an_ensemble(operated, tmp_path, monkeypatch):
    """In this process: the entry points of nnUNetv2_ensemble and nnUNetv2_apply_postprocessing, with their workers."""
    from nnunetv2.ensembling.ensemble import entry_point_ensemble_folders

    root, models = operated
    for name, model in zip("ab", models):
        for fold in range(3):
            for path in (model / f"fold_{fold}" / "validation").iterdir():
                (tmp_path / name).mkdir(exist_ok=True)
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
        for file in ("plans.json", "dataset.json"):
            (tmp_path / name / file).write_bytes((model / file).read_bytes())
    folders = ["-i", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "ab", "-np", "1", "--save_npz"]
    monkeypatch.setattr("sys.argv", ["nnUNetv2_ensemble", *map(str, folders)])
    entry_point_ensemble_folders()
    for name, chosen, of in (("a", models[0], models[:1]), ("ab", root / "both", models)):
        call = ["-i", tmp_path / name, "-o", tmp_path / f"{name}_done", "-np", "1"]
        call += ["-pp_pkl_file", chosen / "postprocessing.pkl", "-plans_json", models[0] / "plans.json"]
        monkeypatch.setattr("sys.argv", ["nnUNetv2_apply_postprocessing", *map(str, call)])
        entry_point_apply_postprocessing()
        done = segmented(tmp_path / f"{name}_done")
        assert len(done) == CASES
        for held_out in find_held_out(of, root / "labelsTr"):
            reference, values = read_case(held_out)
            expected = load(chosen / FILE).segment(values, reference.voxel_ml * 1000)
            assert np.array_equal(done[held_out.reference.name] > 0, expected)


@pytest.fixture
def case(tmp_path):
    """A predicted case with two lesions, of 12 and 1 voxels of 3 mm3, and a function that postprocesses it."""
    values = np.full((8, 8, 8), 0.1, np.float32)
    values[1:5, 1:4, 1] = 0.7
    values[6, 6, 6] = 0.9
    affine = np.diag([1.0, 3.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "image.nii.gz")
    reader = recursive_find_reader_writer_by_name(READER)()
    data, properties = reader.read_images([str(tmp_path / "image.nii.gz")])
    (tmp_path / "pred").mkdir()
    save_case(tmp_path / "pred" / "case.v2", data[0], properties)

    def apply(**point):
        arguments = [{"label": 1, **asdict(OperatingPoint(**point))}]
        source, target = tmp_path / "pred" / "case.v2.nii.gz", tmp_path / "done.nii.gz"
        load_postprocess_save(str(source), str(target), reader, [postprocess], arguments)
        return nib.load(target).get_fdata()

    return tmp_path / "pred", apply


def test_millimetres_count_and_not_voxels(case):
    _, apply = case
    assert apply(minimum_mm3=3.0).sum() == 13
    assert apply(minimum_mm3=4.0).sum() == 12
    assert apply(minimum_mm3=37.0).sum() == 0
    assert apply(minimum_mm3=37.0, saving_peak=0.8).sum() == 1


def test_without_maps_a_size_still_applies_but_a_threshold_is_refused(case):
    folder, apply = case
    (folder / "case.v2.npz").unlink()
    assert apply(minimum_mm3=4.0).sum() == 12
    for point in ({"threshold": 0.4}, {"minimum_mm3": 4.0, "saving_peak": 0.8}):
        with pytest.raises(UserError, match=r"no case\.v2\.npz beside it.*--save_probabilities"):
            apply(**point)


def test_another_cases_map_is_refused(case):
    folder, apply = case
    np.savez_compressed(folder / "case.v2.npz", probabilities=np.zeros((2, 4, 4, 4), np.float32))
    with pytest.raises(UserError, match="do not belong together"):
        apply(threshold=0.4)


def test_a_map_of_other_lesions_is_refused_though_its_grid_is_the_same(case):
    folder, apply = case
    with np.load(folder / "case.v2.npz") as file:
        classes = file["probabilities"]
    for moved in (np.roll(classes, 1, axis=2), classes[::-1], np.where(classes > 0.8, 0.2, classes)):
        np.savez_compressed(folder / "case.v2.npz", probabilities=moved)
        with pytest.raises(UserError, match="do not belong together"):
            apply(threshold=0.4)


def test_a_voxel_that_rounding_put_on_either_side_is_no_other_map(case):
    folder, apply = case
    with np.load(folder / "case.v2.npz") as file:
        classes = file["probabilities"]
    classes[:, 0, 0, :2] = [[0.50001, 0.49999], [0.49999, 0.50001]]
    np.savez_compressed(folder / "case.v2.npz", probabilities=classes)
    assert apply(threshold=0.4).sum() == 15


def test_another_caller_is_refused():
    with pytest.raises(UserError, match="another version, or another caller"):
        postprocess(np.zeros((3, 3, 3), np.uint8), label=1, **asdict(OperatingPoint()))


def test_centres_are_told_by_the_conversions_report(held_out_models, tmp_path):
    root, models = held_out_models
    cases = [f"sub-{number // 2}_ses-{number:02d}" for number in range(CASES)]
    report = tmp_path / "report.tsv"
    pd.DataFrame({"case": cases, "group": ["R001", "R002", "R003"] * 4}).to_csv(report, sep="\t", index=False)
    found = find_held_out(models, root / "labelsTr", by="centre", report=report)
    assert {case.unit for case in found} == {"R001", "R002", "R003"}
    assert len({case.unit for case in find_held_out(models, root / "labelsTr")}) == 6
    with pytest.raises(UserError, match="no column site"):
        find_held_out(models, root / "labelsTr", by="site", report=report)
    with pytest.raises(UserError, match="there is none"):
        find_held_out(models, root / "labelsTr", by="group")
    pd.DataFrame({"case": cases[1:], "group": "R001"}).to_csv(report, sep="\t", index=False)
    with pytest.raises(UserError, match="of 1 cases, such as sub-0_ses-00"):
        find_held_out(models, root / "labelsTr", by="group", report=report)


def without_maps(model):
    next((model / "fold_1" / "validation").glob("*.npz")).unlink()


def a_case_twice(model):
    path = next((model / "fold_1" / "validation").glob("*.nii.gz"))
    (model / "fold_0" / "validation" / path.name).write_bytes(path.read_bytes())
    map_file = path.name.replace(".nii.gz", ".npz")
    (model / "fold_0" / "validation" / map_file).write_bytes(path.with_name(map_file).read_bytes())


def no_folds(model):
    for number in range(3):
        (model / f"fold_{number}").rename(model / f"fold_all{number or ''}_")
    (model / "fold_all_").rename(model / "fold_all")
    for number in (1, 2):
        (model / f"fold_all{number}_").rename(model / f"old_{number}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_maps, "--val --npz"),
        (a_case_twice, "each case belongs to one fold"),
        (no_folds, r"no fold_\*/validation"),
    ],
)
def test_what_is_not_out_of_fold_is_refused(tmp_path, spoil, message):
    (model,) = write_models(tmp_path, "A__nnUNetPlans__3d_fullres")
    spoil(model)
    with pytest.raises(UserError, match=message):
        find_held_out([model], tmp_path / "labelsTr")


def test_maps_of_an_earlier_training_are_refused(tmp_path):
    """A fold that was trained again without --npz has new masks beside old maps."""
    (model,) = write_models(tmp_path, "A__nnUNetPlans__3d_fullres")
    held_out = find_held_out([model], tmp_path / "labelsTr")[0]
    mask = held_out.folders[0] / held_out.reference.name
    image = nib.load(mask)
    nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 2, axis=1), image.affine), mask)
    with pytest.raises(UserError, match="not of one prediction"):
        read_case(held_out)


def test_cases_with_and_without_mirroring_are_the_same_ones(held_out_models):
    root, models = held_out_models
    cases = find_held_out(models[:1], root / "labelsTr")
    for mirrored, unmirrored in ((cases[1:], cases), (cases[1:], cases[:-1]), (cases, cases[:-1])):
        with pytest.raises(UserError, match="with or without mirroring, but not both"):
            operating.score_cases({True: mirrored, False: unmirrored}, candidates("isles26"), ISLES26)


def test_models_that_held_out_different_cases_are_refused(tmp_path):
    models = write_models(tmp_path, "A__nnUNetPlans__3d_fullres", "B__nnUNetPlans__3d_fullres")
    for path in (models[1] / "fold_0" / "validation").glob("sub-0*"):
        path.unlink()
    with pytest.raises(UserError, match=r"B__.* did not hold out 1 cases"):
        find_held_out(models, tmp_path / "labelsTr")


def test_what_is_no_models_folder_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"nowhere is no folder of a model"):
        run(monkeypatch, tmp_path / "nowhere")
    (tmp_path / "fold_0").mkdir()
    with pytest.raises(UserError, match="is not called TRAINER__PLANS__CONFIGURATION"):
        predict_unmirrored(tmp_path, torch.device("cpu"))
    fold = tmp_path / "A__nnUNetPlans__3d_fullres" / "fold_0"
    (fold / "validation").mkdir(parents=True)
    (fold / "validation" / "case.npz").touch()
    monkeypatch.chdir(fold.parent)
    with pytest.raises(UserError, match=r"has no checkpoint_final\.pth"):
        predict_unmirrored(Path(), torch.device("cpu"))


def test_several_labels_and_unknown_metrics_are_refused(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "core": 1, "edema": 2}}))
    with pytest.raises(UserError, match="one lesion"):
        only_label([tmp_path])
    with pytest.raises(UserError, match="no metric f2"):
        Goal(preset="isles26", metrics=("f2",))
