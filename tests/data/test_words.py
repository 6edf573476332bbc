"""Words by rule: marks and clitics stand alone, and no character is lost."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.words import sentences_of_words, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I don't know.", "I do n't know ."),
        ("CAN'T won\u2019t cannot ain't", "CA N'T wo n\u2019t cannot ai n't"),
        ("the cat's toys, they're his'n", "the cat 's toys , they 're his ' n"),
        ("we'd I'm you'll she\u2019ve 'sup 'tis", "we 'd I 'm you 'll she \u2019ve ' sup ' tis"),
        ("U.S. e.g. 3.50 1,000 10:30 2nd 5%", "U.S. e.g. 3.50 1,000 10:30 2nd 5 %"),
        ('"So...", (he said) -- well-known!!', '" So ... " , ( he said ) -- well - known !!'),
        ("naïve e\u0301te\u0301 東京 привет a_b", "naïve e\u0301te\u0301 東京 привет a_b"),
        ("", ""),
    ],
)
def test_words_of_a_text(text, expected):
    assert [text[start:end] for start, end in words(text)] == expected.split()


@given(st.text(max_size=40))
def test_every_character_but_white_space_is_in_one_word(text):
    spans = words(text)
    assert all(start < end for start, end in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert "".join(text[start:end] for start, end in spans) == "".join(text.split())


@given(st.text("ab. \n\r\u2028", max_size=30))
def test_lines_are_sentences(text):
    sentences = sentences_of_words(text)
    assert [span for spans in sentences for span in spans] == words(text)
    assert len(sentences) == sum(bool(line.strip()) for line in text.splitlines())
