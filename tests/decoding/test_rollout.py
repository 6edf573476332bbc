"""Two-stage rollouts: their probabilities are the model's, whoever decodes beside them."""

from dataclasses import replace

import pytest
import torch

from decoding.branches import branches
from decoding.categorical import nucleus
from decoding.rollout import LocalRollouts
from decoding.rollout_record import Rollout, RolloutSettings
from models.backbone import Backbone
from models.tiny_causal import tiny_causal
from objectives.token_log_probs import token_log_probs

OPEN, CLOSE = 260, 261
PROMPTS = [("a", [5, 6, 7, 8, 9, OPEN]), ("b", [10, 11, OPEN]), ("c", [12, 13, 14, 15, OPEN])]
TOP_P = 0.9


@pytest.fixture(scope="module")
def target():
    return tiny_causal(extra_tokens=["<think>", "</think>"])


@pytest.fixture(scope="module")
def settings(target):
    return RolloutSettings(OPEN, CLOSE, target.stop_ids, 6, 7, top_p=TOP_P, rows=8)


def never(target, *tokens):
    forbidden = torch.zeros(len(target.embedding_VD), dtype=torch.bool)
    forbidden[list(tokens)] = True
    return forbidden


def sampler(target, settings, *forbidden):
    return LocalRollouts(target.decoding_model, settings, never(target, *forbidden))


def recomputed(target, rollout, keep):
    """Log-probabilities of what the model chose, of one pass without a cache."""
    tokens = torch.tensor(rollout.prompt_ids + rollout.sampled_ids)
    first = len(rollout.prompt_ids)
    chosen = torch.tensor([first + n for n, one in enumerate(rollout.chosen()) if one])
    with torch.no_grad():
        hidden = target.model.base_model(input_ids=tokens[None]).last_hidden_state[0]
        head = target.model.get_output_embeddings()
        return token_log_probs(hidden[chosen - 1], head, tokens[chosen], keep=keep)


def likely_to_close(target):
    """The model, with a closing delimiter that is as probable as all else together."""
    copied = tiny_causal(extra_tokens=["<think>", "</think>"], init_std=0.02)
    head = copied.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[CLOSE] = head.weight.mean(0)
    head.register_forward_hook(lambda module, inputs, out: out.index_add(
        -1, torch.tensor([CLOSE]), torch.full((*out.shape[:-1], 1), 4.5)))  # fmt: skip
    return copied


def test_log_probabilities_are_those_of_a_pass_without_cache(target, settings):
    found = sampler(target, settings).sample(PROMPTS, 4)
    assert [(one.prefix_id, one.k) for one in found] == [(n, k) for n in "abc" for k in range(4)]
    for one in found:
        again = recomputed(target, one, lambda p: nucleus(p, TOP_P) > 0)
        torch.testing.assert_close(again, torch.tensor(one.logprobs()), atol=1e-4, rtol=0)
        assert len(one.thought_ids) <= 6 and len(one.suffix_ids) <= 7
        assert one.boundary_ids == [CLOSE]


def test_a_full_softmax_is_another_distribution_than_a_nucleus(target, settings):
    found = sampler(target, settings).sample(PROMPTS, 8)
    ratios = [recomputed(target, one, None) - torch.tensor(one.logprobs()) for one in found]
    mean = torch.cat(ratios).exp().mean()
    assert 0.85 < mean < 0.99, "the mass that the nucleus keeps"


def test_samples_do_not_depend_on_who_decodes_beside_them(target, settings):
    together = sampler(target, settings).sample(PROMPTS, 4)
    for rows in (1, 5, 64):
        alone = sampler(target, replace(settings, rows=rows)).sample(PROMPTS[1:2], 4)
        assert [one.sampled_ids for one in alone] == [one.sampled_ids for one in together[4:8]]
    others = sampler(target, replace(settings, seed=1)).sample(PROMPTS[1:2], 4)
    assert [one.sampled_ids for one in others] != [one.sampled_ids for one in together[4:8]]


