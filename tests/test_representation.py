import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.representation import (
    cosine_distances,
    cross_modality_distance,
    cross_modality_retrieval,
    cross_subject_distance,
    effective_rank,
    patient_distances,
    uniformity,
)


def clusters(seed=0, n_patients=6, modalities=("t1", "t2", "flair"), noise=0.05, dimension=32):
    """Embeddings with one direction per patient and a little noise per modality."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_patients, dimension))
    patient = np.repeat(np.arange(n_patients), len(modalities))
    modality = np.tile(modalities, n_patients)
    return centres[patient] + noise * rng.normal(size=(len(patient), dimension)), patient, modality


def test_distance_depends_on_direction_only():
    matrix = cosine_distances([[1, 0], [5, 0], [0, 2], [-3, 0]])
    np.testing.assert_allclose(matrix[0], [0, 0, 1, 2], atol=1e-12)


def test_cross_modality_distance_matches_a_hand_computed_case():
    # Patient a: t1 and t2 orthogonal (distance 1), a second t1 along the first: pairs (1, 1) -> mean 1.
    # Patient b: t1 and flair opposite -> 2. Patient c: one modality only -> no value.
    embeddings = [[1, 0], [0, 1], [3, 0], [1, 0], [-1, 0], [1, 1]]
    result = cross_modality_distance(embeddings, list("aaabbc"), ["t1", "t2", "t1", "t1", "flair", "t1"])
    assert result.patients.tolist() == ["a", "b"]
    np.testing.assert_allclose(result.values, [1.0, 2.0])
    assert result.mean == pytest.approx(1.5)
    assert result.std == pytest.approx(np.sqrt(0.5))


def test_repeats_of_one_modality_do_not_count_as_cross_modality():
    result = cross_modality_distance([[1, 0], [0, 1]], ["a", "a"], ["t1", "t1"])
    assert result.n_patients == 0
    assert np.isnan(result.mean)
    assert np.isnan(result.std)


@pytest.mark.parametrize("modalities", ["any", "same", "different"])
def test_cross_subject_distance_matches_a_naive_loop(modalities):
    embeddings, patient, modality = clusters(n_patients=4, noise=1.0)
    distance = cosine_distances(embeddings)

    def between(p, q):
        pairs = [(i, j) for i in np.flatnonzero(patient == p) for j in np.flatnonzero(patient == q)]
        if modalities != "any":
            pairs = [(i, j) for i, j in pairs if (modality[i] == modality[j]) == (modalities == "same")]
        return np.mean([distance[i, j] for i, j in pairs])

    expected = [np.mean([between(p, q) for q in range(4) if q != p]) for p in range(4)]
    result = cross_subject_distance(embeddings, patient, modality, modalities=modalities)
    np.testing.assert_allclose(result.values, expected)


def test_a_single_patient_has_no_cross_subject_distance():
    assert cross_subject_distance([[1, 0], [0, 1]], ["a", "a"]).n_patients == 0


def test_comparing_modalities_without_labels_is_refused():
    with pytest.raises(ValueError, match="one label per scan"):
        patient_distances([[1, 0]], ["a"], modalities="same")


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_the_order_of_scans_does_not_matter(seed):
    embeddings, patient, modality = clusters(seed, noise=0.5)
    order = np.random.default_rng(seed).permutation(len(patient))
    shuffled = embeddings[order], patient[order], modality[order]
    for measure in (cross_modality_distance, cross_subject_distance):
        np.testing.assert_allclose(measure(embeddings, patient, modality).values, measure(*shuffled).values)
    assert cross_modality_retrieval(embeddings, patient, modality).accuracy == pytest.approx(
        cross_modality_retrieval(*shuffled).accuracy
    )
    assert effective_rank(embeddings) == pytest.approx(effective_rank(embeddings[order]))
    assert uniformity(embeddings) == pytest.approx(uniformity(embeddings[order]))


def test_retrieval_finds_every_patient_among_tight_clusters():
    embeddings, patient, modality = clusters()
    result = cross_modality_retrieval(embeddings, patient, modality)
    assert result.accuracy == 1.0
    assert len(result.hit) == 6 * 3 * 2
    np.testing.assert_allclose(result.chance, 1 / 6)


def test_retrieval_of_a_collapsed_representation_is_at_chance():
    _, patient, modality = clusters()
    result = cross_modality_retrieval(np.ones((len(patient), 8)), patient, modality)
    assert result.accuracy == pytest.approx(1 / 6)


def test_retrieval_searches_only_modalities_the_patient_has():
    result = cross_modality_retrieval(np.eye(4), ["a", "a", "b", "c"], ["t1", "t2", "t1", "t2"])
    assert sorted(zip(result.query.tolist(), result.gallery.tolist())) == [(0, "t2"), (1, "t1")]
    assert np.isnan(cross_modality_retrieval(np.eye(2), ["a", "b"], ["t1", "t1"]).accuracy)


def test_effective_rank_counts_equally_used_directions():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.ones((9, 4))) == pytest.approx(1)
    assert effective_rank(np.repeat(np.eye(5)[:3], 4, axis=0)) == pytest.approx(3)


def test_uniformity_is_zero_at_collapse_and_lower_for_spread_rows():
    assert uniformity(np.ones((5, 3))) == pytest.approx(0)
    assert uniformity([[1, 0], [-1, 0]]) == pytest.approx(-8)
    assert np.isnan(uniformity([[1, 0]]))


def test_rows_that_are_not_finite_give_nan_and_no_exception():
    broken = np.array([[1.0, np.nan], [0.0, 1.0]])
    assert np.isnan(effective_rank(broken))
    assert np.isnan(cross_subject_distance(broken, ["a", "b"]).mean)
