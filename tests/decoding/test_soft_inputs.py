"""What a pass reads of the one before: mixtures by hand, their norms, and their gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding.chain import Refinement
from decoding.commit import PrefixThreshold, Sequential
from decoding.soft_inputs import Hard, SoftMask, TopSoft, UncommittedSoft
from objectives.refinement import Prediction, predict

BLANK = 4
# Rows of different norms; BLANK is the last one.
TABLE = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -2.0], [5.0, 5.0], [-4.0, 3.0]])
FORBIDDEN = torch.arange(5) == BLANK
# Given, committed, open, open.
TOKEN = torch.tensor([[3, 0, 1, 2]])
GIVEN = torch.tensor([[True, False, False, False]])
COMMITTED = torch.tensor([[True, True, False, False]])


def said(*probabilities, top=0) -> Prediction:
    """A pass that gives the four tokens these probabilities, place by place."""
    p_XSV = torch.tensor([[[*row, 1e-30] for row in probabilities]])
    return predict(p_XSV.log(), FORBIDDEN, top)


# The places say tokens 0, 0, 1 and 2.
SAID = (
    (0.7, 0.1, 0.1, 0.1), (0.5, 0.25, 0.125, 0.125), (0.1, 0.6, 0.3, 1e-30), (0.1, 0.1, 0.4, 0.4),
)  # fmt: skip


def inputs(rule, top=0):
    return rule(said(*SAID, top=top), TOKEN, COMMITTED, GIVEN, TABLE, BLANK)[0]


def blank_and(weight, row):
    return weight * TABLE[row] + (1 - weight) * TABLE[BLANK]


def test_hard_tokens_or_blank():
    torch.testing.assert_close(inputs(Hard()), TABLE[torch.tensor([3, 0, BLANK, BLANK])])


def test_uncommitted_places_are_mixed_with_blank_by_their_probability():
    wanted = [TABLE[3], TABLE[0], blank_and(0.6, 1), blank_and(0.4, 2)]
    torch.testing.assert_close(inputs(UncommittedSoft()), torch.stack(wanted))


def test_all_but_given_places_are_mixed():
    wanted = [TABLE[3], blank_and(0.5, 0), blank_and(0.6, 1), blank_and(0.4, 2)]
    torch.testing.assert_close(inputs(UncommittedSoft(everywhere=True)), torch.stack(wanted))


def test_the_most_probable_tokens_are_mixed():
    found = inputs(TopSoft(2, renormalise=False), top=2)
    # The two best of the third place are 1 (.6) and 2 (.3); of the fourth 2 and 3.
    third = 0.6 * TABLE[1] + 0.3 * TABLE[2] + 0.1 * TABLE[BLANK]
    fourth = 0.4 * TABLE[2] + 0.4 * TABLE[3] + 0.2 * TABLE[BLANK]
    torch.testing.assert_close(found, torch.stack([TABLE[3], TABLE[0], third, fourth]))


def test_the_expected_norm_is_restored():
    found = inputs(TopSoft(2), top=2)
    # Norms of the rows: 3, 1, 2, 7.07 and 5.
    third = 0.6 * 1 + 0.3 * 2 + 0.1 * 5
    fourth = 0.4 * 2 + 0.4 * math.sqrt(50) + 0.2 * 5
    assert found.norm(dim=-1)[2:].tolist() == pytest.approx([third, fourth])
    plain = inputs(TopSoft(2, renormalise=False), top=2)
    torch.testing.assert_close(
        found / found.norm(dim=-1, keepdim=True), plain / plain.norm(dim=-1, keepdim=True)
    )
    torch.testing.assert_close(found[:2], TABLE[torch.tensor([3, 0])])


def test_a_mixture_without_length_stays_finite():
    """Two rows that cancel have no direction."""
    table = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    places = predict(torch.tensor([[[0.5, 0.5, 1e-30]]]).log(), torch.arange(3) == 2, 2)
    no = torch.zeros(1, 1, dtype=torch.bool)
    found = TopSoft(2)(places, places.token_P, no, no, table, 2)
    assert torch.isfinite(found).all()


def test_soft_mask_follows_the_entropy():
    """l = scale sigmoid(steep (-H - centre)), p those of the best, renormed."""
    found = inputs(SoftMask(top=2, scale=0.8, steep=3.0, centre=-0.7), top=2)
    for place, tokens in ((2, (1, 2)), (3, (2, 3))):
        p = SAID[place]
        entropy = -sum(x * math.log(x) for x in p)
        share = 0.8 / (1 + math.exp(3.0 * (entropy - 0.7)))
        total = sum(p[t] for t in tokens)
        mean = sum(p[t] / total * TABLE[t] for t in tokens)
        torch.testing.assert_close(found[place], (1 - share) * TABLE[BLANK] + share * mean)
    torch.testing.assert_close(found[:2], TABLE[torch.tensor([3, 0])])


@given(st.integers(0, 1000))
def test_a_certain_pass_says_its_token(seed):
    """At probability one every rule but soft_mask gives the token's own row."""
    draw = torch.Generator().manual_seed(seed)
    token = torch.randint(4, (1, 3), generator=draw)
    logits = torch.full((1, 3, 5), -1e4).scatter(-1, token[..., None], 0.0)
    no = torch.zeros(1, 3, dtype=torch.bool)
    for rule in (UncommittedSoft(), UncommittedSoft(True), TopSoft(3), TopSoft(1)):
        found = rule(predict(logits, FORBIDDEN, rule.top), token, no, no, TABLE, BLANK)
        torch.testing.assert_close(found, TABLE[token])


