"""The scores of ISLES'26: panoptica's own numbers, maps as nnU-Net leaves them, and the challenge's ranking."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from scipy.stats import rankdata

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.lesions import compare_masks
from nnunet_ssl.evaluation.probabilities import TURNED_TO_RAS, pr_auc, read_map
from nnunet_ssl.evaluation.ranking import rank, rank_cases
from nnunet_ssl.imaging.geometry import read_volume

MILLIMETRE = (1.0, 1.0, 1.0)


def mask(*ranges, shape=(40, 6, 6)):
    """A mask of bars along the first axis, each from its first voxel to before its last."""
    array = np.zeros(shape, dtype=bool)
    for first, last in ranges:
        array[first:last, 2, 2] = True
    return array


def scores(reference, predicted):
    result = compare_masks(reference, predicted, spacing=MILLIMETRE)
    return result.recognition_quality, result.matched_dice, result.dice


def test_scores_are_those_that_panoptica_gave():
    """tests/support/isles26_reference.py made them, with the organisers' settings of panoptica 1.0.1."""
    with np.load(Path(__file__).with_name("isles26_reference.npz")) as stored:
        cases = [stored[name] for name in ("reference", "predicted", "scores", "expected")]
    for reference, predicted, values, expected in zip(*cases):
        probabilities = values.astype(np.float32) / 31
        result = compare_masks(reference, predicted, spacing=MILLIMETRE, probabilities=probabilities)
        found = (result.reference_lesions, result.predicted_lesions, result.recognition_quality, result.matched_dice)
        np.testing.assert_allclose((*found, result.pr_auc), expected, rtol=1e-12)
    lesions, matched = cases[3][:, :2], cases[3][:, 3] > 0
    assert lesions.max() > 20 and (lesions == 0).any(axis=0).all(), "many lesions, and none, are among the cases"
    assert 0.2 < matched.mean() < 0.9


def test_a_lesion_matches_from_a_quarter_of_the_union_on():
    truth = mask((0, 10))
    assert scores(truth, mask((6, 16))) == (1, pytest.approx(0.4), pytest.approx(0.4))  # 4 of 16
    assert scores(truth, mask((7, 17))) == (
        0,
        0,
        pytest.approx(0.3),
    )  # 3 of 17: the voxels that agree count for nothing


def test_any_overlap_and_one_to_one_differ_where_a_prediction_bridges_two_lesions():
    result = compare_masks(mask((0, 10), (11, 16)), mask((0, 16)), spacing=MILLIMETRE)
    assert result.recognition_quality == pytest.approx(2 / 3)
    assert result.lesion_f1 == 1


def test_each_lesion_matches_once_and_the_best_pair_first():
    # Both predictions reach a quarter of the union with the reference; the second comes closer.
    result = compare_masks(mask((0, 12)), mask((0, 4), (5, 11)), spacing=MILLIMETRE)
    assert result.recognition_quality == pytest.approx(2 / 3)
    assert result.count_difference == 1


@pytest.mark.parametrize(("reference", "predicted", "score"), [((), (), 1), ((), ((1, 2),), 0), (((1, 2),), (), 0)])
def test_empty_masks(reference, predicted, score):
    assert scores(mask(*reference), mask(*predicted))[:2] == (score, score)


def test_a_map_without_a_lesion_must_be_constant():
    empty, values = np.zeros((3, 3, 3), dtype=bool), np.full((3, 3, 3), 0.2, dtype=np.float32)
    assert pr_auc(empty, values) == 1
    values[1, 1, 1] += 1e-7
    assert pr_auc(empty, values) == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_only_the_order_of_a_maps_voxels_counts(seed):
    rng = np.random.default_rng(seed)
    truth = rng.random((6, 5, 4)) < 0.2
    values = (rng.integers(0, 50, truth.shape) + 20 * truth).astype(np.float32)
    area = pr_auc(truth, values)
    assert pr_auc(truth, np.exp(values / 20)) == pytest.approx(area)
    assert 0 <= area <= 1


