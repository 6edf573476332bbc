"""MDLM, BD3-LM and AR: bounds by enumeration, identities between the three, keyed noise."""

import math

import pytest
import torch
import torch.nn.functional as F
from numpy.polynomial.legendre import leggauss

from models.attention import CachedAttention, FullAttention
from objectives.masking import enumerate_masks
from tests.small import small_batch, small_model

CPU = torch.device("cpu")


def with_inputs(model, batch, step=0):
    """A batch as the training step receives it."""
    return {**batch, "inputs": model.corrupt(batch, step)}


def bound_by_enumeration(model, ids_L) -> float:
    """The continuous-time bound of one sequence, all masks enumerated.

    For p(t) = t a mask of k out of m places has E_t[(1/t) t^k (1-t)^(m-k)] = (k-1)! (m-k)! / m!.
    """
    maskable = torch.ones(len(ids_L), dtype=torch.bool)
    maskable[0] = False
    masks = enumerate_masks(maskable)
    masks = masks[masks.any(-1)]
    m, k = int(maskable.sum()), masks.sum(-1)
    xt = ids_L.repeat(len(masks), 1).masked_fill(masks, model.special.mask)
    pattern = FullAttention(len(ids_L), False, "math", CPU)
    logits = model.backbone.logits(model.backbone(xt, pattern))
    logits[..., model.special.mask] = -torch.inf
    ce = F.cross_entropy(logits.transpose(1, 2), ids_L.repeat(len(masks), 1), reduction="none")
    weight = torch.exp(torch.lgamma(k.float()) + torch.lgamma(m - k + 1.0)) / math.factorial(m)
    return float((ce * masks).sum(-1) @ weight)


