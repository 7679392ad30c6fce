"""The summary of missing channels: the loss against a specialist on the same cases, and models that do not compare."""

import json

import nibabel
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import missing
from nnunet_ssl.evaluation.cli import evaluate
from nnunet_ssl.evaluation.figures.missing import draw_missing
from nnunet_ssl.evaluation.missing import (
    Model,
    compare_arms,
    describe_missing,
    measure_missing,
    predict_subsets,
    subsets_of,
    summarize_missing,
)
from nnunet_ssl.evaluation.segmentations import LesionConfig
from nnunet_ssl.interface.segmentation import predict

CONFIG = LesionConfig(preset="isles")


@given(st.lists(st.sampled_from("ABCDEF"), min_size=1, max_size=5, unique=True))
def test_every_subset_that_is_not_empty_comes_once_in_the_channels_order(names):
    subsets = subsets_of(names)
    assert len(subsets) == len(set(subsets)) == 2 ** len(names) - 1
    assert all(subset and list(subset) == [name for name in names if name in subset] for subset in subsets)


@pytest.fixture
def folders(tmp_path):
    """Reference masks of two cases, predictions that shift by voxels, and a function that makes these."""
    cube = np.zeros((2, 12, 8, 8), dtype=bool)
    cube[0, 2:6, 2:6, 2:6] = True
    cube[1, 2:4, 2:4, 2:4] = True

    def make(name, *shifts):
        (tmp_path / name).mkdir()
        for case, (mask, shift) in enumerate(zip(cube, shifts)):
            shifted = np.roll(mask, shift, axis=0).astype(np.uint8)
            nibabel.save(nibabel.Nifti1Image(shifted, np.eye(4)), tmp_path / name / f"case_{case}.nii.gz")
        return tmp_path / name

    return make


def test_the_loss_is_the_specialists_lead_on_the_same_cases_and_seeds_are_averaged(folders, tmp_path):
    reference = folders("reference", 0, 0)
    predictions = [
        ("pooled", ("DWI",), folders("seed_0", 2, 0)),  # Dice 0.5, 1
        ("pooled", ("DWI",), folders("seed_1", 0, 1)),  # Dice 1, 0.5
        ("pooled", ("DWI", "ADC"), folders("both", 0, 0)),
        ("specialist", ("DWI",), folders("specialist", 1, 0)),  # Dice 0.75, 1
    ]
    cases = measure_missing(predictions, reference, CONFIG)
    assert len(cases) == 6
    result = summarize_missing(cases, CONFIG)
    dice = result["results"]["pooled"]["DWI"]["dice"]
    assert dice["mean"] == pytest.approx(0.75) and dice["n"] == 2
    assert dice["loss"] == pytest.approx(0.125) and dice["loss_interval"] == pytest.approx((0.0, 0.25))
    assert "loss" not in result["results"]["pooled"]["DWI+ADC"]["dice"]
    assert result["results"]["pooled"]["DWI"]["volume_difference_ml"]["loss"] == 0
    assert "+0.1250" in describe_missing(result)
    draw_missing(result, tmp_path / "missing.png")
    assert (tmp_path / "missing.png").stat().st_size > 5000


def test_a_larger_volume_error_is_a_loss():
    columns = {"n_channels": 1, "dice": 0.5, "lesion_f1": 0.5, "reference_lesions": 1}
    cases = pd.DataFrame(
        [{"arm": arm, "subset": "DWI", "case": "a", "volume_difference_ml": volume, **columns}
         for arm, volume in (("zeros", 3.0), ("specialist", 1.0))]
    )  # fmt: skip
    assert summarize_missing(cases, CONFIG)["results"]["zeros"]["DWI"]["volume_difference_ml"]["loss"] == 2.0


