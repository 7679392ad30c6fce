"""Fractions of the training subjects."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ssl.trainers.fractions import nested_subset, subject_of

CASES = [f"sub-r{subject:03d}_ses-{session}" for subject in range(40) for session in (1, 2)]


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 5))
def test_a_smaller_fraction_lies_inside_a_larger_one(one, other, seed):
    small, large = sorted((one, other))
    assert set(nested_subset(CASES, small, seed)) <= set(nested_subset(CASES, large, seed))


@settings(deadline=None)
@given(st.integers(1, 100), st.permutations(CASES))
def test_the_subset_depends_on_the_subjects_and_not_on_their_order(fraction, cases):
    assert sorted(nested_subset(cases, fraction, 0)) == nested_subset(CASES, fraction, 0)


@pytest.mark.parametrize("fraction", [25, 50, 75, 100])
def test_subjects_are_kept_whole_and_in_the_asked_number(fraction):
    kept = nested_subset(CASES, fraction, 0)
    assert len({subject_of(case) for case in kept}) == 40 * fraction // 100
    assert len(kept) == 2 * 40 * fraction // 100


def test_seeds_draw_different_subjects_and_one_subject_always_stays():
    assert nested_subset(CASES, 25, 0) != nested_subset(CASES, 25, 1)
    assert nested_subset(["case_1", "case_2", "case_3"], 1, 0)


def test_cases_without_a_bids_name_are_their_own_subjects():
    assert subject_of("sub-r001s002_ses-1") == "sub-r001s002"
    assert subject_of("BRATS_017") == "BRATS_017"
