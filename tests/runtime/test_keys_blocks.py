"""Options of refinement, best of n and scorers are checked before anything is built."""

import pytest
from omegaconf import OmegaConf

from objectives.pairing import RATIO, TARGET
from runtime.errors import ConfigError
from runtime.keys_blocks import LEARNT
from runtime.validation import validate
from tests.support import compose_config

TEXTS = '{sampled: TEXT, beam: TEXT} with TEXT "log p0 - log q" or "log p0", beam also null, null'
SAMPLES = "bon/proposal=softmax_sampling"
WRONG = [
    (["refine.commit.threshold=abc"], "refine.commit.threshold=abc: ", "a number in [0, 1]"),
    (["refine.commit.threshold=null"], "refine.commit.threshold=null: ", "a number in [0, 1]"),
    (["refine.commit.threshold=true"], "refine.commit.threshold=true: ", "a number in [0, 1]"),
    (["+refine.commit.bound=-1"], "refine.commit.bound=-1: ", "a number in [0, inf)"),
    (["refine.commit=null"], "refine.commit=null: ", "a choice of its group, refine/commit=NAME"),
    (["refine.soft_inputs=none"], "refine.soft_inputs=none: ", "refine/soft_inputs=NAME"),
    (["+refine.soft_inputs.top=2.5"], "refine.soft_inputs.top=2.5: ", "an integer >= 1"),
    (["+refine.soft_inputs.renormalise=1"], "refine.soft_inputs.renormalise=1: ", "true, false"),
    (["+refine.soft_inputs.everywhere=x"], "refine.soft_inputs.everywhere=x: ", "true, false"),
    (["+refine.soft_inputs.steep=x"], "refine.soft_inputs.steep=x: ", "(-inf, inf)"),
    (["bon.seed=x"], "bon.seed=x: ", "an integer >= 0"),
    (["bon.proposal=beam_exact"], "bon.proposal=beam_exact: ", "bon/proposal=NAME"),
    (["bon.proposal.max_swap=1.5"], "bon.proposal.max_swap=1.5: ", "an integer >= 0"),
    (["bon.proposal.max_swap=x"], "bon.proposal.max_swap=x: ", "an integer >= 0"),
    ([SAMPLES, "bon.proposal.temperature=hot"], "temperature=hot: ", "a number in (0, inf)"),
    ([SAMPLES, "bon.proposal.temperature=0"], "temperature=0: ", "a number in (0, inf)"),
    ([SAMPLES, "bon.proposal.tries=16.5"], "bon.proposal.tries=16.5: ", "an integer >= 1"),
    ([SAMPLES, "bon.proposal.include_greedy='no'"], "include_greedy=no: ", "true, false"),
    (["nce.loss=null"], "nce.loss=null: ", "a choice of its group, nce/loss=NAME"),
    (["nce.learns={sampled:x}"], "nce.learns={'sampled': 'x'}: ", TEXTS),
    (["nce.learns={sampled:log p0}"], "nce.learns={'sampled': 'log p0'}: ", TEXTS),
    (["nce.learns={sampled:x,beam:log p0}"], "nce.learns={'sampled': 'x'", TEXTS),
    (["nce.learns={sampled:log p0,beam:x}"], "'beam': 'x'}: ", TEXTS),
    (["nce.learns={sampled:null,beam:null}"], "nce.learns={'sampled': None", TEXTS),
    (["nce.learns={sampled:log p0,beam:null,more:1}"], "nce.learns={", TEXTS),
    (["nce.learns=yes"], "nce.learns=yes: ", TEXTS),
]
RIGHT = [
    ["refine.commit.threshold=1"],
    ["refine/commit=sequential", "refine/soft_inputs=soft_mask", "refine.soft_inputs.centre=-2"],
    [SAMPLES, "bon.proposal.temperature=1", "bon.proposal.tries=8"],
    ["nce.learns={sampled:log p0 - log q,beam:null}"],
    ["nce.learns={sampled:log p0,beam:log p0}"],
]


def composed(*overrides: str):
    data = ("data=chat", "data.files=rows.jsonl", "data.align=4")
    return compose_config("algo=nce", "model=tiny_causal", "trainer=cpu", *data, *overrides)


@pytest.mark.parametrize(("overrides", "given", "allowed"), WRONG)
def test_wrong(overrides, given, allowed):
    with pytest.raises(ConfigError) as error:
        validate(composed(*overrides))
    message = str(error.value)
    assert given in message and message.endswith(allowed) and "\n" not in message


@pytest.mark.parametrize("overrides", RIGHT)
def test_right(overrides):
    cfg = composed(*overrides)
    accepted = cfg.copy()
    validate(accepted)
    assert accepted == cfg, "nothing is put in place of what was given"


def test_a_class_of_ones_own_has_options_of_its_own():
    """The same names may hold anything."""
    cfg = composed()
    cfg.refine.commit = OmegaConf.create(
        {"_target_": "tests.plugins.rules.Falling", "threshold": [0.9, 0.5], "bound": "none"}
    )
    cfg.refine.soft_inputs = OmegaConf.create({"_target_": "tests.plugins.inputs.X", "top": "all"})
    cfg.bon.proposal = OmegaConf.create(
        {"_target_": "decoding.candidates_of_mine.Tree", "temperature": {"start": 1}, "tries": None}
    )
    accepted = cfg.copy()
    validate(accepted)
    assert accepted == cfg
    # Of our own class they are typed.
    cfg.refine.commit._target_ = "decoding.commit.PrefixThreshold"
    with pytest.raises(ConfigError, match=r"refine\.commit\.threshold="):
        validate(cfg)


def test_the_texts_are_those_of_the_objective():
    assert LEARNT == (RATIO, TARGET)
