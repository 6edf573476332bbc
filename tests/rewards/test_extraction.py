"""Where answers stand in a text."""

from hypothesis import given
from hypothesis import strategies as st

from rewards.extraction import after_cue, boxed, first_line, last_line, tagged

# Text whose braces are balanced.
balanced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\", codec="ascii"), max_size=5),
    lambda part: st.lists(part.map(lambda text: f"\\frac{{{text}}}"), max_size=3).map("".join),
    max_leaves=8,
)


@given(balanced, st.text(st.characters(exclude_characters="\\", codec="ascii")), balanced)
def test_the_last_box_is_found(content, around, earlier):
    text = f"{around}\\boxed{{{earlier}}}{around}\\boxed{{{content}}}{around}"
    assert boxed(text) == content.strip()


def test_boxes():
    assert boxed(r"\boxed{1} and \boxed{2") == "1"
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert boxed(r"\fbox {a\\}") == "a\\\\"
    assert boxed(r"\boxed 1") is None
    assert boxed("") is None


def test_cues():
    assert after_cue("The answer is 4. No, the answer is: **5**") == "5**"
    assert after_cue("**Answer:** 7\nlast") == "7\nlast"
    assert after_cue("final ANSWER = x") == "x"
    assert after_cue("The answer to this question is 3") == "3"
    assert after_cue("The answers are here") is None
    assert after_cue("I will answer") is None
    assert after_cue("Answer: ") is None


def test_tags_and_lines():
    assert tagged("<answer>1</answer> <Answer>\n2\n3 </Answer>") == "2\n3"
    assert tagged("<answer> </answer>") is None and tagged("<answer>1") is None
    assert first_line("\n  a \nb") == "a" and last_line("a\n b \n\n") == "b"
    assert first_line(" \n") == last_line("") == ""
