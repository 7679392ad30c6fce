import json
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.conversion import splits
from nnunet_ssl.conversion.reporting import write_text
from nnunet_ssl.conversion.splits import make_splits, size_bins, store_splits


def cases(groups, sessions=1):
    return [
        SimpleNamespace(id=f"sub-{i:03d}_ses-{s}", subject=f"sub-{i:03d}", group=group)
        for i, group in enumerate(groups)
        for s in range(sessions)
    ]


def check(folds, ids):
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(ids), "each case is held out once"
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(ids)


def test_random_folds_are_those_that_nnunet_draws_itself():
    found = cases(["a"] * 23)
    ids = sorted(case.id for case in found)
    folds = make_splits(found[::-1], "random")
    assert folds == generate_crossval_split(ids, seed=12345, n_splits=5)
    check(folds, ids)


def test_random_folds_keep_a_subjects_sessions_together():
    found = cases(["a"] * 11, sessions=3)
    folds = make_splits(found, "random")
    check(folds, [case.id for case in found])
    for fold in folds:
        assert not {case[:7] for case in fold["train"]} & {case[:7] for case in fold["val"]}


def test_cohort_folds_balance_uneven_cohorts():
    sizes = [111, 70, 50, 40, 40, 30, 25, 20, 12, 9, 7, 5, 4, 3, 2, 2]  # as uneven as ATLAS' 33
    found = cases([f"R{i:03d}" for i, size in enumerate(sizes) for _ in range(size)])
    folds = make_splits(found, "cohort")
    check(folds, [case.id for case in found])
    cohort_of = {case.id: case.group for case in found}
    for fold in folds:
        assert not {cohort_of[case] for case in fold["train"]} & {cohort_of[case] for case in fold["val"]}
        assert 0.1 < len(fold["val"]) / len(found) < 0.3


@pytest.mark.parametrize("count", [2, 4])
def test_few_cohorts_make_fewer_folds(count):
    found = cases([f"R{i % count}" for i in range(12)])
    assert len(make_splits(found, "cohort")) == count


def test_stratified_folds_share_out_every_group_evenly():
    found = cases(["fcd"] * 57 + ["hc"] * 85)
    folds = make_splits(found, "stratified")
    check(folds, [case.id for case in found])
    patients = {case.id for case in found if case.group == "fcd"}
    assert {len(patients & set(fold["val"])) for fold in folds} <= {11, 12}
    assert {len(set(fold["val"]) - patients) for fold in folds} == {17}
    assert folds == make_splits(found, "stratified"), "the same each time"


@pytest.mark.parametrize("folds", ["random", "cohort", "stratified"])
def test_one_case_makes_no_folds_and_two_make_two(folds):
    assert make_splits(cases(["a"]), folds) == []
    check(make_splits(cases(["a", "a"]), folds), ["sub-000_ses-0", "sub-001_ses-0"])


def test_folds_of_which_a_kill_left_one_file_old_are_written_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    raw = tmp_path / "raw" / "Dataset501_ATLASv2"
    store_splits([{"train": ["a"], "val": ["b"]}], raw)
    written = []

    def killed(path, text):
        written.append(path)
        if len(written) > 1:
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr(splits, "write_text", killed)
    new = [{"train": ["b"], "val": ["a"]}]
    with pytest.raises(KeyboardInterrupt):
        store_splits(new, raw)
    monkeypatch.setattr(splits, "write_text", write_text)
    store_splits(new, raw)
    assert not caplog.records
    used = tmp_path / "preprocessed" / raw.name / "splits_final.json"
    assert json.loads(used.read_text()) == json.loads((raw / "conversion" / "splits_final.json").read_text()) == new


def test_a_split_file_of_the_users_own_stays(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    raw, used = tmp_path / "raw" / "Dataset501_X", tmp_path / "pre" / "Dataset501_X" / "splits_final.json"
    first, second = make_splits(cases("aabbccdd"), "random"), make_splits(cases("aabbccdd"), "cohort")
    store_splits(first, raw)
    assert json.loads(used.read_text()) == first
    store_splits(second, raw)
    assert json.loads(used.read_text()) == second, "ours is replaced"
    used.write_text(json.dumps(first[:1]))
    store_splits(second, raw)
    assert json.loads(used.read_text()) == first[:1]
    assert "is not from this script and stays as it is" in caplog.text


def release(seed=0):
    """Cases as uneven as ATLAS R3.0: 55 centres of 1 to 169 cases, some with one chronicity only, sizes by centre."""
    sizes = [169, 111, 94, 86, *[int(60 * 0.92**i) + 1 for i in range(48)], 1, 1, 1]
    rng = np.random.default_rng(seed)
    found = cases([f"R{i:03d}" for i, size in enumerate(sizes) for _ in range(size)])
    habit = {group: rng.random(2) for group in dict.fromkeys(case.group for case in found)}
    times = {case.id: "chronic" if rng.random() < habit[case.group][0] else "earlier" for case in found}
    volumes = {case.id: float(np.exp(2 * rng.standard_normal() + 3 * habit[case.group][1])) for case in found}
    return found, times, volumes


def deviations(folds, times, bins):
    """By how much the folds' shares differ at most from all cases': of cases, of chronic ones, of each size."""
    everyone = [case for fold in folds for case in fold["val"]]

    def chronic(part):
        return np.mean([times[case] == "chronic" for case in part])

    def sizes(part):
        return np.bincount([bins[case] for case in part], minlength=5) / len(part)

    return (
        max(abs(len(fold["val"]) / len(everyone) - 0.2) for fold in folds),
        max(abs(chronic(fold["val"]) - chronic(everyone)) for fold in folds),
        max(np.abs(sizes(fold["val"]) - sizes(everyone)).max() for fold in folds),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_centre_folds_hold_out_whole_centres_and_balance_number_size_and_time(seed):
    found, times, volumes = release(seed)
    bins = size_bins(volumes)
    folds = make_splits(found, "centre", {case.id: f"{times[case.id]} {bins[case.id]}" for case in found})
    check(folds, [case.id for case in found])
    assert len(folds) == 5
    centre = {case.id: case.group for case in found}
    for fold in folds:
        assert not {centre[case] for case in fold["train"]} & {centre[case] for case in fold["val"]}
    number, time, size = deviations(folds, times, bins)
    assert number < 0.04 and time < 0.08 and size < 0.08
    assert time < 0.5 * deviations(make_splits(found, "cohort"), times, bins)[1], "better than by numbers alone"


def test_size_bins_hold_equally_many_and_equal_sizes_share_one():
    bins = size_bins({f"c{i}": float(i) for i in range(50)})
    assert sorted(bins.values()) == sorted([0, 1, 2, 3, 4] * 10)
    assert bins["c0"] == 0 and bins["c49"] == 4
    assert len(set(size_bins(dict.fromkeys("abc", 0.0)).values())) == 1
    assert size_bins({}) == {}


@pytest.mark.parametrize("strata", [None, {"sub-000_ses-0": "a", "sub-001_ses-0": "b", "sub-002_ses-0": "c"}])
def test_centre_folds_need_no_strata_that_go_round(strata):
    folds = make_splits(cases(["R1", "R2", "R3"]), "centre", strata)
    assert len(folds) == 3
    check(folds, ["sub-000_ses-0", "sub-001_ses-0", "sub-002_ses-0"])
