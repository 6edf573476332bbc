"""Generation from end to end, with random networks."""

import math

import pytest
import torch

from decoding.denoise import generate, with_prompts
from decoding.reveal import Ancestral, Confidence, EntropyBound, FirstHitting, TopK
from decoding.settings import SamplingConfig
from decoding.stopping import StopRules, unigram_entropy
from tests.decoding.toy_models import Model, sample

KINDS = ("mdlm", "bd3lm", "ar")
RULES = (FirstHitting(), FirstHitting(3), Ancestral(4), Confidence(0.6), TopK(2), EntropyBound(0.8))
BOS, EOS, PAD, MASK = 0, 1, 2, 10


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_masked_and_the_cache_changes_no_token(kind, rule):
    cached = sample(kind, strategy=rule, nucleus_p=0.9)
    fresh = sample(kind, strategy=rule, nucleus_p=0.9, kv_cache=False)
    assert MASK not in cached.ids and (cached.ids[:, 0] == BOS).all()
    assert torch.equal(cached.ids, fresh.ids) and cached.nfe == fresh.nfe


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_batch(kind, rule):
    together = sample(kind, num_samples=4, strategy=rule)
    alone = [sample(kind, num_samples=1, strategy=rule, first_sample=i).ids for i in range(4)]
    assert torch.equal(together.ids, torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind):
    first, again, other = (sample(kind, seed=seed).ids for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 3, "samples of a batch differ"


@pytest.mark.parametrize(
    ("kind", "rule", "nfe"),
    [
        ("bd3lm", FirstHitting(), 15),  # BOS is given
        ("bd3lm", FirstHitting(2), 2 + 3 * 2),
        ("bd3lm", TopK(4), 4),
        ("bd3lm", Ancestral(1), 4),
        ("bd3lm", Confidence(0.0), 4),
        ("bd3lm", EntropyBound(1e3), 4),
        ("mdlm", FirstHitting(5), 3),
        ("mdlm", TopK(4), 4),
        ("ar", FirstHitting(4), 15),
    ],
)
def test_forward_passes_are_counted(kind, rule, nfe):
    generation = sample(kind, num_samples=2, strategy=rule)
    assert generation.nfe == nfe and generation.new_tokens == 30
    assert generation.tokens_per_forward == pytest.approx(15 / nfe)
    assert generation.seconds > 0 and generation.tokens_per_second > 0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_sequence_counts_the_passes_that_it_would_need_alone(rule):
    together = sample("bd3lm", num_samples=4, strategy=rule)
    alone = [sample("bd3lm", num_samples=1, strategy=rule, first_sample=i) for i in range(4)]
    assert together.sample_nfe == [run.nfe for run in alone]
    assert together.nfe >= max(together.sample_nfe)
    assert together.tokens_per_forward == pytest.approx(60 / sum(together.sample_nfe))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_any_length_are_kept(kind):
    prompt = [BOS, 5, 7, 9, 3, 4]
    generation = sample(kind, prompt_ids=prompt, strategy=FirstHitting(2))
    assert (generation.ids[:, :6] == torch.tensor(prompt)).all()
    assert generation.new_tokens == 3 * 10 and MASK not in generation.ids
    with_own = sample(kind, prompt_ids=[[5], [5, 7, 9, 3, 4], []])
    assert with_own.ids[1, :6].tolist() == prompt and with_own.ids[0, :2].tolist() == [BOS, 5]
    assert MASK not in with_own.ids


def test_a_prompt_changes_what_follows():
    texts = [sample("bd3lm", prompt_ids=[BOS, a, a, a]).ids[:, 4:] for a in (3, 8)]
    assert not torch.equal(*texts)


def test_masks_in_a_prompt_are_filled_in():
    prompt = [BOS, 5, MASK, MASK, 7, 8, 9, 3, MASK, 4, 4, 4, 5, 6, 7, 8]
    generation = sample("mdlm", prompt_ids=prompt)
    known = torch.tensor(prompt) != MASK
    assert (generation.ids[:, known] == torch.tensor(prompt)[known]).all()
    assert generation.nfe == 3 and MASK not in generation.ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (list(range(3, 9)) * 3, "prompt alone has 19 tokens"),
        ([[3], [4]], "2 prompts for 3 samples"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        sample("mdlm", prompt_ids=prompt)


def test_without_bos_everything_is_generated():
    assert with_prompts(None, 2, 3, MASK, None).tolist() == [[MASK] * 3] * 2
    tensor = torch.tensor([[4, 5], [6, 7]])
    assert with_prompts(tensor, 2, 3, MASK, BOS).tolist() == [[BOS, 4, 5], [BOS, 6, 7]]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_decoding_ignores_the_quantiles(kind):
    rule = TopK(1)
    first, second = (sample(kind, strategy=rule, temperature=0.0, seed=s).ids for s in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("kind", "length"), [("mdlm", 37), ("bd3lm", 40), ("ar", 37)])
def test_sequences_longer_than_the_model(kind, length):
    generation = sample(kind, length=length, strategy=FirstHitting(2))
    assert generation.ids.shape == (3, length) and MASK not in generation.ids
    short = sample(kind, length=16, strategy=FirstHitting(2))
    assert torch.equal(generation.ids[:, :16], short.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_cast_to_bf16_still_generate(kind):
    model = Model(kind)
    generation = generate(model, 2, SamplingConfig(precision="bf16"))
    assert MASK not in generation.ids and model.backbone.training
    assert next(model.backbone.parameters()).dtype == torch.float32


def test_time_conditioned_networks_generate():
    cached, fresh = (
        sample("bd3lm", model={"time_conditioning": True}, kv_cache=keep).ids
        for keep in (True, False)
    )
    assert torch.equal(cached, fresh)


def test_the_callback_sees_masks_disappear():
    seen = []
    sample("mdlm", on_step=lambda x_BL: seen.append(int((x_BL == MASK).sum())))
    assert seen == [45 - 3 * (step + 1) for step in range(15)]


def test_variable_length_ends_at_the_first_generated_eos():
    fixed = sample("bd3lm", num_samples=20)
    generation = sample("bd3lm", num_samples=20, var_length=True, prompt_ids=[BOS, EOS, 5])
    stopped = 0
    for ids, length, reason in zip(
        generation.ids, generation.lengths, generation.stop_reasons, strict=True
    ):
        generated = ids[3:length].tolist()
        if reason == "eos":
            stopped += 1
            assert generated[-1] == EOS and EOS not in generated[:-1]
        else:
            assert reason == "length" and length == 16 and EOS not in generated
        assert (ids[length:] == PAD).all() and MASK not in ids[:length]
    assert 0 < stopped < 20
    assert fixed.stop_reasons == ["length"] * 20 and fixed.lengths == [16] * 20
    assert [len(row) for row in generation.rows()] == generation.lengths


@pytest.mark.parametrize(("kind", "stride"), [("ar", 1), ("bd3lm", 4)])
def test_generation_ends_early_when_every_sequence_has(kind, stride):
    runs = [sample(kind, num_samples=1, var_length=True, seed=seed) for seed in range(8)]
    for run in runs:
        computed = -(-run.lengths[0] // stride) * stride
        assert run.nfe == run.new_tokens == computed - 1
    assert any(run.stop_reasons == ["eos"] and run.lengths[0] < 12 for run in runs)


def test_degenerate_repetition_is_cut_off():
    given = torch.zeros(2, 12, dtype=torch.bool)
    given[:, 0] = True
    stop = StopRules(given, EOS, entropy_window=4, min_entropy=1.0)
    x = torch.tensor([[0, 3, 4, 5, 6, 7, 8, 9, 3, 4, 5, 6], [0, 3, 4, 5, 6, 6, 6, 7, 7, 7, 7, 7]])
    stop.update(x, 0, 4)
    assert stop.active_B.all(), "too short to judge"
    stop.update(x, 4, 8)
    assert stop.reasons == ["length", "entropy"] and stop.length_B.tolist() == [12, 4]
    assert stop.active_B.tolist() == [True, False]


def test_unigram_entropy_by_hand():
    ids = torch.tensor([[3, 3, 3, 3], [1, 2, 1, 2], [1, 5, 7, 9], [4, 4, 4, 2]])
    expected = [0.0, math.log(2), math.log(4), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)]
    assert unigram_entropy(ids).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nucleus_p": 0.0}, r"sampling.nucleus_p=0.0: allowed \(0, 1\]"),
        ({"temperature": -1.0}, "sampling.temperature=-1.0"),
        ({"precision": "fp8"}, "sampling.precision=fp8: allowed fp32, bf16"),
        ({"length": 0}, "sampling.length=0"),
        ({"entropy_window": 16}, "sampling.min_entropy=4.0: allowed below"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_settings_from_a_configuration():
    options = {"first_hitting": True, "tokens_per_step": 3, "num_steps": None, "nucleus_p": 0.5}
    config = SamplingConfig.from_options(options)
    assert isinstance(config.strategy, FirstHitting) and config.strategy.tokens_per_step == 3
    assert config.nucleus_p == 0.5
    for steps, algo_steps, expected in [(None, 0, 1000), (None, 50, 50), (7, 50, 7)]:
        chosen = options | {"first_hitting": False, "num_steps": steps}
        rule = SamplingConfig.from_options(chosen, num_steps=algo_steps).strategy
        assert isinstance(rule, Ancestral) and rule.num_steps == expected
    assert isinstance(SamplingConfig.from_options(options, TopK(2)).strategy, TopK)


def test_what_begins_a_sequence_does_not_end_it():
    """With one token for BOS and EOS, a generated BOS at place 0 is no end."""
    stop = StopRules(torch.zeros(1, 4, dtype=torch.bool), EOS, entropy_window=4, min_entropy=0.0)
    stop.update(torch.tensor([[EOS, 5, 5, 5]]), 0, 2)
    assert stop.active_B.all()
    stop.update(torch.tensor([[EOS, 5, EOS, 5]]), 2, 4)
    assert stop.length_B.tolist() == [3]


def test_a_repetitive_prompt_is_not_judged_by_its_batch_mates():
    """The entropy window of a row must lie behind that row's own prompt."""
    given = torch.zeros(2, 8, dtype=torch.bool)
    given[1, :6] = True
    stop = StopRules(given, EOS, entropy_window=4, min_entropy=1.0)
    stop.update(torch.full((2, 8), 5), 4, 8)
    assert stop.active_B.tolist() == [False, True]