def test_the_area_is_by_trapezoids_and_not_average_precision():
    truth, values = np.array([1, 0, 1, 0], dtype=bool), np.array([4, 3, 2, 1], dtype=np.float32)
    # precision 1/2, 2/3, 1/2, 1, 1 at recall 1, 1, 1/2, 1/2, 0
    assert pr_auc(truth, values) == pytest.approx(0.5 + 0.5 * (1 / 2 + 2 / 3) / 2)


def write_nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def stored(shape, orientation, dtype=np.float32, seed=0):
    """An image of different values everywhere, stored in an orientation, and its affine."""
    image = nib.Nifti1Image(
        np.random.default_rng(seed).permutation(np.prod(shape)).reshape(shape).astype(dtype), np.eye(4)
    )
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    return image.as_reoriented(turn)


def save_probabilities(folder, case, reader, image):
    """Leave what nnU-Net would for a network whose lesion probability is the image itself."""
    write_nifti(folder / "image.nii.gz", np.asarray(image.dataobj), image.affine)
    values, properties = recursive_find_reader_writer_by_name(reader)().read_images([str(folder / "image.nii.gz")])
    (folder / "image.nii.gz").unlink()
    lesion = values[0] / values.max()
    np.savez_compressed(folder / f"{case}.npz", probabilities=np.stack([1 - lesion, lesion]))
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": reader}))
    segmentation = str(folder / f"{case}.nii.gz")
    recursive_find_reader_writer_by_name(reader)().write_seg((lesion > 0.5).astype(np.uint8), segmentation, properties)


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "PSR", "PSL", "SAL"])
@pytest.mark.parametrize("reader", TURNED_TO_RAS)
def test_a_map_lies_where_nnunets_reader_and_writer_put_the_mask(tmp_path, reader, orientation):
    image = stored((5, 6, 7), orientation)
    save_probabilities(tmp_path, "a", reader, image)
    written = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-5)
    values = read_map(tmp_path / "a.npz", written, None)
    np.testing.assert_allclose(values, image.get_fdata() / image.get_fdata().max(), rtol=1e-6)
    assert np.array_equal(values > 0.5, written.array > 0)


def test_small_probabilities_of_two_classes_stay_apart(tmp_path):
    save_probabilities(tmp_path, "a", "NibabelIO", stored((3, 3, 3), "RAS"))
    lesion = np.linspace(1e-12, 1e-9, 27, dtype=np.float32).reshape(3, 3, 3)
    np.savez_compressed(tmp_path / "a.npz", probabilities=np.stack([1 - lesion, lesion]))
    assert len(np.unique(read_map(tmp_path / "a.npz", read_volume(tmp_path / "a.nii.gz"), None))) == 27


