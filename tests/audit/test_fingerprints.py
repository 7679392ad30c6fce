import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.audit.fingerprints import _grid, _mirrored, similarities
from nnunet_ssl.audit.origins import inside_corpus, known_corpora, known_origins, origins_in


def random_values(seed, count=2):
    return np.random.default_rng(seed).integers(-90, 90, (count, int(_grid()[1].sum()))).astype(np.int8)


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 1.3))
@settings(max_examples=10, deadline=None)
def test_scale_and_exchange_of_left_and_right_do_not_part_a_fingerprint_from_itself(seed, scale):
    values = random_values(seed, 1)
    scaled = np.rint(values * min(scale, 1)).astype(np.int8)

    assert similarities(values, scaled)[0, 0] > 0.98
    np.testing.assert_allclose(similarities(values, values[:, _mirrored()]), 1, atol=1e-5)


def test_fingerprints_of_chance_have_nothing_in_common():
    table = similarities(random_values(0), random_values(1))

    assert np.abs(table).max() < 0.05


def test_mirroring_twice_is_nothing():
    assert (_mirrored()[_mirrored()] == np.arange(_grid()[1].sum())).all()


def test_every_name_in_the_tables_of_origins_is_an_origin():
    named = [name for corpus in known_corpora().values() for name in corpus.contains]
    named += [name for origin in known_origins().values() for name in origin.contains]

    assert set(named) <= known_origins().keys()


def test_a_word_inside_another_word_gives_no_origin_away():
    assert origins_in(["/search/monarch/t1.nii.gz", "PT001_OASIS1"]) == {}
    assert set(origins_in(["PT002_ARC"])) == {"ARC"}


def test_what_is_told_of_a_corpus_names_its_source_or_says_may():
    told = inside_corpus(known_corpora()["OpenMind"], ["Bonn", "BraTS"])

    assert "may be" in told["Bonn"]
    assert "BraTS" not in told
