"""The likelihood of the text behind a thought, with and without it."""

import pytest

from evaluation.thought_effect import Document, first_passage, thought_effect


def document(*parts):
    """(kind, tokens) one after the other."""
    ids = [token for _, tokens in parts for token in tokens]
    return Document(ids, [kind for kind, tokens in parts for _ in tokens])


FIRST = document((0, [1, 2]), (2, [90]), (1, [5]), (2, [91]), (0, [3, 4, 5]), (2, [90, 91]))
SECOND = document((0, [1]), (2, [90]), (1, [6, 6]), (2, [91]), (0, [7]))


def test_the_first_thought_and_its_sides():
    found = first_passage(FIRST, 2)
    assert (found.prefix, found.thought, found.suffix) == ([1, 2], [90, 5, 91], [3, 4])
    assert first_passage(FIRST, 9).suffix == [3, 4, 5]
    assert FIRST.text() == [1, 2, 3, 4, 5]
    for none in (
        document((0, [1, 2])),
        document((2, [90]), (1, [5]), (2, [91]), (0, [3])),
        document((0, [1]), (2, [90]), (1, [5]), (2, [91])),
    ):
        assert first_passage(none, 9) is None


def test_gains_are_paired_and_the_corrupted_thought_is_another_documents():
    asked = []

    def likelihoods(pairs):
        """A token costs 1, behind the 5 of the first thought half of it."""
        asked.extend(pairs)
        return [(-len(suffix) * (0.5 if 5 in prefix else 1.0), True) for prefix, suffix in pairs]

    found = thought_effect([FIRST, document((0, [1])), SECOND], likelihoods)
    assert [prefix for prefix, _ in asked] == [
        [1, 2], [1, 2, 90, 5, 91], [1, 2, 90, 6, 6, 91],
        [1], [1, 90, 6, 6, 91], [1, 90, 5, 91],
    ]  # fmt: skip
    assert found["thought_documents"] == 2 and found["suffix_nll_raw"] == 1.0
    assert found["suffix_nll_thought"] == pytest.approx((3 * 0.5 + 1) / 4)
    assert found["suffix_nll_corrupted"] == pytest.approx((3 * 1 + 0.5) / 4)
    assert found["thought_gain_raw"] == pytest.approx(1.5 / 4)
    assert found["thought_gain_corrupted"] == pytest.approx((1.5 - 0.5) / 4)
    assert found["thought_gain_raw_se"] > 0
    assert thought_effect([FIRST], likelihoods) == {"thought_documents": 1}
