"""algo=rlmt step by step, against a slow computation with the libraries' own log-softmax.

Legend: N rollouts, T tokens of one, V vocabulary.
"""

import copy

import pytest
import torch

from data.errors import DataError
from decoding.rollout_record import Rollout
from online import Prefix
from runtime.errors import ConfigError
from tests.online_runs import build

BETA, LOW, HIGH = 0.5, 0.2, 0.2
SHARP = ("algo.kl.coefficient=0.5",)
PRESETS = {
    "paper": ("algo=rlmt_paper", *SHARP),
    "paper_nucleus": ("algo=rlmt_paper", "algo.top_p=0.9", "algo.temperature=0.8", *SHARP),
    "seed": ("algo=rlmt_seed", *SHARP),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("policy")


def move(algorithm, seed, size=0.05):
    """Change all weights, as a step would; the network as it is then."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in algorithm.trained_parameters():
            weight += size * torch.randn(weight.shape, generator=draw)
    return network(algorithm)


def network(algorithm):
    return copy.deepcopy(algorithm.backbone.model)


def experienced(algorithm, batch):
    """Experience of a batch, and the rollouts and rows that it was made from."""
    kept = {}
    judged = type(algorithm).judged

    def judge(self, prefixes, rollouts):
        kept["rollouts"], kept["rows"] = rollouts, judged(self, prefixes, rollouts)
        return kept["rows"]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(algorithm), "judged", judge)
        experience = algorithm.collect(batch)
    return experience, kept["rollouts"], kept["rows"]


def learned(algorithm, experience):
    """Loss and gradients of an experience, as an update sums them."""
    algorithm.zero_grad()
    loss = weight = 0.0
    for part in experience.parts:
        terms = algorithm.part_terms(part)
        terms.loss.backward()
        loss, weight = loss + terms.loss.detach(), weight + terms.weight
        torch.testing.assert_close(terms.row_losses.sum(), terms.loss.detach())
    gradients = [weight_.grad / weight for weight_ in algorithm.trained_parameters()]
    return loss / weight, gradients


def slow_log_probs(algorithm, model, rollout, masked):
    """log p [T] of the tokens that the model chose, of a pass over this one sequence."""
    tokens = torch.tensor(rollout.prompt_ids + rollout.sampled_ids)
    logits_TV = model(input_ids=tokens[None]).logits[0].float()
    logits_TV = logits_TV.masked_fill(algorithm.backbone.forbidden_V, -torch.inf)
    logits_TV = logits_TV / algorithm.config["algo"]["temperature"]
    if masked:
        descending, order = logits_TV.detach().softmax(-1).sort(-1, descending=True)
        kept = descending.cumsum(-1) - descending < algorithm.config["algo"]["top_p"]
        dropped = torch.ones_like(kept).scatter(-1, order, ~kept)
        # The nucleus of other weights may be without a token that was drawn; it counts itself in.
        dropped[:-1] = dropped[:-1].scatter(-1, tokens[1:, None], False)
        logits_TV = logits_TV.masked_fill(dropped, -torch.inf)
    first = len(rollout.prompt_ids)
    own = len(rollout.thought_ids)
    written = rollout.closed_autonomously and algorithm.config["algo"]["score_boundary"]
    places = [n for n in range(first, len(tokens)) if n != first + own or written]
    return torch.stack([logits_TV[n - 1].log_softmax(-1)[tokens[n]] for n in places])


def slow_loss(algorithm, rollouts, rows, old, reference):
    """The loss as the founding papers write it, one rollout after another."""
    algo = algorithm.config["algo"]
    seed, samples = algo["name"] == "rlmt_seed", algo["samples"]
    masked = algo["sampling_mask"] == "match" and algo["top_p"] < 1
    total, counted = 0.0, 0
    for number, (rollout, row) in enumerate(zip(rollouts, rows, strict=True)):
        if row["reward"] is None:
            continue
        counted += 1
        group = rows[number // samples * samples :][:samples]
        rewards = torch.tensor([one["reward"] for one in group if one["reward"] is not None])
        advantage = row["reward"] - rewards.mean()
        if seed:
            spread = rewards.std(correction=0)
            advantage = advantage / (spread + 1e-6) if spread > 1e-6 else torch.zeros(())
        if len(rewards) < 2:
            advantage = torch.zeros(())
        logp = slow_log_probs(algorithm, algorithm.backbone.model, rollout, masked)
        with torch.no_grad():
            before = slow_log_probs(algorithm, old, rollout, masked)
            distance = slow_log_probs(algorithm, reference, rollout, masked)
        if seed:
            ratio, apart = (logp - before).mean().exp(), (distance - logp).mean()
        else:
            ratio, apart = (logp - before).exp(), distance - logp
        held = ratio.clamp(1 - LOW, 1 + HIGH)
        kl = apart.exp() - apart - 1
        loss = -torch.minimum(ratio * advantage, held * advantage) + BETA * kl
        longest = algo["thought_tokens"] + algo["suffix_tokens"]
        total = total + (loss.mean() if seed else loss.sum() / longest)
    return total / counted


# After a step the nucleus is another one: two updates are refused there.
@pytest.mark.parametrize(
    ("name", "updates"),
    [("paper", 1), ("paper", 2), ("paper_nucleus", 1), ("seed", 1), ("seed", 2)],
)
def test_loss_and_gradient_are_those_of_a_slow_computation(folder, name, updates):
    overrides = (*PRESETS[name], f"algo.updates={updates}", "algo.rows_per_pass=5")
    algorithm, batch = build(folder, *overrides, reward={"invalid": 6})
    reference = network(algorithm)
    old = move(algorithm, 1)
    experience, rollouts, rows = experienced(algorithm, batch)
    if updates == 2:
        move(algorithm, 2)
    loss, gradients = learned(algorithm, experience)
    invalid = [row["reward"] is None for row in rows]
    assert any(invalid) and experience.metrics["mixed_group_rate"] > 0
    algorithm.zero_grad()
    wanted = slow_loss(algorithm, rollouts, rows, old, reference)
    wanted.backward()
    assert abs(wanted.item()) > 1e-3
    torch.testing.assert_close(loss, wanted.detach(), atol=2e-5, rtol=1e-4)
    scale = max(float(g.abs().max()) for g in gradients)
    assert scale > 1e-3
    for found, weight in zip(gradients, algorithm.trained_parameters(), strict=True):
        torch.testing.assert_close(found, weight.grad, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("name", ["paper", "seed"])
def test_rows_per_pass_change_nothing(folder, name):
    algorithm, batch = build(folder, *PRESETS[name], reward={"invalid": 6})
    move(algorithm, 1)
    found = {}
    for size, parts in ((1, 16), (3, 6), (100, 1)):
        algorithm.config["algo"]["rows_per_pass"] = size
        experience, rollouts, _ = experienced(algorithm, batch)
        assert len(experience.parts) == parts
        found[size] = (*learned(algorithm, experience), rollouts)
    for size in (1, 3):
        assert found[size][2] == found[100][2]
        torch.testing.assert_close(found[size][0], found[100][0], atol=1e-6, rtol=0)
        for one, other in zip(found[size][1], found[100][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def written(closed, logprobs):
    """A rollout of a thought of two tokens and a suffix of three."""
    return Rollout("0", 0, [40, 41, 42], [50, 51], [43], [60, 61, 62], logprobs,
                   [-1.0] * 3, "stop", "length", closed)  # fmt: skip


@pytest.mark.parametrize("score", [True, False])
def test_which_tokens_have_a_loss(folder, score):
    algorithm, _ = build(folder, f"algo.score_boundary={score}")
    rollouts = [written(False, [-2.0, -2.1]), written(True, [-3.0, -3.1, -3.2])]
    columns = [torch.tensor(0)] * 2, [torch.tensor(1.0)] * 2, [torch.tensor(True)] * 2
    with torch.no_grad():
        part = algorithm.part(rollouts, *columns, columns[2])
    read = part["branches"]
    width = read.branch_NQ.shape[1]
    # A branch begins with the last of the three tokens of the prompt.
    row, place = read.place_M // width, read.place_M % width + 3
    chosen = [place[row == n].tolist() for n in range(2)]
    assert chosen == [[3, 4, 6, 7, 8], [3, 4, 5, 6, 7, 8] if score else [3, 4, 6, 7, 8]]
    boundary = [-3.2] if score else []
    wanted = [-2.0, -2.1, *[-1.0] * 3, -3.0, -3.1, *boundary, *[-1.0] * 3]
    assert part["sampler"].tolist() == pytest.approx(wanted)
    terms = algorithm.part_terms(part)
    assert terms.weight == 2 * algorithm.longest
    logp, sequence = algorithm.log_probs(part)
    assert sequence.tolist() == row.tolist() and len(logp) == len(wanted)


def test_no_judgement_is_not_a_reward_of_zero(folder):
    """What is invalid could as well not have been sampled."""
    algorithm, batch = build(folder, *PRESETS["paper"], reward={"invalid": 3})
    move(algorithm, 1)
    experience, _, rows = experienced(algorithm, batch)
    parts = experience.parts
    counts = torch.cat([part["counts"] for part in parts])
    advantage = torch.cat([part["advantage"] for part in parts])
    invalid = torch.tensor([row["reward"] is None for row in rows])
    assert 0 < int(invalid.sum()) < len(rows)
    assert torch.equal(counts, ~invalid) and bool((advantage[invalid] == 0).all())
    assert sum(algorithm.part_terms(part).weight for part in parts) == int(counts.sum()) * 9
    valid = [row["reward"] for row in rows if row["reward"] is not None]
    assert experience.metrics["reward_mean"] == pytest.approx(sum(valid) / len(valid))
    assert experience.metrics["invalid_judge_rate"] == pytest.approx(float(invalid.float().mean()))
    loss, gradients = learned(algorithm, experience)
    # Other tokens in the invalid rollouts, and other advantages, change nothing.
    first = 0
    for part in parts:
        own = invalid[first : first + len(part["counts"])]
        part["advantage"][own] = 5.0
        read = part["branches"]
        part["reference"][own[read.place_M // read.branch_NQ.shape[1]]] = torch.inf
        first += len(own)
    again, others = learned(algorithm, experience)
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, others))


def test_nothing_valid_teaches_nothing(folder):
    algorithm, batch = build(folder, reward={"invalid": 1})
    experience, _, _ = experienced(algorithm, batch)
    assert experience.metrics["invalid_judge_rate"] == 1.0
    assert "reward_mean" not in experience.metrics
    terms = [algorithm.part_terms(part) for part in experience.parts]
    assert sum(one.weight for one in terms) == 0 and sum(one.loss for one in terms) == 0


@pytest.mark.parametrize("felt", [False, True])
def test_groups_that_teach_nothing_need_not_feel_the_reference(folder, felt):
    algorithm, batch = build(folder, f"algo.kl.mixed_groups_only={not felt}", reward={"invalid": 6})
    rows = experienced(algorithm, batch)[2]
    for row in rows[:4]:
        row["reward"] = 0.7  # three times of which is not 2.1
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(algorithm), "judged", lambda *_: rows)
        parts = algorithm.collect(batch).parts
    assert torch.cat([part["felt"] for part in parts])[:4].tolist() == [felt] * 4
    assert torch.cat([part["counts"] for part in parts])[:4].tolist() == [True] * 4


def test_artifacts_are_counted_by_the_delimiters_of_the_run(folder):
    own = ("model.extra_tokens=['<a>','</a>']", "algo.open='<a>'", "algo.close='</a>'")
    algorithm, batch = build(folder, *own)
    row = experienced(algorithm, batch)[2][0] | {"thought": "one", "suffix": " two"}
    rates = [algorithm._metrics([row | {"suffix": suffix}], 1.0, 1.0)["artifact_rate"]
             for suffix in (" two", " <a>two")]  # fmt: skip
    assert rates == [0.0, 1.0]


@pytest.mark.parametrize(("mask", "wanted"), [("match", 1.0), ("full", 0.9)])
def test_ratio_to_the_sampler(folder, mask, wanted):
    """The mass of a nucleus is a little more than what it was asked for."""
    algorithm, batch = build(folder, "algo.top_p=0.9", f"algo.sampling_mask={mask}")
    experience, _, _ = experienced(algorithm, batch)
    learned(algorithm, experience)
    ratio = algorithm._logged(experience)["sampler_ratio"]
    assert float(ratio) == pytest.approx(wanted, abs=1e-5 if mask == "match" else 0.02)
    gaps = [algorithm.log_probs(part)[0] - part["sampler"] for part in experience.parts]
    assert mask == "full" or torch.cat(gaps).abs().max() < 1e-4


def test_kl_begins_at_nothing_and_grows(folder):
    algorithm, batch = build(folder)
    found = []
    for seed in range(2):
        experience, _, _ = experienced(algorithm, batch)
        learned(algorithm, experience)
        found.append({k: float(v) for k, v in algorithm._logged(experience).items()})
        move(algorithm, seed)
    assert found[0]["kl"] == pytest.approx(0, abs=1e-9) and found[1]["kl"] > 1e-3
    # One update on each batch: the ratio is 1 whatever the weights.
    assert [one["ratio"] for one in found] == pytest.approx([1, 1], abs=1e-6)
    assert [one["clip_fraction"] for one in found] == [0, 0]


def test_old_log_probabilities_are_those_before_the_first_update(folder):
    algorithm, batch = build(folder, "algo.updates=2")
    experience, rollouts, _ = experienced(algorithm, batch)
    old = torch.cat([part["old"] for part in experience.parts])
    sampled = torch.tensor([p for rollout in rollouts for p in rollout.logprobs()])
    torch.testing.assert_close(old, sampled, atol=1e-4, rtol=0)
    learned(algorithm, experience)
    first = algorithm._logged(experience)
    move(algorithm, 1, size=0.3)
    learned(algorithm, experience)
    second = algorithm._logged(experience)
    assert float(first["ratio"]) == pytest.approx(1, abs=1e-6) and first["clip_fraction"] == 0
    assert abs(float(second["ratio"]) - 1) > 0.01 and second["clip_fraction"] > 0.1
    # The sampler is compared with the weights that sampled.
    assert float(second["sampler_ratio"]) == pytest.approx(1, abs=1e-4)


def test_correction_of_another_sampler(folder):
    """An engine that gives every token half its probability: weights of 2, of which 1.5 stays."""
    algorithm, batch = build(folder, "algo.correction={level:token,cap:1.5}",
                             "algo.kl.coefficient=0", "algo.reference=null")  # fmt: skip
    experience, _, _ = experienced(algorithm, batch)
    plain, gradients = learned(algorithm, experience)
    algorithm._logged(experience)
    for part in experience.parts:
        part["sampler"] -= torch.log(torch.tensor(2.0))
    loss, corrected = learned(algorithm, experience)
    torch.testing.assert_close(loss, 1.5 * plain, atol=1e-5, rtol=1e-3)
    for found, one in zip(corrected, gradients, strict=True):
        torch.testing.assert_close(found, 1.5 * one, atol=1e-5, rtol=1e-3)
    assert float(algorithm._logged(experience)["correction_cut"]) == 1.0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("algo.correction={level:token}", r"algo\.correction=\{'level': 'token'\}: level and cap"),
        ("algo.correction={cap:2.0}", r"algo\.correction=\{'cap': 2\.0\}: level and cap, both"),
        ("algo.correction={level:token,cap:2.0,foo:1}", r"'foo': 1\}: level and cap, both and"),
        ("++algo.reference.foo=1", r"algo\.reference\.foo=1: .*allowed: kind, every, decay"),
        ("algo.close='<think>'", r"algo\.close=<think>: the token of algo\.open=<think>; allowed"),
    ],
    ids=["no_cap", "no_level", "more", "reference", "delimiters"],
)
def test_what_no_step_could_use_is_said_at_once(folder, option, message):
    """Without the checks of a command line, too."""
    with pytest.raises(ConfigError, match=message):
        build(folder, option)


def test_rollouts_depend_on_seed_step_and_prefix_alone(folder):
    algorithm, batch = build(folder)
    prefixes = algorithm.prefixes(batch)
    whole = algorithm.roll_out(prefixes)
    halves = [*algorithm.roll_out(prefixes[2:]), *algorithm.roll_out(prefixes[:2])]
    samples = [(one.prefix_id, one.k, one.sampled_ids) for one in whole]
    assert sorted(samples) == sorted((one.prefix_id, one.k, one.sampled_ids) for one in halves)
    algorithm.trainer.global_step = 1
    assert samples != [(o.prefix_id, o.k, o.sampled_ids) for o in algorithm.roll_out(prefixes)]


def test_prefixes_of_a_batch(folder):
    algorithm, batch = build(folder)
    found = algorithm.prefixes(batch)
    assert found[0] == Prefix(str(int(batch["index"][0])), found[0].prefix_ids,
                              found[0].reference_ids)  # fmt: skip
    text = algorithm.text([*found[0].prefix_ids, *found[0].reference_ids])
    assert text.startswith("Question: ") and algorithm.text(found[0].prefix_ids).endswith("Answer:")
    several = {**batch, "segment": batch["segment"].clamp(min=0).cumsum(-1) + 1}
    nothing = {**batch, "response": torch.ones_like(batch["response"])}
    for wrong in (several, nothing):
        with pytest.raises(DataError, match=r"row .* is not a prefix and what follows it"):
            algorithm.prefixes(wrong)