def test_who_closes_a_thought():
    target = likely_to_close(None)
    settings = RolloutSettings(OPEN, CLOSE, target.stop_ids, 3, 2)
    found = LocalRollouts(target.model, settings).sample(PROMPTS, 16)
    closed = [one for one in found if one.closed_autonomously]
    cut = [one for one in found if not one.closed_autonomously]
    assert closed and cut
    for one in closed:
        assert one.thought_finish == "stop" and CLOSE not in one.thought_ids
        assert len(one.thought_logprobs) == len(one.thought_ids) + 1
        assert one.chosen() == [True] * (len(one.thought_ids) + 1 + len(one.suffix_ids))
    for one in cut:
        assert one.thought_finish == "length" and len(one.thought_ids) == 3
        assert one.chosen()[3] is False, "nobody chose the boundary that was inserted"
        assert len(one.logprobs()) == sum(one.chosen())


def test_end_tokens_end_and_stay(target, settings):
    ends = replace(settings, stop_ids=tuple(range(4, 200)), top_p=1.0)
    for one in sampler(target, ends).sample(PROMPTS, 4):
        assert one.suffix_finish == ("stop" if one.suffix_ids[-1] in ends.stop_ids else "length")
        assert not any(token in ends.stop_ids for token in one.suffix_ids[:-1])
        assert not any(token in ends.stop_ids for token in one.thought_ids[:-1])


def test_no_thought_given_thoughts_and_plain_continuations(target, settings):
    empty = sampler(target, replace(settings, thought_tokens=0)).sample(PROMPTS, 1)
    given = sampler(target, settings).continue_thoughts(PROMPTS, [[], [], []])
    # The draws of a given thought begin with the suffix, as those of an empty one do.
    assert [one.suffix_ids for one in empty] == [one.suffix_ids for one in given]
    assert all(one.thought_ids == [] for one in empty)
    thought = sampler(target, settings).continue_thoughts(PROMPTS[:1], [[20, 21]])[0]
    assert thought.sampled_ids[:3] == [20, 21, CLOSE] and thought.chosen()[:3] == [False] * 3
    plain = sampler(target, settings).continuations([("a", [5, 6])], 2)[1]
    assert plain.boundary_ids == plain.thought_ids == [] and plain.k == 1
    again = recomputed(target, plain, lambda p: nucleus(p, TOP_P) > 0)
    torch.testing.assert_close(again, torch.tensor(plain.logprobs()), atol=1e-4, rtol=0)


def test_forbidden_tokens_are_never_drawn(target, settings):
    some = sampler(target, replace(settings, top_p=1.0), *range(100)).sample(PROMPTS, 8)
    assert min(min(one.sampled_ids) for one in some) >= 100


def test_rows_come_back(target, settings):
    found = sampler(target, settings).sample(PROMPTS[:1], 2)
    assert [Rollout.from_row(one.to_row() | {"arm": "x"}) for one in found] == found


def test_branches_share_their_prompts(target, settings):
    """A pass that reads every prompt once has the hidden states of one that reads all anew."""
    found = sampler(target, settings).sample([*PROMPTS, ("d", [OPEN])], 3)
    read = branches(found[::-1])
    assert (
        len(read.prefix_PL) == 4 and read.owner_N.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )
    backbone = Backbone(target.model, target.mask_token_id, len(target.tokenizer))
    wanted, tokens = [], []
    with torch.no_grad():
        hidden_NQD = backbone.read_branches(*read[:4])
        for one in found[::-1]:
            ids = torch.tensor(one.prompt_ids + one.sampled_ids)
            first = len(one.prompt_ids)
            chosen = torch.tensor([first + n for n, flag in enumerate(one.chosen()) if flag])
            alone = target.model.base_model(input_ids=ids[None]).last_hidden_state[0]
            wanted.append(alone[chosen - 1])
            tokens.append(ids[chosen])
    hidden_ND = hidden_NQD.flatten(0, 1)[read.place_M]
    torch.testing.assert_close(hidden_ND, torch.cat(wanted), atol=1e-4, rtol=0)
    assert read.branch_NQ.flatten()[read.place_M + 1].equal(torch.cat(tokens))