@torch.no_grad()
def test_bound_equals_enumeration():
    """Monte-Carlo bound of a 4-token sequence against the sum over its 15 masks."""
    model, batch = small_model(length=5), small_batch(1, 5)
    exact = bound_by_enumeration(model, batch["input_ids"][0])
    # Rows of other numbers have other draws.
    many = {key: value.repeat(300, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    many["index"] = many["position"] = torch.arange(300)
    draws = model.nll(many, num_draws=10).flatten()
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact) < 4 * error
    assert error < 0.02 * exact


@torch.no_grad()
@pytest.mark.parametrize("noise", ["loglinear", "cosine", "square", "square_root", "log"])
def test_training_loss_estimates_the_same_bound(noise):
    """sum w CE over random times has the enumerated bound as its mean, for every schedule."""
    model = small_model(f"noise={noise}", "training.sampling_eps_min=1e-6", length=5)
    batch = small_batch(1, 5)
    exact = bound_by_enumeration(model, batch["input_ids"][0])
    many = {key: value.repeat(4000, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    many["index"] = many["position"] = torch.arange(4000)
    rows = model.loss_terms(with_inputs(model, many)).row_losses
    error = rows.std() / len(rows) ** 0.5
    assert abs(rows.mean() - exact) < 4 * error


@torch.no_grad()
def test_blocks_of_one_token_are_exact():
    """BD3-LM with block size 1 = chain rule, each token from a mask after a clean past."""
    model, batch = small_model("algo=bd3lm", "block_size=1"), small_batch(2)
    ids = batch["input_ids"]
    cache = model.backbone.new_cache(2, 8, torch.float32)
    expected = torch.zeros(2, dtype=torch.float64)
    for place in range(8):
        noisy = torch.full((2, 1), model.special.mask)
        pattern = CachedAttention(cache, place, 0, 1, 1, "math")
        logits = model.backbone.logits(model.backbone(noisy, pattern))[:, 0]
        logits[:, model.special.mask] = -torch.inf
        if place > 0:
            expected -= logits.double().log_softmax(-1).gather(1, ids[:, place, None])[:, 0]
        here = slice(place, place + 1)
        model.backbone(ids[:, here], CachedAttention(cache, place, 1, 0, 1, "math"))
        cache.length += 1
    draws = model.nll(batch, num_draws=2)
    torch.testing.assert_close(draws[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(draws[:, 0], draws[:, 1]), "there is nothing to draw"


def test_exactness_is_known():
    """AR and blocks of one token need a single draw."""
    names = (["algo=ar"], ["algo=bd3lm", "block_size=1"], ["algo=bd3lm", "block_size=2"], [])
    assert [small_model(*name).is_exact for name in names] == [True, True, False, False]


@torch.no_grad()
def test_all_masked_training_at_block_size_one_is_the_exact_likelihood():
    """With the interval (1, 1) and L' = 1 the training loss is the AR negative log-likelihood."""
    model = small_model(
        "algo=bd3lm",
        "block_size=1",
        "training.sampling_eps_min=1.0",
        "training.sampling_eps_max=1.0",
    )
    batch = small_batch(3)
    terms = model.loss_terms(with_inputs(model, batch))
    torch.testing.assert_close(terms.row_losses, model.nll(batch)[:, 0], rtol=1e-5, atol=1e-5)
    assert int(terms.weight) == 3 * 7


@torch.no_grad()
def test_one_block_of_the_whole_length_is_mdlm():
    """Same weights, same noise: the same loss and the same bound."""
    mdlm, bd3lm = small_model(), small_model("algo=bd3lm", "block_size=8")
    bd3lm.load_state_dict(mdlm.state_dict())
    batch = small_batch()
    ours, theirs = (m.loss_terms(with_inputs(m, batch)) for m in (bd3lm, mdlm))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bd3lm.nll(batch, 3), mdlm.nll(batch, 3), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ar_is_the_chain_rule():
    """Row l predicts token l + 1 from a prefix: against one forward per prefix."""
    model, batch = small_model("algo=ar"), small_batch(2)
    ids, expected = batch["input_ids"], torch.zeros(2, dtype=torch.float64)
    for place in range(1, 8):
        pattern = FullAttention(place, True, "math", CPU)
        logits = model.backbone.logits(model.backbone(ids[:, :place], pattern))[:, -1]
        logits[:, model.special.mask] = -torch.inf
        expected -= logits.double().log_softmax(-1).gather(1, ids[:, place, None])[:, 0]
    torch.testing.assert_close(model.nll(batch)[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [["algo=ar"], ["algo=mdlm"], ["algo=bd3lm", "block_size=4"]])
def test_unit_weights_equal_no_weights(options):
    """With every weight 1 the loss and its gradient are those of a plain sum of cross-entropies."""
    model, batch = small_model(*options), small_batch()
    inputs = model.corrupt(batch, 0)
    inputs["weights"] = torch.ones_like(inputs["weights"])
    model.loss_terms({**batch, "inputs": inputs}).loss.backward()
    weighted = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    model.zero_grad()
    logits = model.backbone.logits(model.features(inputs))
    logits = logits.index_fill(1, torch.tensor(model.special.mask), -torch.inf)
    F.cross_entropy(logits, inputs["targets"], reduction="sum").backward()
    plain = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(weighted) == len(plain) > 10
    for ours, theirs in zip(weighted, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [["algo=mdlm"], ["algo=bd3lm", "block_size=4"]])
def test_noise_does_not_depend_on_how_the_batch_is_cut(options):
    """Half a global batch gets the noise that the whole one gives its rows."""
    model, batch = small_model(*options), small_batch(8)
    whole = model.corrupt(batch, 3)
    half = model.corrupt({key: value[4:] for key, value in batch.items()}, 3)
    assert torch.equal(half["xt"], whole["xt"][4:])
    count = len(half["weights"])
    assert torch.equal(half["weights"], whole["weights"][-count:])
    assert torch.equal(half["rows"] + 4 * 8, whole["rows"][-count:])


def test_noise_changes_with_step_and_seed_only():
    """Another step or seed: another mask. The same: the same."""
    batch = small_batch(8)
    model, other = small_model(), small_model("seed=2")
    assert torch.equal(model.corrupt(batch, 1)["xt"], model.corrupt(batch, 1)["xt"])
    assert not torch.equal(model.corrupt(batch, 1)["xt"], model.corrupt(batch, 2)["xt"])
    assert not torch.equal(model.corrupt(batch, 1)["xt"], other.corrupt(batch, 1)["xt"])


def test_weights_average_one():
    """E[w 1(masked)] = 1 for every token: the loss per token is a bound per token."""
    model, batch = small_model("training.sampling_eps_min=1e-3"), small_batch(4000)
    total = sum(float(model.corrupt(batch, step)["weights"].sum()) for step in range(5))
    assert total / (5 * 4000 * 7) == pytest.approx(1.0, abs=0.02)


def test_resampling_keeps_every_block_inside_the_interval():
    """training.resample: the realised rate of every block lies in [0.3, 0.8]."""
    model = small_model(
        "algo=bd3lm", "block_size=4", "training.resample=true",
        "training.sampling_eps_min=0.3", "training.sampling_eps_max=0.8",
    )  # fmt: skip
    inputs = model.corrupt(small_batch(500), 0)
    masked = (inputs["xt"] == model.special.mask).view(500, 2, 4).sum(-1)
    assert set(masked[:, 1].tolist()) == {2, 3}
    assert set(masked[:, 0].tolist()) == {2, 3}, "the first token of block 0 is never masked"


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("ignore_bos", [False, True])
def test_padding_is_masked_like_text_but_predicted_only_where_scored(bound, ignore_bos):
    """Visible padding would give away the length; BOS stays visible unless ignore_bos=false."""
    batch = small_batch(300)
    batch["loss_mask"][:, 6:] = False
    model = small_model(f"algo.ignore_bos={str(ignore_bos).lower()}")
    inputs = model.corrupt_for_bound(batch, 0) if bound else model.corrupt(batch, 0)
    masked = (inputs["xt"] == 3).any(0)
    assert masked.tolist() == [not ignore_bos] + [True] * 7
    predicted = torch.zeros(300 * 8, dtype=torch.bool)
    predicted[inputs["rows"]] = True
    assert predicted.view(300, 8).any(0).tolist() == [not ignore_bos] + [True] * 5 + [False] * 2
    assert (inputs["xt"].flatten()[inputs["rows"]] == 3).all()
    assert int(inputs["scored"]) == 300 * (5 if ignore_bos else 6)


@torch.no_grad()
@pytest.mark.parametrize("options", [["algo=mdlm"], ["algo=bd3lm", "block_size=2"], ["algo=ar"]])
def test_time_conditioning_runs_and_matters(options):
    """Levels per block reach the network: the loss moves with the schedule of levels."""
    model = small_model(*options, "algo.time_conditioning=true")
    batch = with_inputs(model, small_batch())
    before = model.loss_terms(batch).loss
    batch["inputs"]["sigma"] = batch["inputs"]["sigma"] + 1.0
    assert not torch.isclose(model.loss_terms(batch).loss, before)
    assert model.nll(small_batch()).isfinite().all()


def test_tokens_of_padding_are_scored_but_not_counted():
    """data.score_padding: the bound covers all places, its denominator counts real tokens."""
    model, batch = small_model(), small_batch(2)
    batch["token_mask"][:, 5:] = False
    moved = {**batch, "draws": [model.corrupt_for_bound(batch, 0)]}
    assert model.evaluate(moved, 0).tokens.tolist() == [4, 4]
    assert int(moved["draws"][0]["scored"]) == 14


@torch.no_grad()
@pytest.mark.parametrize("options", [["algo=mdlm"], ["algo=bd3lm", "block_size=4"], ["algo=ar"]])
def test_contributions_of_tokens_sum_to_the_bound(options):
    """Every token carries its own term: the rows' sums are the bound, unscored places are zero."""
    model, batch = small_model(*options), small_batch()
    batch["loss_mask"][1, 5:] = False
    moved = {**batch, "draws": [model.corrupt_for_bound(batch, draw) for draw in range(3)]}
    for draw in range(3):
        terms = model.token_nll(moved, draw)
        expected = model.evaluate(moved, draw).nll
        torch.testing.assert_close(terms.sum(-1), expected, rtol=1e-12, atol=0)
        assert (terms[~model.scored_places(batch)] == 0).all()


@torch.no_grad()
def test_contributions_of_the_chain_rule_belong_to_the_predicted_token():
    """AR: the term at place l is -log p(x_l | x_<l), not the one of the row that computed it."""
    model, batch = small_model("algo=ar"), small_batch(2)
    moved = {**batch, "draws": [model.corrupt_for_bound(batch, 0)]}
    ids = batch["input_ids"]
    logits = model.backbone.logits(model.backbone(ids, FullAttention(8, True, "math", CPU)))
    logits[..., model.special.mask] = -torch.inf
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(
        model.token_nll(moved, 0)[:, 1:], -log_p.double(), rtol=1e-5, atol=1e-5
    )


def with_trees(batch, seed=0):
    """The batch with a depth for every token but the first, in trees of height 4."""
    depth = torch.randint(0, 5, batch["input_ids"].shape, generator=generator(seed))
    depth[:, 0] = -1
    return {**batch, "depth": depth, "height": torch.where(depth < 0, -1, 4)}


def generator(seed):
    return torch.Generator().manual_seed(seed)


RESAMPLED = (
    "training.resample=true", "training.sampling_eps_min=0.25", "training.sampling_eps_max=0.75",
)  # fmt: skip


@pytest.mark.parametrize("algo", [("algo=mdlm",), ("algo=bd3lm", "block_size=4")])
@pytest.mark.parametrize("resample", [(), RESAMPLED])
@pytest.mark.parametrize("inactive", ["masking.mix_alpha=0", "masking.depth_mode=none"])
@pytest.mark.parametrize("target", ["loss", "schedule"])
def test_inactive_weights_equal_no_masking_to_the_bit(algo, resample, inactive, target):
    batch = with_trees(small_batch())
    options = ("masking=dependency", f"masking.target={target}", inactive)
    plain = small_model(*algo, *resample).corrupt(batch, 3)
    weighted = small_model(*algo, *resample, *options).corrupt(batch, 3)
    assert all(torch.equal(plain[key], weighted[key]) for key in plain)


@pytest.mark.parametrize("resample", [(), RESAMPLED])
def test_loss_weights_multiply_the_terms_and_nothing_else(resample):
    """Same masks; each row's term is w times that of the unweighted loss."""
    algo = ("algo=bd3lm", "block_size=4", *resample)
    batch = with_trees(small_batch(50))
    plain = small_model(*algo).corrupt(batch, 3)
    model = small_model(*algo, "masking=dependency", "masking.mix_alpha=0.7")
    weighted = model.corrupt(batch, 3)
    assert torch.equal(plain["rows"], weighted["rows"])
    weights = model.token_weights(batch).flatten()[plain["rows"]]
    torch.testing.assert_close(weighted["weights"], plain["weights"] * weights)
    assert not torch.equal(weighted["weights"], plain["weights"])


@pytest.mark.parametrize("resample", [(), RESAMPLED])
def test_schedule_weights_hide_heavy_words_more_often(resample):
    """Among the tokens of equal times, the masked ones are the heavier ones; rates stay inside."""
    options = ("masking=dependency", "masking.mix_alpha=1", "masking.target=schedule")
    model = small_model("algo=bd3lm", "block_size=4", *resample, *options)
    batch = with_trees(small_batch(2000))
    masked = model.corrupt(batch, 3)["xt"] == model.special.mask
    weights = model.token_weights(batch)
    assert weights[masked].mean() > weights[~masked & (batch["depth"] >= 0)].mean() + 0.05
    if resample:
        assert masked.view(2000, 2, 4).sum(-1)[:, 1].min() >= 1
        assert masked.view(2000, 2, 4).sum(-1).max() <= 3


@torch.no_grad()
def test_the_schedule_keeps_the_bound_of_given_weights():
    """Mean loss of target=schedule, many draws, against all masks enumerated by quadrature."""
    options = ("masking=dependency", "masking.mix_alpha=1", "masking.target=schedule")
    model = small_model(*options, "training.sampling_eps_min=1e-6", length=5)
    one = with_trees(small_batch(1, 5))
    odds = model.token_weights(one)[0, 1:].double()
    masks = enumerate_masks(torch.tensor([False, True, True, True, True]))
    xt = one["input_ids"].repeat(len(masks), 1).masked_fill(masks, model.special.mask)
    logits = model.backbone.logits(model.backbone(xt, FullAttention(5, False, "math", CPU)))
    logits[..., model.special.mask] = -torch.inf
    targets = one["input_ids"].repeat(len(masks), 1)
    ce = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()[:, 1:]
    exact = 0.0
    for node, weight in zip(*leggauss(200), strict=True):
        t = (node + 1) / 2
        p, slope = odds * t / (1 + (odds - 1) * t), odds / (1 + (odds - 1) * t) ** 2
        chance = torch.where(masks[:, 1:], p, 1 - p).prod(-1)
        exact += weight / 2 * float(chance @ (ce * masks[:, 1:] * slope / p).sum(-1))
    many = {key: value.repeat(20_000, *[1] * (value.dim() - 1)) for key, value in one.items()}
    many["position"] = torch.arange(20_000)
    rows = model.loss_terms(with_inputs(model, many)).row_losses
    error = rows.std() / len(rows) ** 0.5
    assert abs(rows.mean() - exact) < 4 * error
    assert error < 0.02 * exact


def test_validation_is_the_unweighted_bound():
    batch = with_trees(small_batch())
    heavy = ("masking=dependency", "masking.mix_alpha=1")
    for target in ("loss", "schedule"):
        weighted = small_model(*heavy, f"masking.target={target}")
        assert torch.equal(weighted.nll(batch, 3), small_model().nll(batch, 3))


@pytest.mark.parametrize("mode", ["dependency", "random", "position"])
def test_weights_belong_to_rows_wherever_they_stand(mode):
    """Shuffling the batch, or cutting it, changes no token's weight."""
    options = ("masking=dependency", "masking.mix_alpha=1", f"masking.depth_mode={mode}")
    model = small_model("algo=bd3lm", "block_size=4", *options)
    batch = with_trees(small_batch(6))
    whole = model.token_weights(batch)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = model.token_weights({key: value[order] for key, value in batch.items()})
    assert torch.equal(shuffled, whole[order])
    part = model.token_weights({key: value[2:3] for key, value in batch.items()})
    assert torch.equal(part, whole[2:3])
