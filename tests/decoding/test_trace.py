"""When every place was revealed, against rules that say so."""

import pytest
import torch

from decoding.denoise import with_prompts
from decoding.reveal import FirstHitting, TopK
from decoding.trace import RevealTrace
from tests.decoding.toy_models import Special, sample
from tests.plugins.toy_rule import LeftToRight

LENGTH, COUNT = 16, 3


def traced(kind, prompt=None, **options):
    """A generation of three rows of 16 (the first token is given), and its trace."""
    mask, bos = Special().mask, Special().bos
    trace = RevealTrace(with_prompts(prompt, COUNT, LENGTH, mask, bos), mask)
    return sample(kind, COUNT, on_step=trace, prompt_ids=prompt, **options), trace


@pytest.mark.parametrize("kind", ["mdlm", "bd3lm", "ar"])
@pytest.mark.parametrize("prompt", [None, [3, 4]])
def test_left_to_right_is_seen_as_such(kind, prompt):
    rule = FirstHitting() if kind == "ar" else LeftToRight()
    generation, trace = traced(kind, prompt, strategy=rule)
    given = 1 + len(prompt or [])
    expected = torch.cat([torch.full((given,), -1), torch.arange(LENGTH - given)])
    assert torch.equal(trace.step_BL, expected.expand(COUNT, -1))
    assert trace.passes == generation.nfe


@pytest.mark.parametrize("rule", [FirstHitting(3), TopK(2)])
def test_every_pass_reveals_what_it_may(rule):
    """BD3-LM with blocks of 4: passes of at most k tokens, block after block."""
    _, trace = traced("bd3lm", strategy=rule)
    assert (trace.step_BL[:, 0] == -1).all() and (trace.step_BL[:, 1:] >= 0).all()
    for row in trace.step_BL[:, 1:]:
        assert max(torch.bincount(row).tolist()) <= rule.tokens_per_step
    blocks = trace.step_BL.view(COUNT, 4, 4)
    assert (blocks[:, 1:].amin(-1) > blocks[:, :-1].amax(-1)).all()
