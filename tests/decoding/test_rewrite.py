"""Rewritten suffixes: what is asked, what is taken off, what counts as missing."""

import pytest

from decoding.generate import GenerationResult, GenerationSettings
from decoding.rewrite import Rewriter, without_start

QUESTION = "<$prefix|$suffix> begin with '$words'"


class Answering:
    """Answers by the id of the request, in the opposite order."""

    def __init__(self, answers, settings):
        self.answers, self.settings, self.asked = answers, settings, []

    def identity(self):
        return {"target": "scripted"}

    def generate(self, requests):
        self.asked = list(requests)
        for request in reversed(self.asked):
            answer = self.answers[request.id]
            yield GenerationResult(request.id, text=answer or "", error=None if answer else "dead")


def rewriter(answers, **options):
    return Rewriter(
        lambda settings: Answering(answers, settings), GenerationSettings(), QUESTION, **options
    )


def test_rewrites_begin_behind_the_prefix():
    made = rewriter({"a": "two three  four\nfive, and six", "b": "otherwise", "c": None, "d": " "},
                    words=4)  # fmt: skip
    texts = [(name, "one two\nthree four five", "six") for name in "abcd"]
    assert made.rewrite(iter(texts)) == {"a": ", and six", "b": "otherwise"}
    asked = [one.messages[0]["content"] for one in made.generator.asked]
    assert asked == ["<one two\nthree four five|six> begin with 'two three four five'"] * 4
    assert made.identity()["model"] == {"target": "scripted"} and made.identity()["words"] == 4


@pytest.mark.parametrize(
    ("text", "words", "rest"),
    [
        ("the end of it", "the end", " of it"),
        ("  the\n end. More", "the end", ". More"),
        ("the start", "the end", "the start"),
        ("the end", "the end", ""),
        ("anything", "", "anything"),
    ],
)
def test_without_start(text, words, rest):
    assert without_start(text, words) == rest


def test_a_question_shows_both_texts():
    with pytest.raises(ValueError, match=r"rewrite.question='<\$prefix>': has no \$suffix"):
        Rewriter(lambda settings: None, GenerationSettings(), "<$prefix>")
    with pytest.raises(ValueError, match=r"rewrite.words=0: allowed an integer >= 1"):
        rewriter({}, words=0)
