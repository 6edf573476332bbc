"""Templates: what they show, what identifies them, and those of the project."""

import pytest

from rewards.judge_prompts import JudgePrompt, category, shortened
from runtime.config import instantiate
from tests.rewards.judging import score_prompt
from tests.support import ROOT, compose_config

PROMPTS = sorted(path.stem for path in (ROOT / "configs" / "judge" / "prompts").glob("*.yaml"))
# Of every version its words: other words are another version.
KNOWN = {
    ("continuation", 1): "79bf58566a1568bd",
    ("factuality", 1): "9c508aab29f69112",
    ("quality", 1): "bf22a672e777986f",
    ("safety", 1): "2f27a6f24563563e",
}
MEANINGS = {
    "continuation": {"1": 1.0, "0": 0.0},
    "factuality": {"none": 1.0, "possible": 0.5, "definite": 0.0},
    "quality": {"A": "first", "B": "second"},
    "safety": {"1": 1.0, "0": 0.0},
}
SHOWN = {
    "continuation": {"prefix", "reference", "candidate"},
    "factuality": {"prefix", "reference", "candidate"},
    "quality": {"prefix", "first", "second"},
    "safety": {"prefix", "candidate"},
}
TEXTS = {name: f"<{name}>" for name in ("prefix", "reference", "candidate", "first", "second")}


def of_project(name: str) -> JudgePrompt:
    cfg = compose_config(
        "reward=judge_server", "reward.backend.generator.model=x",
        f"judge/prompts@reward.template={name}",
    )  # fmt: skip
    return instantiate(cfg.reward.template)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_templates_of_the_project(name):
    prompt = of_project(name)
    assert (prompt.name, prompt.answers) == (name, MEANINGS[name])
    said = prompt.render(TEXTS)
    assert {text for text in TEXTS if f"<{text}>" in said} >= SHOWN[name] == {*prompt.texts}
    assert "$" not in said and f'{{"{prompt.field}": ' in prompt.reply
    assert "cut off at a fixed length" in " ".join(said.split())
    assert KNOWN[name, prompt.version] == prompt.identity()["hash"], "other words: a new version"


@pytest.mark.parametrize(
    "changed",
    [
        {"question": "$candidate!"}, {"reply": "JSON"}, {"field": "score"}, {"system": "You"},
        {"cue": "So:"}, {"answers": {"1": 1.0, "0": 0.1}},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_word_is_part_of_the_hash(changed):
    assert score_prompt(**changed).identity()["hash"] != score_prompt().identity()["hash"]
    assert score_prompt().identity() == score_prompt().identity()


def test_texts_are_not_looked_at_again():
    hostile = "$prefix ${reference} {field} $$ %s"
    assert score_prompt().render({**TEXTS, "candidate": hostile}) == hostile


def test_of_a_prefix_the_end_is_shown():
    assert shortened("prefix", "abcdef", 2) == "ef"
    assert {shortened(name, "abcdef", 2) for name in TEXTS if name != "prefix"} == {"ab"}
    assert category("no answer: HTTP 500: no") == "no answer"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"question": "$thought"}, r"question has \$thought; allowed: \$prefix, "),
        ({"question": "5 $ $candidate"}, r"a lone \$; allowed: \$\$"),
        ({"answers": {"1": 1.0}}, "two answers or more"),
        ({"field": ""}, "allowed: a name"),
    ],
    ids=["thought", "dollar", "answers", "field"],
)
def test_bad_templates(changed, reason):
    with pytest.raises(ValueError, match=reason):
        score_prompt(**changed)