def test_the_first_arm_is_compared_with_each_other_one_by_the_number_of_channels_and_case_by_case():
    leads = {"a": 0.1, "b": 0.2, "c": 0.3}
    rows = [
        {"arm": arm, "subset": subset, "case": case, "n_channels": n_channels, "reference_lesions": 1}
        | {"dice": 0.4 + (arm == "first") * n_channels * lead + (subset == "DWI") * 0.02}
        for arm in ("first", "second", "third", "specialist")
        for subset, n_channels in (("DWI", 1), ("ADC", 1), ("DWI+ADC", 2))
        for case, lead in leads.items()
        if (arm, case) != ("third", "c")
    ]
    found = compare_arms(pd.DataFrame(rows), CONFIG)
    assert [(row["against"], row["n_channels"], row["n"]) for row in found] == [
        ("second", 1, 3), ("second", 2, 3), ("third", 1, 2), ("third", 2, 2)
    ]  # fmt: skip
    assert [row["difference"] for row in found] == pytest.approx([0.2, 0.4, 0.15, 0.3])
    assert found[0]["interval"] == pytest.approx((0.1, 0.3)) and found[0]["p"] == 0.25 and found[0]["p_holm"] == 1
    shuffled = pd.DataFrame(rows).sample(frac=1, random_state=0).sort_values("arm", kind="stable")
    assert [row["difference"] for row in compare_arms(shuffled, CONFIG)] == pytest.approx([0.2, 0.4, 0.15, 0.3])
    assert not compare_arms(pd.DataFrame(rows)[lambda table: table["arm"].isin(["first", "specialist"])], CONFIG)


def test_models_of_other_channels_are_not_compared(tmp_path):
    for name, channels in {"a": ["DWI", "ADC"], "b": ["ADC", "DWI"]}.items():
        (tmp_path / name).mkdir()
        description = {"channel_names": dict(enumerate(channels)), "file_ending": ".nii.gz"}
        (tmp_path / name / "dataset.json").write_text(json.dumps(description))
    models = [Model("a", tmp_path / "a"), Model("b", tmp_path / "b")]
    with pytest.raises(UserError, match=r"b is a model of the channels ADC, DWI, and .*a of DWI, ADC"):
        predict_subsets(models, [], tmp_path, tmp_path, device=None)


def change(what, model, images):
    """Change one thing that predictions follow from, or nothing."""
    if what == "weights":
        (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"others")
    elif what == "an image":
        write_image(images / "a_0000.nii.gz", seed=7)
    elif what == "another case":
        write_image(images / "c_0000.nii.gz", seed=7)
    elif what == "a case less":
        (images / "b_0000.nii.gz").unlink()
    elif what == "a channel more":
        write_image(images / "b_0001.nii.gz", seed=7)


def write_image(path, seed):
    path.parent.mkdir(exist_ok=True)
    values = np.random.default_rng(seed).normal(size=(4, 4, 4))
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), path)


@pytest.mark.parametrize(
    ("what", "kept"),
    [("nothing", True)]
    + [(what, False) for what in ("weights", "an image", "another case", "a case less", "a channel more")],
)
def test_predictions_are_kept_until_weights_or_images_change(tmp_path, monkeypatch, what, kept):
    images, model = tmp_path / "images", tmp_path / "model"
    for name in ("a_0000", "a_0001", "b_0000"):
        write_image(images / f"{name}.nii.gz", seed=len(name))
    (model / "fold_0").mkdir(parents=True)
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"weights")
    description = {"channel_names": {"0": "DWI", "1": "ADC"}, "file_ending": ".nii.gz"}
    (model / "dataset.json").write_text(json.dumps(description))
    for name in ("load_predictor", "refuse_missing", "predict_cases"):
        monkeypatch.setattr(missing, name, lambda *_, **__: None)

    def folders():
        done = predict_subsets([Model("one", model)], [model], images, tmp_path / "out", device=None)
        return {(arm, subset, folder) for arm, subset, folder in done}

    before = folders()
    assert len(before) == 4, "three subsets, and the specialist of both channels"
    change(what, model, images)
    after = folders()
    assert after == before if kept else after.isdisjoint(before)


@pytest.mark.parametrize("processes", [(0, 3), (3, 0), (-1, -1)])
def test_processes_for_half_of_the_work_are_refused_before_anything_is_written(tmp_path, processes):
    with pytest.raises(UserError, match=rf"{processes[0]} processes for preprocessing \(-npp\) and {processes[1]} for"):
        predict_subsets([Model("a", tmp_path)], [], tmp_path, tmp_path / "out", device=None, processes=processes)
    with pytest.raises(UserError, match="give each at least one"):
        predict(
            tmp_path, tmp_path, tmp_path / "out", folds=None, checkpoint="checkpoint_final.pth", device=None,
            processes=processes, save_probabilities=False, overwrite=True,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_mistyped_reference_is_told_before_hours_of_predicting(tmp_path, monkeypatch):
    call = ["nnssl_evaluate", "missing", "-i", "images", "-ref", tmp_path / "labelTs", "-m", "a=model", "-o", "out"]
    monkeypatch.setattr("sys.argv", [*map(str, call), "-device", "cpu"])
    with pytest.raises(SystemExit, match=r"There is no folder .*labelTs"):
        evaluate()