def test_of_several_classes_the_lesions_or_all_but_the_background_count(tmp_path):
    save_probabilities(tmp_path, "a", "NibabelIO", stored((3, 3, 3), "RAS"))
    classes = np.stack([np.full((3, 3, 3), share, dtype=np.float32) for share in (0.5, 0.2, 0.3)])
    np.savez_compressed(tmp_path / "a.npz", probabilities=classes)
    grid = read_volume(tmp_path / "a.nii.gz")
    found = [float(read_map(tmp_path / "a.npz", grid, label).mean()) for label in (None, 1, 2)]
    assert found == pytest.approx([0.5, 0.2, 0.3])
    with pytest.raises(UserError, match=r"not \(classes, Z, Y, X\)"):
        read_map(tmp_path / "a.npz", grid, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n_classes", [2, 3, 40])
def test_classes_are_told_from_regions_whatever_their_rounding(tmp_path, n_classes, dtype):
    save_probabilities(tmp_path, "a", "NibabelIO", stored((3, 4, 5), "RAS"))
    grid = read_volume(tmp_path / "a.nii.gz")
    rng = np.random.default_rng(0)
    classes = rng.dirichlet(np.full(n_classes, 0.1), size=(5, 4, 3)).transpose(3, 0, 1, 2).astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", probabilities=classes)
    np.testing.assert_allclose(read_map(tmp_path / "a.npz", grid, None), 1 - classes[0].T.astype(float), atol=5e-3)
    regions = rng.random((n_classes, 5, 4, 3)).astype(dtype)
    regions[:, 0] = 0  # background
    np.savez_compressed(tmp_path / "a.npz", probabilities=regions)
    values = read_map(tmp_path / "a.npz", grid, None)
    assert np.array_equal(values > 0.5, (regions > 0.5).any(axis=0).T), "nnU-Net's mask of all labels"
    for label in range(1, n_classes):
        with pytest.raises(UserError, match=rf"probabilities of regions, of which none is that of the label {label}"):
            read_map(tmp_path / "a.npz", grid, label)


@pytest.fixture
def folders(tmp_path):
    """Two cases with their maps: the first right, the second without a lesion and a constant map."""
    ref, pred = tmp_path / "ref", tmp_path / "pred"
    pred.mkdir()
    for case in ("a", "b"):
        image = stored((5, 6, 7), "LAS")
        save_probabilities(pred, case, "NibabelIOWithReorient", image)
        truth = image.get_fdata() > 0.5 * image.get_fdata().max()
        write_nifti(ref / f"{case}.nii.gz", (truth & (case == "a")).astype(np.uint8), image.affine)
    write_nifti(pred / "b.nii.gz", np.zeros(truth.shape, np.uint8), image.affine)
    np.savez_compressed(pred / "b.npz", probabilities=np.full((2, *truth.shape[::-1]), 0.5, np.float32))
    return ref, pred


def run(monkeypatch, *call):
    monkeypatch.setattr("sys.argv", ["nnssl_evaluate", *map(str, call)])
    evaluate()


def lesions(monkeypatch, folders, *more, preset="isles26"):
    run(monkeypatch, "lesions", "-ref", folders[0], "-pred", folders[1], "--preset", preset, *more)
    return json.loads((folders[1] / "lesions.json").read_text())


def test_the_command_finds_nnunets_maps_and_puts_the_official_scores_first(folders, monkeypatch, capsys):
    result = lesions(monkeypatch, folders)
    assert result["official"] == [
        "matched_dice",
        "recognition_quality",
        "count_difference",
        "volume_difference_ml",
        "pr_auc",
    ]
    assert [result["metrics"][name]["mean"] for name in result["official"]] == [1, 1, 0, 0, 1]
    starred = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert len(starred) == 5 and "PR-AUC" in starred[-1]


def test_maps_may_be_images_in_a_folder_of_their_own(folders, tmp_path, monkeypatch):
    for case in ("a", "b"):
        grid = read_volume(folders[1] / f"{case}.nii.gz")
        write_nifti(tmp_path / "maps" / f"{case}.nii.gz", read_map(folders[1] / f"{case}.npz", grid, None), grid.affine)
        (folders[1] / f"{case}.npz").unlink()
    assert lesions(monkeypatch, folders, "-prob", tmp_path / "maps")["metrics"]["pr_auc"]["mean"] == 1
    write_nifti(tmp_path / "maps" / "a.nii.gz", np.ones((5, 6, 7), np.float32), np.diag([2.0, 1, 1, 1]))
    with pytest.raises(SystemExit, match=r"a\.nii\.gz does not lie on the grid of its mask"):
        lesions(monkeypatch, folders, "-prob", tmp_path / "maps")


def test_without_any_map_there_is_no_pr_auc_and_the_command_says_how_to_get_it(folders, monkeypatch, capsys):
    for case in ("a", "b"):
        (folders[1] / f"{case}.npz").unlink()
    result = lesions(monkeypatch, folders)
    assert result["metrics"]["pr_auc"]["n"] == 0
    assert result["metrics"]["recognition_quality"]["n"] == 2
    assert "--save_probabilities" in capsys.readouterr().out


def test_maps_are_only_read_for_presets_that_want_them_or_when_asked_for(folders, monkeypatch):
    assert lesions(monkeypatch, folders, preset="isles")["metrics"]["pr_auc"]["n"] == 0
    assert lesions(monkeypatch, folders, "-prob", folders[1], preset="isles")["metrics"]["pr_auc"]["n"] == 2


def spoil(pred, how):
    if how == "one map missing":
        (pred / "b.npz").unlink()
    elif how == "no plans":
        (pred / "plans.json").unlink()
    elif how == "a reader of photographs":
        (pred / "plans.json").write_text('{"image_reader_writer": "NaturalImage2DIO"}')
    elif how == "no archive":
        (pred / "a.npz").write_bytes(b"not a zip file")
    else:
        with np.load(pred / "a.npz") as file:
            classes = file["probabilities"]
        changed = {
            "another shape": classes[:, :3],
            "nan": np.where(classes == classes.max(), np.nan, classes),
            "objects": classes.astype(object),
            "no classes": classes[0],
            "the background's": classes[::-1],
        }
        np.savez(pred / "a.npz", probabilities=changed[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one map missing", r"1 of 2 cases have no probability map in .*pred: b\."),
        ("no plans", r"Neither plans\.json nor dataset\.json"),
        ("a reader of photographs", r"names the reader NaturalImage2DIO"),
        ("no archive", r"a\.npz holds no probabilities of nnU-Net"),
        ("objects", r"a\.npz holds no probabilities of nnU-Net"),
        ("another shape", r"its mask \(5, 6, 7\)"),
        ("nan", r"NaN or infinite"),
        ("no classes", r"not \(classes, Z, Y, X\)"),
        ("the background's", r"no higher inside the predicted mask than outside"),
    ],
)
def test_maps_that_can_not_be_trusted_are_refused_by_name(folders, how, message, monkeypatch):
    spoil(folders[1], how)
    with pytest.raises(SystemExit, match=message):
        lesions(monkeypatch, folders)


def test_an_ensembles_data_set_file_says_how_it_was_read(folders, monkeypatch):
    (folders[1] / "plans.json").unlink()
    (folders[1] / "dataset.json").write_text('{"overwrite_image_reader_writer": "NibabelIOWithReorient"}')
    assert lesions(monkeypatch, folders)["metrics"]["pr_auc"]["mean"] == 1


def tables(seed=0, n_cases=20, names=("a", "b", "c")):
    rng = np.random.default_rng(seed)
    columns = {"matched_dice": rng.random, "count_difference": lambda n: rng.integers(0, 4, n)}
    index = pd.Index([f"case{i:02d}" for i in range(n_cases)], name="case")
    return {name: pd.DataFrame({key: draw(n_cases) for key, draw in columns.items()}, index) for name in names}


def test_ranks_are_those_of_each_case_and_metric_averaged():
    found = tables()
    dice, count = (np.array([table[name] for table in found.values()]) for name in ("matched_dice", "count_difference"))
    expected = (rankdata(-dice, axis=0) + rankdata(count, axis=0)).mean(axis=1) / 2
    result = rank(found, ["matched_dice", "count_difference"])
    ranks = {entry["prediction"]: entry["rank"] for entry in result["predictions"]}
    assert [ranks[name] for name in found] == pytest.approx(list(expected))
    assert list(ranks.values()) == sorted(ranks.values())
    for entry in result["predictions"]:
        assert entry["interval"][0] < entry["rank"] < entry["interval"][1]


def test_one_catastrophe_costs_one_case_and_no_more():
    found = tables(names=("a", "b"))
    found["a"]["matched_dice"] = found["b"]["matched_dice"] + 0.001
    found["a"].loc["case00", "matched_dice"] = 0
    result = rank(found, ["matched_dice"])
    assert result["predictions"][0]["prediction"] == "a"
    assert result["predictions"][0]["rank"] == pytest.approx(1 + 1 / 20)


def test_a_missing_case_or_score_takes_the_worst_rank_and_what_no_one_has_ranks_no_one():
    found = tables()
    found["b"] = found["b"].drop(index="case03")
    found["c"].loc["case04", "matched_dice"] = np.nan
    for table in found.values():
        table.loc["case05", "matched_dice"] = np.nan
    ranks = rank_cases(found, ["matched_dice"])["matched_dice"]
    assert ranks.loc["case03", "b"] == ranks.loc["case04", "c"] == 3
    assert sorted(ranks.loc["case03"]) == sorted(ranks.loc["case04"]) == [1, 2, 3]
    assert ranks.loc["case05"].isna().all()
    assert len(ranks) == 20
    assert {entry["prediction"]: entry["missing_cases"] for entry in rank(found, ["matched_dice"])["predictions"]} == {
        "a": 0,
        "b": 1,
        "c": 0,
    }


def test_the_command_ranks_what_was_measured(folders, tmp_path, monkeypatch, capsys):
    for name in ("good", "worse"):
        run(
            monkeypatch,
            *("lesions", "-ref", folders[0], "-pred", folders[1], "--preset", "isles26", "-o", tmp_path / name),
        )
        write_nifti(folders[1] / "a.nii.gz", *half_of(folders[1] / "a.nii.gz"))
    capsys.readouterr()
    run(monkeypatch, "ranking", tmp_path / "worse", tmp_path / "good", "-o", tmp_path / "out", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert [Path(entry["prediction"]).name for entry in printed["predictions"]] == ["good", "worse"]
    assert printed["predictions"][0]["metrics"]["pr_auc"] == 1.5, "the maps are the same"


def half_of(path):
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[::2] = 0
    return array, image.affine


def test_predictions_that_can_not_be_compared_are_refused(folders, tmp_path, monkeypatch):
    call = ("lesions", "-ref", folders[0], "-pred", folders[1], "--preset")
    run(monkeypatch, *call, "isles26", "-o", tmp_path / "one")
    run(monkeypatch, *call, "isles", "-o", tmp_path / "other")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "lesions.json").write_text("[1]")
    for more, message in (
        (("one",), "at least two different"),
        (("one", "one"), "at least two different"),
        (("one", "other"), "preset isles26 and connectivity 26, .* isles and 26. Measure both alike"),
        (("one", "none"), r"There is no .*none/lesions\.json: run nnssl_evaluate lesions"),
        (("one", "bad"), "is not what nnssl_evaluate lesions writes"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "ranking", *(tmp_path / name for name in more))
    run(monkeypatch, *call, "isles26", "-o", tmp_path / "other")
    for option, message in ((("-l", 1), "label any .* with 1 and"), (("--tolerance", 2), "of 1.0 mm, .* and 2.0 mm")):
        run(monkeypatch, *call, "isles26", "-o", tmp_path / "differently", *option)
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, "ranking", tmp_path / "one", tmp_path / "differently")
    renamed = json.loads((tmp_path / "one" / "lesions.json").read_text())
    for row in renamed["cases"]:
        row["case"] += "_of_another_fold"
    (tmp_path / "bad" / "lesions.json").write_text(json.dumps(renamed))
    with pytest.raises(SystemExit, match="No case was predicted by all"):
        run(monkeypatch, "ranking", tmp_path / "one", tmp_path / "bad")
    with pytest.raises(SystemExit, match=r"no metric beauty\. Metrics: dice"):
        run(monkeypatch, "ranking", tmp_path / "one", tmp_path / "other", "--metrics", "beauty")
