"""Names in tables find the subjects they mean, or nobody."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_ssl.participants import describe_partners, find_partners


def one(*names):
    return [(name,) for name in names]


def partners_of(names, known):
    return {name: partner for (name,), (partner,) in find_partners(one(*names), one(*known)).items()}


@pytest.mark.parametrize("written", ["sub-01", "1", "01", "001", "sub-1", "sub_01", "SUB-01", "Sub1", "sub-0001"])
@pytest.mark.parametrize("folder", ["sub-01", "sub_1", "sub-001", "SUB-1"])
def test_prefix_capitals_and_padding_may_differ(written, folder):
    assert partners_of([written, "7"], [folder, "sub-02"]) == {written: folder}


@pytest.mark.parametrize("written", ["A1", "sub-A01", "a001"])
def test_padding_after_letters_may_differ_too(written):
    assert partners_of([written], ["sub-A01", "sub-A10", "sub-B01"]) == {written: "sub-A01"}


@pytest.mark.parametrize("other", ["10", "100", "sub-11", "2", "", "n/a", "sub-", "0"])
def test_other_numbers_are_other_subjects(other):
    assert partners_of([other], ["sub-01"]) == {}


def test_what_is_ambiguous_finds_nobody():
    assert partners_of(["001"], ["sub-1", "sub-01"]) == {}
    assert partners_of(["1", "001"], ["sub-01"]) == {}
    assert partners_of(["sub-01", "1"], ["sub-01"]) == {"sub-01": "sub-01"}  # "1" may be another subject


def test_what_is_written_alike_belongs_together_whatever_else_there_is():
    assert partners_of(["sub-01", "sub-1"], ["sub-1", "sub-01"]) == {"sub-01": "sub-01", "sub-1": "sub-1"}
    assert partners_of(["01", "1"], ["sub-1", "sub-01"]) == {"01": "sub-01", "1": "sub-1"}


def test_each_part_of_a_name_may_differ_and_all_count():
    known = [("A", "sub_1", "ses_1"), ("A", "sub_1", "ses_2"), ("B", "sub_1", "ses_1")]
    assert find_partners([("A", "1", "2"), ("B", "01", "ses-01"), ("C", "1", "1")], known) == {
        ("A", "1", "2"): known[1],
        ("B", "01", "ses-01"): known[2],
    }


names = st.lists(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["", "sub-", "sub_", "SUB-"]),
        st.sampled_from(["", "0", "00"]),
        st.integers(0, 12),
    )
    | st.text(string.ascii_lowercase + "0-", max_size=3)
)


@given(names, names)
def test_partners_are_one_to_one_and_do_not_depend_on_order(written, known):
    partners = partners_of(written, known)
    assert len(set(partners.values())) == len(partners)
    assert set(partners) <= set(written) and set(partners.values()) <= set(known)
    assert all(partners[name] == name for name in set(written) & set(known))
    assert partners_of(written[::-1], known[::-1]) == partners


@given(st.sets(st.integers(0, 300)), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["", "sub-", "sub_"]))
def test_every_number_finds_itself_whatever_the_two_paddings(numbers, here, there, prefix):
    partners = partners_of([f"{prefix}{n:0{here}}" for n in numbers], [f"sub-{n:0{there}}" for n in numbers])
    assert partners == {f"{prefix}{n:0{here}}": f"sub-{n:0{there}}" for n in numbers}


def test_the_description_counts_rows_and_subjects_without_partner():
    rows = one("1", "sub-02", "9", "9")
    known = one("sub-01", "sub-02", "sub-03")
    assert describe_partners(rows, find_partners(rows, known), {"sub-03"}) == (
        "1 names differ in prefix or zero padding (1 is sub-01); 2 of 4 rows speak of nothing here, such as 9; "
        "1 subjects have no row, such as sub-03"
    )
    assert describe_partners(rows[1:2], find_partners(rows[1:2], known), set()) == ""