@pytest.mark.parametrize("rule", [UncommittedSoft(), TopSoft(2), SoftMask()], ids=str)
def test_the_table_learns_and_probabilities_do_not(rule):
    table = TABLE.clone().requires_grad_()
    found = rule(said(*SAID, top=rule.top), TOKEN, COMMITTED, GIVEN, table, BLANK)
    found.square().sum().backward()
    assert table.grad[BLANK].abs().sum() > 0 and table.grad[3].abs().sum() > 0
    assert torch.isfinite(table.grad).all()


class Toy:
    """h = inputs W behind a head: what a pass says depends on all that it reads."""

    blank_id, forbidden_V = BLANK, FORBIDDEN

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.table_VD = TABLE.clone().requires_grad_()
        self.weight = torch.randn(2, 2, generator=draw).requires_grad_()
        self.head = torch.randn(5, 2, generator=draw)
        self.read = []

    def run(self, inputs_YSD, copies=1):
        self.read.append(inputs_YSD)
        return torch.tanh(inputs_YSD.cumsum(1) @ self.weight)

    def logits(self, hidden_PD):
        return hidden_PD @ self.head.T


@pytest.mark.parametrize("rule", [UncommittedSoft(), TopSoft(2), SoftMask(), Hard()], ids=str)
@pytest.mark.parametrize("commit", [PrefixThreshold(0.99), Sequential()], ids=str)
def test_only_the_inputs_of_the_next_pass_have_a_gradient(rule, commit):
    """That of the table alone: nothing flows into the passes that chose what is mixed."""
    toy, refinement = Toy(), Refinement(4, commit, rule)
    token, given = torch.tensor([[3, 0, 0, 0]]), torch.tensor([[True, False, False, False]])
    state = refinement.start(toy, token, given)
    state, _ = refinement.passes(toy, state, given, most=2, whole=True)
    state.inputs_XSD.square().sum().backward()
    assert toy.weight.grad is None
    found = toy.table_VD.grad
    # The same mixture of the same second pass, from a table of its own.
    table = TABLE.clone().requires_grad_()
    with torch.no_grad():
        second = predict(toy.logits(toy.run(toy.read[1])), FORBIDDEN, rule.top)
    again = rule(second, state.token_XS, state.committed_XS, given, table, BLANK)
    torch.testing.assert_close(again, state.inputs_XSD)
    again.square().sum().backward()
    torch.testing.assert_close(found, table.grad)
    assert found[BLANK].abs().sum() > 0


def test_a_mixture_needs_a_token():
    with pytest.raises(ValueError, match=r"refine\.soft_inputs\.top=0: allowed an integer >= 1"):
        TopSoft(0)
    with pytest.raises(ValueError, match=r"refine\.soft_inputs\.top=0"):
        SoftMask(0)
