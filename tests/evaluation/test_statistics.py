import numpy as np
import pytest
from scipy import stats

from nnunet_ssl.evaluation.statistics import (
    bootstrap_interval,
    holm,
    jackknife_interval,
    mean_interval,
    paired_wilcoxon,
    t_interval,
)


def test_mean_interval_agrees_with_the_normal_one_for_many_normal_values():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    np.testing.assert_allclose(mean_interval(values), [values.mean() - half, values.mean() + half], atol=0.03)


def test_mean_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(size=40), repeats=500) for _ in range(200)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(2).random(30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_values_that_do_not_exist_are_no_units():
    assert mean_interval([1.0, np.nan, 3.0, 2.0]) == mean_interval([1.0, 3.0, 2.0])


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, 2.0]])
def test_fewer_than_two_units_have_no_interval(values):
    assert np.isnan(mean_interval(values)).all()


def test_draws_without_a_value_are_left_out():
    def ratio(weights):
        with np.errstate(divide="ignore", invalid="ignore"):
            return weights[:, 0] / weights[:, 0]

    assert bootstrap_interval(ratio, 2) == (1.0, 1.0)


def test_the_t_interval_is_that_of_the_t_test_and_needs_two_units():
    values = np.random.default_rng(0).normal(size=5)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval([*values, np.nan]) == pytest.approx((expected.low, expected.high))
    assert t_interval([2.0, 2.0]) == (2, 2)
    assert np.isnan(t_interval([1.0, np.nan])).all()


def test_jackknife_of_a_mean_with_a_group_per_unit_is_the_classical_standard_error():
    values = np.random.default_rng(3).normal(size=15)
    low, high = jackknife_interval(lambda kept: values[kept].mean(), np.arange(15))
    half = 1.959964 * stats.sem(values)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], rtol=1e-6)


def test_jackknife_leaves_out_whole_patients():
    patient = np.repeat(np.arange(6), 3)
    seen = []

    def statistic(kept):
        seen.append(kept.copy())
        return 0.0

    jackknife_interval(statistic, patient, groups=3)
    for kept in seen:
        for name in range(6):
            assert kept[patient == name].all() or not kept[patient == name].any()
    assert [int(kept.sum()) for kept in seen] == [18, 12, 12, 12]


def test_wilcoxon_of_equal_values_is_one_and_of_a_clear_difference_small():
    values = np.random.default_rng(4).random(30)
    assert paired_wilcoxon(values, values) == 1.0
    assert paired_wilcoxon(values, values + 0.1) < 1e-4


def test_wilcoxon_of_six_wins_is_the_exact_two_sided_probability_and_ties_say_nothing():
    wins = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert paired_wilcoxon(wins, np.zeros(6)) == pytest.approx(2 / 2**6)
    assert paired_wilcoxon(np.append(wins, 0.0), np.zeros(7)) == pytest.approx(2 / 2**6, rel=0.2)


def test_holm_matches_a_hand_computed_case_in_any_order():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made monotone: .04 .06 .06 .06.
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
