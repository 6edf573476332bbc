"""Multiple choice: which letter a text chooses."""

import pytest

from rewards.choice import ChoiceGrader
from rewards.verdict import NO_ANSWER, Verdict


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        (" (B)\n", "B"),
        ("B.", "B"),
        ("B) because A is too small", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B, not A", "B"),
        ("**Answer: B**", "B"),
        ("**Answer:** (B) ATP", "B"),
        (r"Hence \boxed{B}", "B"),
        (r"Hence \boxed{\text{(B)}}", "B"),
        ("(A) is too small and (C) too large, so it must be (B)", "B"),
        ("The answer is A? No. The answer is B", "B"),
        ("A long story.\nOf several lines.\nB", "B"),
        ("B\n\nQuestion: what is (A)?", "B"),
        ("The answer is C because it is large", "C"),
        ("I think B is wrong; answer is C because", "C"),
        ("**Answer: D** since all hold", "D"),
        ("Answer: B is right", "B"),
        ("The answer is A because it is small", "A"),
        ("The answer is A catalyst", None),
        ("The answer is A becauseway", None),
        ("Bad idea", None),
        ("Answer: BC", None),
        ("", None),
        ("E", None),
    ],
)
def test_letters(text, letter):
    assert ChoiceGrader().read(text) == letter


def test_grades():
    grader = ChoiceGrader()
    assert grader.grade({"answer": "(B)"}, "B") == Verdict(True, "B")
    assert grader.grade({"answer": "C"}, "B") == Verdict(False, "B")
    assert grader.grade({"answer": "C"}, "perhaps") == NO_ANSWER
    with pytest.raises(ValueError, match="item 'x': answer='E'; allowed: one of A, B, C, D"):
        grader.grade({"answer": "E", "id": "x"}, "B")
    assert ChoiceGrader("ABCDE").read("(E)") == "E"


def test_a_letter_that_is_a_word():
    grader = ChoiceGrader("ABCDEFGHIJ")
    assert grader.read("The answer is I think unknown") is None
    assert grader.read("The answer is I because it is last") == "I"
    assert grader.read("The answer is J as well") == "J"


@pytest.mark.parametrize("letters", ["A", "AA", "ab", "A,B"])
def test_letters_out_of_range(letters):
    with pytest.raises(ValueError, match="grader=choice: letters="):
        ChoiceGrader(letters)
