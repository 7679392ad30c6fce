"""Score random masks as the organisers of ISLES'26 do, with panoptica itself, for tests/evaluation/test_isles26.py.

Run in an environment of its own, with panoptica==1.0.1 and scikit-learn:
python tests/support/isles26_reference.py tests/evaluation/isles26_reference.npz 100
"""

import sys

import numpy as np
from panoptica import ConnectedComponentsInstanceApproximator, InputType, NaiveThresholdMatching, Panoptica_Evaluator
from scipy import ndimage
from sklearn.metrics import auc, precision_recall_curve

SHAPE = (11, 10, 9)


def draw(rng):
    """A reference, a prediction that resembles it more or less, and a map in 32 steps; some of them empty."""
    truth = ndimage.gaussian_filter(rng.standard_normal(SHAPE), rng.uniform(0.3, 1.3))
    noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE), rng.uniform(0.3, 1.3))
    likeness = rng.uniform(0, 1)
    scores = likeness * truth / truth.std() + (1 - likeness) * noise / noise.std()
    masks = [values > np.quantile(values, rng.uniform(0.7, 0.999)) for values in (truth, scores)]
    scores = (31 * (scores - scores.min()) / np.ptp(scores)).astype(np.uint8)
    for mask in masks:
        mask &= rng.random() > 0.05
    return *masks, scores * np.uint8(rng.random() > 0.1)


def score(reference, predicted, scores):
    """Lesions of the reference, of the prediction, F1, Dice and PR-AUC, with the organisers' rules for empty masks."""
    evaluator = Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=NaiveThresholdMatching(matching_threshold=0.25),
    )
    result, _ = evaluator.evaluate(predicted.astype(int), reference.astype(int), verbose=False)["ungrouped"]
    lesions = result.num_ref_instances, result.num_pred_instances
    f1, dice = (result.rq, result.global_bin_dsc) if sum(lesions) else (1.0, 1.0)
    values = scores.astype(np.float32).ravel() / 31
    if reference.any():
        precision, recall, _ = precision_recall_curve(reference.ravel(), values)
        area = auc(recall, precision)
    else:
        area = float((values == values[0]).all())
    return *lesions, f1, dice, area


if __name__ == "__main__":
    rng = np.random.default_rng(26)
    cases = [draw(rng) for _ in range(int(sys.argv[2]))]
    np.savez_compressed(
        sys.argv[1],
        reference=np.stack([case[0] for case in cases]),
        predicted=np.stack([case[1] for case in cases]),
        scores=np.stack([case[2] for case in cases]),
        expected=np.array([score(*case) for case in cases]),
    )
