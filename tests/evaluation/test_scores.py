import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from nnunet_ssl.evaluation.scores import balanced_accuracy, mean_absolute_error, r2, roc_auc


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(4, 40))
def test_every_draw_scores_as_scikit_learn_does(seed, n):
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, (5, n)).astype(float)
    weights[:, :4] += 1  # every draw has two values of each class
    number, guess = rng.normal(size=(2, n))
    positive = np.arange(n) % 2 == 0
    label = np.array(["a", "b"])[positive.astype(int)]
    choice = np.array(["a", "b"])[rng.integers(0, 2, n)]
    score = rng.integers(0, 5, n) / 4  # many equal scores
    for ours, theirs, truth, output in (
        (mean_absolute_error, metrics.mean_absolute_error, number, guess),
        (r2, metrics.r2_score, number, guess),
        (balanced_accuracy, metrics.balanced_accuracy_score, label, choice),
        (roc_auc, metrics.roc_auc_score, positive, score),
    ):
        expected = [theirs(truth, output, sample_weight=draw) for draw in weights]
        np.testing.assert_allclose(ours(truth, output, weights), expected, rtol=1e-9, atol=1e-12)


def test_a_draw_without_a_class_has_no_score():
    truth, weights = np.array(["a", "b"]), np.array([[1.0, 0.0], [1.0, 1.0]])
    assert np.isnan(balanced_accuracy(truth, truth, weights)).tolist() == [True, False]
    assert np.isnan(roc_auc(truth == "a", np.array([1.0, 0.0]), weights)).tolist() == [True, False]


def test_a_draw_of_one_value_explains_no_variance():
    assert np.isnan(r2(np.array([3.0, 3.0]), np.array([3.0, 2.0]), np.ones((1, 2)))[0])


def test_equal_scores_are_worth_half():
    assert roc_auc(np.array([True, False, True]), np.ones(3), np.ones((1, 3)))[0] == pytest.approx(0.5)
