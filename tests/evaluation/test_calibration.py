"""Calibration: the temperature that was put in is found, and intervals hold what they promise."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.metrics import log_loss as sklearn_log_loss

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.calibration import (
    OFFSET_ML,
    CaseCounts,
    calibrate,
    calibration_error,
    conformal_distance,
    cool,
    count,
    describe,
    distance,
    is_of,
    log_loss,
    reliability,
    temperature,
    volume_interval,
)
from nnunet_ssl.evaluation.operating_point import OperatingPoint


def voxels(too_sure, n=200_000, seed=0):
    """Voxels whose log odds are `too_sure` times what they should be: truth (bool) and probability."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-1, 2, n)
    return rng.random(n) < expit(odds), expit(odds * too_sure).astype(np.float32)


@pytest.mark.parametrize("too_sure", [0.5, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found(too_sure):
    truth, values = voxels(too_sure)
    counts = count(truth, values)
    assert sum(map(np.sum, counts)) == truth.size
    found = temperature(*counts)
    assert found == pytest.approx(too_sure, rel=0.03)
    before, after = calibration_error(reliability(*counts)), calibration_error(reliability(*counts, found))
    assert after < 0.01 and (before > 0.03 or too_sure == 1)
    assert (np.diff(cool(np.sort(values), found)) >= 0).all(), "their order stays"


def test_the_loss_is_scikit_learns():
    truth, values = voxels(1.7, n=5000)
    counts = count(truth, values)
    assert log_loss(*counts) == pytest.approx(sklearn_log_loss(truth, values.astype(float)), rel=1e-3)
    cooled = expit(logit(values.astype(float)) / 1.7)
    assert log_loss(*counts, 1.7) == pytest.approx(sklearn_log_loss(truth, cooled), rel=1e-3)


def test_the_largest_and_the_smallest_probabilities_are_counted():
    lesion, other = count(np.array([True, False, True, False]), np.array([1, 1, 0, 0], np.float32))
    assert lesion[[0, -1]].tolist() == other[[0, -1]].tolist() == [1, 1]
    assert cool(np.array([0, 1], np.float32), 3.0).tolist() == [0, 1]


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("n", [9, 30])
def test_intervals_hold_the_volumes_of_new_cases_as_often_as_promised(coverage, n):
    """Over many draws of `n` cases and one more: at least the promised share, and at most 1 / (n + 1) above it."""
    rng = np.random.default_rng(1)
    draws = 4000
    true = rng.lognormal(1.5, 1.8, (draws, n + 1)) * (rng.random((draws, n + 1)) > 0.05)
    predicted = true * rng.lognormal(0, 0.5, true.shape) * (rng.random(true.shape) > 0.1)
    distances = distance(true, predicted)
    held = 0
    for row in range(draws):
        low, high = volume_interval(predicted[row, -1], conformal_distance(distances[row, :-1], coverage))
        held += low * (1 - 1e-12) <= true[row, -1] <= high * (1 + 1e-12)
    error = 3 * np.sqrt(coverage * (1 - coverage) / draws)
    assert coverage - error <= held / draws <= coverage + 1 / (n + 1) + error


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1000), st.floats(0, 1000))
def test_an_interval_holds_just_what_lies_within_its_reach(true, predicted):
    reach = float(distance(true, predicted))
    low, high = volume_interval(predicted, reach)
    assert low - 1e-6 <= true <= high + 1e-6
    low, high = volume_interval(predicted, reach * 0.99 - 1e-9) if reach > 0.01 else (0, 0)
    assert reach <= 0.01 or not low < true < high
    assert volume_interval(predicted, 0.0) == pytest.approx((predicted, predicted), abs=1e-9 + 1e-9 * predicted)
    assert OFFSET_ML > 0


def test_too_few_cases_promise_nothing():
    with pytest.raises(UserError, match="at least 9 cases, not 8"):
        conformal_distance(np.ones(8), 0.9)
    assert conformal_distance(np.arange(9.0), 0.9) == 8


def cases(n=40, too_sure=2.0, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        truth, values = voxels(too_sure, n=2000, seed=seed * 1000 + number)
        lesion, other = count(truth, values)
        true = rng.lognormal(1, 1)
        made.append(CaseCounts(lesion=lesion, other=other, true_ml=true, predicted_ml=true * rng.lognormal(0, 0.4)))
    return made


def test_what_is_reached_is_measured_on_cases_that_had_no_part_in_it():
    result = calibrate(cases(), [str(number) for number in range(40)])
    assert result["temperature"] == pytest.approx(2, rel=0.1)
    assert result["log_loss_gain_interval"][0] > 0
    assert result["calibration_error"]["after"] < result["calibration_error"]["before"]
    low, high = result["volume"]["coverage_interval"]
    assert low < 0.9 < high
    assert "too sure of itself" in describe(result)


def test_centres_that_differ_from_all_others_are_not_covered():
    """Held out whole, a centre shows what an interval is worth elsewhere; split over the parts, it would not."""
    made = cases()
    made = [
        CaseCounts(
            lesion=case.lesion,
            other=case.other,
            true_ml=case.true_ml,
            predicted_ml=case.predicted_ml * (20.0 if number < 16 else 1.0),
        )
        for number, case in enumerate(made)
    ]
    by_centre = calibrate(made, ["odd" if number < 16 else f"c{number % 4}" for number in range(40)], 0.8)
    by_case = calibrate(made, [str(number) for number in range(40)], 0.8)
    assert by_centre["volume"]["coverage_measured"] < 0.65 < by_case["volume"]["coverage_measured"]


def test_without_a_lesion_there_is_nothing_to_calibrate_by():
    empty = [CaseCounts(lesion=c.lesion * 0, other=c.other, true_ml=0.0, predicted_ml=0.0) for c in cases(12)]
    with pytest.raises(UserError, match="No case has a lesion"):
        calibrate(empty, [str(number) for number in range(12)])


def test_the_command_writes_numbers_and_a_figure(operated, monkeypatch, tmp_path, capsys):
    from nnunet_ssl.evaluation.cli import evaluate

    root, models = operated
    call = ["nnssl_evaluate", "calibration", *models, "-ref", root / "labelsTr", "-o", tmp_path, "--coverage", "0.8"]
    monkeypatch.setattr("sys.argv", list(map(str, call)))
    evaluate()
    result = json.loads((tmp_path / "calibration.json").read_text())
    assert result["n_cases"] == 12 and result["volume"]["reach"] > 0
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert is_of(tmp_path / "calibration.json", OperatingPoint())
    assert not is_of(tmp_path / "calibration.json", OperatingPoint(threshold=0.4))
    assert "80% promised" in capsys.readouterr().out
