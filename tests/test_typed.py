"""Settings from other people's words: a list that is typed as one text."""

from dataclasses import dataclass

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.typed import build


@dataclass(frozen=True)
class Settings:
    names: tuple[str, ...] = ()
    pair: tuple[str, str] = ("", "")
    sizes: tuple[int, int, int] = (1, 1, 1)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("names", "FLAIR, T1w", ("FLAIR", "T1w")),
        ("names", " ixi ", ("ixi",)),
        ("names", "0100,axt", ("0100", "axt")),
        ("pair", "a , b", ("a", "b")),
        ("sizes", "96, 80,64", (96, 80, 64)),
        ("sizes", "96 x 80x64", (96, 80, 64)),
    ],
)
def test_spaces_around_the_commas_belong_to_no_item_and_names_stay_text(key, text, expected):
    assert getattr(build(Settings, {key: text}), key) == expected


@pytest.mark.parametrize(("key", "text"), [("names", "a,"), ("names", "a,,b"), ("names", ""), ("sizes", "96,,96")])
def test_an_item_that_is_missing_is_refused(key, text):
    with pytest.raises(UserError, match=rf"{key}\[\d\] is (None|''); it takes"):
        build(Settings, {key: text})


@dataclass(frozen=True)
class Optional:
    section: Settings | None = None


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ({}, Settings()), ({"sizes": 3}, Settings(sizes=(3, 3, 3)))]
)
def test_a_section_that_may_be_missing_is_none_or_is_built(value, expected):
    assert build(Optional, {"section": value}) == Optional(expected)
    assert build(Optional, {}) == Optional()


def test_mistakes_in_a_section_that_may_be_missing_are_named():
    with pytest.raises(UserError, match="section is 3; it takes keys: names, pair, sizes"):
        build(Optional, {"section": 3})
    with pytest.raises(UserError, match=r"no key 'section\.size'; did you mean 'section\.sizes'"):
        build(Optional, {"section": {"size": 3}})
