"""Which scans are drawn, how often, and where the patch lies."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nnunet_ssl.corpus.prepared import Corpus, number_rows
from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.views.sampling import (
    SamplingConfig,
    common_box,
    draw_centre,
    draw_jitter,
    example_table,
)

DRAWS = 20_000

SESSIONS = {
    # source, subject, session: modalities
    ("big", "1", "1"): ["t1", "t2", "flair"],
    ("big", "1", "2"): ["t1", "t2"],
    ("big", "2", "1"): ["t1", "t1", "t1", "dwi"],
    ("big", "3", "1"): ["t1", "t1"],
    ("big", "4", "1"): ["t2", "unknown", "unknown"],
    ("small", "1", "1"): ["t1", "t2", "unknown"],
    ("small", "2", "1"): ["unknown"],
}


@pytest.fixture
def corpus(tmp_path):
    rows = []
    for (source, subject, session), modalities in SESSIONS.items():
        for number, modality in enumerate(modalities):
            rows.append(
                {
                    "scan_id": f"{source}_{subject}_{session}_{number}",
                    "dataset": source,
                    "subject": f"{source}/{subject}",
                    "session": f"{source}/{subject}/{session}",
                    "modality": modality,
                    "repeat": number,
                    "shape": "9,9,9",
                    "bbox": "0,9,0,9,0,9",
                }
            )
    return Corpus(tmp_path, number_rows(pd.DataFrame(rows)), {"spacing": [1.0, 1.0, 1.0]})


def probabilities(corpus, kind, **options):
    """The probability of each entry of the table, by names of scans."""
    table = example_table(corpus, kind, SamplingConfig(**options))
    names = [tuple(corpus.scans["scan_id"].iloc[rows]) for rows in table.rows]
    return dict(zip(names, np.diff(table.cumulative, prepend=0)))


def by(corpus, shares, column):
    """Sum the probabilities of entries by a column of their (first) scan."""
    of_scan = corpus.scans.set_index("scan_id")[column].astype(str)
    total = Counter()
    for names, share in shares.items():
        total[of_scan[names[0]]] += share
    return dict(total)


def test_pairs_are_of_different_known_modalities_of_one_session(corpus):
    scans = corpus.scans.set_index("scan_id")
    found = probabilities(corpus, "mcl")
    for one, other in found:
        assert scans["session"][one] == scans["session"][other]
        assert scans["modality"][one] != scans["modality"][other]
        assert "unknown" not in (scans["modality"][one], scans["modality"][other])
    expected = 3 + 1 + 3 + 1  # by session: t1-t2, t1-flair, t2-flair; t1-t2; three t1 with dwi; t1-t2
    assert len(found) == expected


def test_sessions_are_drawn_alike_however_many_scans_they_hold(corpus):
    for kind, count in (("mcl", 4), ("mim", 7)):
        shares = by(corpus, probabilities(corpus, kind), "session")
        assert len(shares) == count
        np.testing.assert_allclose(list(shares.values()), 1 / count)


def test_scans_can_be_drawn_alike(corpus):
    np.testing.assert_allclose(list(probabilities(corpus, "mim", weighting="scan").values()), 1 / 18)
    shares = by(corpus, probabilities(corpus, "mcl", weighting="scan"), "session")
    np.testing.assert_allclose(shares["big/2/1"], 4 / 11)  # it holds 4 of the 11 scans that can enter a pair


def test_a_large_source_need_not_drown_a_small_one(corpus):
    for kind in ("mcl", "mim"):
        shares = by(corpus, probabilities(corpus, kind, weighting="source"), "dataset")
        np.testing.assert_allclose([shares["big"], shares["small"]], 0.5)


def test_repeats_share_the_weight_of_their_modality(corpus):
    found = probabilities(corpus, "mcl")
    repeats = [share for (one, _), share in found.items() if one.startswith("big_2_1")]
    np.testing.assert_allclose(repeats, [1 / 12] * 3)


def test_modalities_can_be_balanced(corpus):
    shares = by(corpus, probabilities(corpus, "mim", balanced_modalities=True), "modality")
    np.testing.assert_allclose(list(shares.values()), 1 / 5)
    modality = corpus.scans.set_index("scan_id")["modality"].astype(str)
    pairs = Counter()
    for names, share in probabilities(corpus, "mcl", balanced_modalities=True).items():
        pairs[frozenset(modality[name] for name in names)] += share
    assert len(pairs) == 4
    np.testing.assert_allclose(list(pairs.values()), 1 / 4)


@pytest.mark.parametrize("options", [{}, {"weighting": "source"}, {"weighting": "scan", "balanced_modalities": True}])
@pytest.mark.parametrize("kind", ["mcl", "mim"])
def test_draws_follow_the_probabilities(corpus, kind, options):
    table = example_table(corpus, kind, SamplingConfig(**options))
    rng = np.random.default_rng(0)
    drawn = Counter(tuple(sorted(table.draw(rng))) for _ in range(DRAWS))
    expected = {tuple(sorted(rows)): share for rows, share in zip(table.rows, np.diff(table.cumulative, prepend=0))}
    assert drawn.keys() <= expected.keys()
    counts = [drawn[rows] for rows in expected]
    assert stats.chisquare(counts, np.array(list(expected.values())) * DRAWS).pvalue > 0.01


def test_either_modality_of_a_pair_comes_first(corpus):
    table, rng = example_table(corpus, "mcl", SamplingConfig()), np.random.default_rng(0)
    first_is_lower = sum(rows[0] < rows[1] for rows in (table.draw(rng) for _ in range(2000)))
    assert stats.binomtest(first_is_lower, 2000, 0.5).pvalue > 0.01


def test_cl_meets_every_scan_as_often_as_mcl_does(corpus):
    counts = {}
    for kind in ("mcl", "cl"):
        table, rng = example_table(corpus, kind, SamplingConfig()), np.random.default_rng(0)
        draws = np.array([table.draw(rng) for _ in range(DRAWS)])
        assert (draws[:, 0] == draws[:, 1]).all() == (kind == "cl")
        counts[kind] = np.bincount(draws[:, 0], minlength=len(corpus))
    met = counts["mcl"] > 0
    np.testing.assert_array_equal(met, counts["cl"] > 0)
    assert stats.chi2_contingency([counts["mcl"][met], counts["cl"][met]]).pvalue > 0.01


def test_the_second_stream_is_of_scans_that_cannot_pair(corpus):
    table = example_table(corpus, "mim", SamplingConfig(), only_unpaired=True)
    paired = set(example_table(corpus, "mcl", SamplingConfig()).rows.flat)
    assert set(table.rows.flat) == set(range(len(corpus))) - paired


def test_a_table_is_flat_arrays(corpus):
    """What forked workers touch, and thereby copy, is reference counts: there are none here."""
    table = example_table(corpus, "mcl", SamplingConfig())
    assert table.rows.dtype == np.int64 and table.cumulative.dtype == np.float64


def test_nothing_to_draw_is_said(corpus):
    single = Corpus(corpus.folder, corpus.scans[corpus.scans["modality"] == "t1"], corpus.preprocessing)
    with pytest.raises(UserError, match=r"mcl needs co-registered pairs \(4 subjects, 5 sessions, 8 scans"):
        example_table(single, "mcl", SamplingConfig())
    pairs = Corpus(corpus.folder, corpus.scans[corpus.scans["session"] == "big/1/2"], corpus.preprocessing)
    with pytest.raises(UserError, match="none is left for a stream of unpaired scans"):
        example_table(pairs, "mim", SamplingConfig(), only_unpaired=True)
    empty = Corpus(corpus.folder, corpus.scans[:0], corpus.preprocessing)
    with pytest.raises(UserError, match="The corpus is empty"):
        example_table(empty, "mim", SamplingConfig())


BOUNDS = st.tuples(st.integers(0, 30), st.integers(1, 40)).map(lambda pair: (pair[0], sum(pair)))


@given(box=st.tuples(BOUNDS, BOUNDS, BOUNDS), size=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 2**32))
def test_a_patch_shows_as_much_brain_as_it_can(box, size, seed):
    box, size = np.array(box), np.array(size)
    start = draw_centre(box, size, np.random.default_rng(seed)) - (size - 1) / 2
    np.testing.assert_array_equal(start, np.round(start))  # voxels of the patch are voxels of the volume
    shown = np.minimum(start + size, box[:, 1]) - np.maximum(start, box[:, 0])
    np.testing.assert_array_equal(shown, np.minimum(size, box[:, 1] - box[:, 0]))


def test_every_place_in_the_box_is_drawn_alike():
    rng, box = np.random.default_rng(0), np.array([[2, 12], [0, 4], [5, 9]])
    starts = np.array([draw_centre(box, (6, 6, 4), rng) for _ in range(3000)]) - np.array([2.5, 2.5, 1.5])
    for axis, places in enumerate(([2, 3, 4, 5, 6], [-2, -1, 0], [5])):
        values, counts = np.unique(starts[:, axis], return_counts=True)
        assert values.tolist() == places
        assert len(places) == 1 or stats.chisquare(counts).pvalue > 0.01


@given(boxes=st.lists(st.tuples(BOUNDS, BOUNDS, BOUNDS), min_size=1, max_size=3))
def test_views_share_the_part_that_all_boxes_share(boxes):
    boxes = np.array(boxes)
    low, high = common_box(boxes).T
    assert (low < high).all()
    for axis in range(3):
        shared = set.intersection(*(set(range(*box[axis])) for box in boxes))
        assert set(range(low[axis], high[axis])) == (shared or set(range(*boxes[0, axis])))


def test_jitter_is_uniform_in_a_ball_of_millimetres():
    rng, spacing = np.random.default_rng(0), np.array([3.0, 1.0, 0.5])
    shifts = np.array([draw_jitter(6.0, spacing, rng) for _ in range(3000)]) * spacing
    distance = np.linalg.norm(shifts, axis=1)
    assert stats.kstest((distance / 6) ** 3, "uniform").pvalue > 0.01
    for axis in range(3):  # the projection of a uniform direction is uniform
        assert stats.kstest(shifts[:, axis] / distance, stats.uniform(-1, 2).cdf).pvalue > 0.01
    np.testing.assert_array_equal(draw_jitter(0.0, spacing, rng), 0)
