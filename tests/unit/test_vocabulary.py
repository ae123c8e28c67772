"""Two models may be compared only where a token id means the same to both."""

import hashlib

import pytest

from stillhouse.vocabulary import vocabulary_digest, vocabulary_size

VOCABULARY = {"a": 0, "b": 1, "ab": 2, "</s>": 5}


def test_the_size_is_the_largest_id_and_one_even_with_gaps() -> None:
    assert vocabulary_size(VOCABULARY) == 6
    assert vocabulary_size({"a": 0}) == 1


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        vocabulary_size({})


def test_the_digest_does_not_depend_on_the_order_of_the_mapping() -> None:
    assert vocabulary_digest(dict(reversed(VOCABULARY.items()))) == vocabulary_digest(VOCABULARY)


@pytest.mark.parametrize(
    "other",
    [
        {"a": 1, "b": 0, "ab": 2, "</s>": 5},  # two ids swapped
        {"a": 0, "b": 1, "ab": 2, "</s>": 6},  # an id moved
        {"a": 0, "b": 1, "ab": 2, "<s>": 5},  # a token renamed
        {"a": 0, "b": 1, "ab": 2},  # a token less
        {**VOCABULARY, "c": 6},  # a token more
        {"a": 0, "b": 1, "aB": 2, "</s>": 5},
    ],
)
def test_the_digest_changes_when_any_id_means_something_else(other: dict[str, int]) -> None:
    assert vocabulary_digest(other) != vocabulary_digest(VOCABULARY)


def test_where_one_token_ends_and_the_next_begins_is_part_of_the_digest() -> None:
    pairs = [
        ({"a": 0, "b": 1}, {"a1 b": 0}),  # equal if only written one after the other
        ({"a": 0, "b": 1}, {"a1 1 b": 0}),
        ({"ab": 0, "c": 1}, {"a": 0, "bc": 1}),
        ({"": 0, "x": 1}, {"x": 0, "": 1}),
        ({"é": 0}, {"e\u0301": 0}),  # looks the same, is another token
    ]
    for one, other in pairs:
        assert vocabulary_digest(one) != vocabulary_digest(other)


def test_the_digest_is_the_documented_one() -> None:
    written_out = b"0 1 a" + b"1 1 b" + b"2 2 ab" + b"5 4 </s>"
    assert vocabulary_digest(VOCABULARY) == hashlib.sha256(written_out).hexdigest()


def test_tokens_that_are_no_unicode_have_a_digest_too() -> None:
    assert vocabulary_digest({"\ud800": 0}) != vocabulary_digest({"\ud801": 0})
