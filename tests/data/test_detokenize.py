"""Detokenizers, on sentences of the kind each corpus has."""

import pytest

from data.detokenize import DETOKENIZERS


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("lm1b", "He said , \" yes \" ( twice ) .", 'He said, "yes" (twice) .'),
        ("lm1b", "It 's done now .", "It's done now."),
        ("lm1b", "Why ? See http : / / a.b and $ 5 ; ok !", "Why? See http://a.b and $5; ok!"),
        ("lm1b", "one / two [ three ]", "one/two [three]"),
        ("wikitext", "a well @-@ known 1 @,@ 000 @.@ 5 ( x ) , y", "a well-known 1,000.5 (x), y"),
        ("wikitext", "= = Title = = \n text 's", "== Title ==\ntext's"),
        ("ptb", "it did n't pay $ N or N N to <unk> 's", "it didn't pay $1 or 1 1 to ?'s"),
        ("ptb", "either\\/or", "either/or"),
        ("lambada", "\u201chello\u201d he said ", '\n"hello" he said'),
        ("scientific_papers", "well @-@ known ( fact ) , see [ 1 ]", "well-known (fact), see [1]"),
    ],
)  # fmt: skip
def test_detokenizer(name, text, expected):
    assert DETOKENIZERS[name](text) == expected