def test_gradients_flow_through_a_shared_prompt():
    target = tiny_causal(extra_tokens=["<think>", "</think>"], num_hidden_layers=2)
    settings = RolloutSettings(OPEN, CLOSE, target.stop_ids, 3, 4)
    found = LocalRollouts(target.model, settings).sample(PROMPTS[:2], 3)
    backbone = Backbone(target.model, target.mask_token_id, len(target.tokenizer))
    backbone.requires_grad_(True)

    def gradients(parts):
        backbone.zero_grad()
        for part in parts:
            read = branches(part)
            hidden = backbone.read_branches(*read[:4]).flatten(0, 1)[read.place_M]
            hidden.square().sum().backward()
        return [weight.grad.clone() for weight in backbone.parameters() if weight.grad is not None]

    together = gradients([found])
    for one, wanted in zip(together, gradients([[rollout] for rollout in found]), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-3, atol=1e-3)


def test_a_boundary_that_the_model_wrote_need_not_count():
    written = Rollout("a", 0, [5, OPEN], [7], [CLOSE], [8, 9], [-1.0, -2.0], [-3.0, -4.0],
                      "stop", "length", True)  # fmt: skip
    assert written.chosen() == [True] * 4 and written.logprobs() == [-1.0, -2.0, -3.0, -4.0]
    assert written.chosen(False) == [True, False, True, True]
    assert written.logprobs(False) == [-1.0, -3.0, -4.0]
    assert branches([written]).place_M.tolist() == [0, 1, 2, 3]
    assert branches([written], False).place_M.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "0 tokens"),
        ([5, 6], "opening delimiter"),
        # 1024 positions, 6 of a thought, its delimiter, and 7 of a suffix.
        (
            [5] * 1020 + [OPEN],
            r"1021 tokens, and the model has room for 1010 beside algo\.thought_tokens=6 and"
            r" algo\.suffix_tokens=7; allowed: 1 \.\. 1010, or fewer",
        ),
    ],
    ids=["empty", "unopened", "long"],
)
def test_prompts_that_cannot_be_are_named(target, settings, prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        sampler(target, settings).sample([("one", prompt)], 1)
    assert "'one'" in str(error.value)


def test_limits_that_leave_no_room_for_a_prefix(target, settings):
    """The model has 1024 positions: an opening delimiter, a closing one, and 1022 to be shared."""
    room = replace(settings, thought_tokens=1015, suffix_tokens=7)
    LocalRollouts(target.model, room)._check("a", [OPEN], 1016, "a thought")
    over = LocalRollouts(target.model, replace(room, thought_tokens=1016, section="mode"))
    with pytest.raises(
        ValueError, match=r"^mode\.thought_tokens=1016 and mode\.suffix_tokens=7: "
    ) as e:
        over.sample(PROMPTS, 1)
    assert str(e.value).endswith("in the 1024 tokens of the model; allowed: together at most 1022")
    over = LocalRollouts(target.model, replace(settings, suffix_tokens=1024))
    with pytest.raises(ValueError, match=r"^algo\.suffix_tokens=1024: .*; allowed: at most 1023$"):
        over.continuations(PROMPTS, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thought_tokens", -1), ("suffix_tokens", 0), ("temperature", 0.0), ("top_p", 0.0),
        ("rows", 0),
    ],
)  # fmt: skip
def test_settings_outside_their_range(settings, name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        replace(settings, **{name: value})


def test_delimiters_are_two_tokens_or_none(settings):
    with pytest.raises(ValueError, match=f"close_id={OPEN}: allowed another token than open_id"):
        replace(settings, close_id=OPEN)
    replace(settings, open_id=-1, close_id=-1)
