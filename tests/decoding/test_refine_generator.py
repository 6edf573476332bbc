import pytest
import torch

from decoding.best_of import BestOf
from decoding.block_reader import BlockReader
from decoding.candidates import BeamBayes, BeamExact, SoftmaxSampling
from decoding.chain import Refinement
from decoding.commit import EntropyBound, PrefixThreshold, Sequential, Threshold, TopK
from decoding.generate import GenerationRequest, GenerationSettings
from decoding.refine import RefineGenerator
from decoding.soft_inputs import Hard, SoftMask, TopSoft, UncommittedSoft
from models.backbone import Backbone
from objectives.block_layout import block_layout
from tests.blocks import SIZE, small_target

PROMPTS = [[10, 20, 30], list(range(40, 61)), [5] * 8, list(range(100, 117)), [77]]
RULES = [
    PrefixThreshold(0.5), PrefixThreshold(0.02), Threshold(0.05), TopK(), EntropyBound(2.0),
    Sequential(),
]  # fmt: skip
INPUTS = [Hard(), UncommittedSoft(), UncommittedSoft(everywhere=True), TopSoft(3), SoftMask()]


def head_scores(seed=0):
    """A scorer that knows nothing: any function of hidden states will do."""
    generator = torch.Generator().manual_seed(seed)
    weight_D = torch.randn(32, generator=generator)

    def scores(hidden_XCSD, tokens_XCS, written_XS):
        return (hidden_XCSD.mean(2) @ weight_D.to(hidden_XCSD.dtype)).float()

    return scores


def generate(target, refinement, prompts=PROMPTS, batch_size=8, new=14, **options):
    settings = GenerationSettings(max_new_tokens=new, stop_ids=options.pop("stop_ids", ()))
    generator = RefineGenerator(target, settings, SIZE, refinement, batch_size, **options)
    requests = [GenerationRequest(f"r{n}", prompt_ids=p) for n, p in enumerate(prompts)]
    results = {result.id: result for result in generator.generate(requests)}
    return [results[request.id] for request in requests]


def reread(target, refinement, prompt, new):
    """The same answer by reading everything again for every block, as the definition says."""
    backbone = Backbone(target.model, target.mask_token_id, 260, "math")
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        start = len(tokens) // SIZE * SIZE
        padded = [*tokens, *[0] * (start + SIZE - len(tokens))]
        ids = torch.tensor([padded])
        response = torch.tensor([[0] * len(tokens) + [1] * (len(padded) - len(tokens))])
        layout = block_layout(ids, torch.zeros_like(ids), response, SIZE)
        with torch.no_grad():
            reader = BlockReader.over_rows(backbone, ids, layout, SIZE)
            refined = refinement.refine(
                reader, layout.target_BMS.flatten(0, 1), ~layout.predict_BMS.flatten(0, 1)
            )
        tokens = [*tokens[:start], *refined.token_XS[0].tolist()]
    return tokens[len(prompt) :][:new]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cached_answers_are_those_of_rereading_everything(rule):
    target = small_target()
    refinement = Refinement(3, rule)
    together = generate(target, refinement)
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert result.token_ids == reread(target, refinement, prompt, 14)
        passes = result.work["nfe"] - (len(prompt) >= SIZE)  # one reads the prompt's whole blocks
        assert result.work["blocks"] <= passes <= 3 * result.work["blocks"]


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_soft_inputs_cached_and_alone(inputs):
    target = small_target(seed=2)
    refinement = Refinement(4, PrefixThreshold(0.3), inputs)
    together = generate(target, refinement)
    alone = generate(target, refinement, batch_size=1)
    for prompt, one, many in zip(PROMPTS, alone, together, strict=True):
        assert one == many
        assert one.token_ids == reread(target, refinement, prompt, 14)


def test_rows_enter_as_others_leave():
    target = small_target(seed=3)
    refinement = Refinement(2)
    prompts = [list(range(10, 10 + n)) for n in (1, 4, 9, 2, 30, 13, 8, 3)]
    ends = tuple(range(100, 160))
    alone = generate(target, refinement, prompts, batch_size=1, stop_ids=ends)
    together = generate(target, refinement, prompts, batch_size=3, stop_ids=ends)
    assert alone == together
    assert {result.finish for result in alone} == {"stop", "length"}
    for result in alone:
        assert not set(result.token_ids[:-1]) & set(ends)


def test_the_length_of_the_model_is_a_limit():
    target = small_target(max_position_embeddings=22)
    results = generate(target, Refinement(2), [[3] * 17, [3] * 21, [3] * 30], new=50)
    # The last whole block ends at place 20.
    assert results[0].num_tokens == 3 and results[0].finish == "length"
    assert "no room" in results[1].error and "a prompt of 30 tokens" in results[2].error


@pytest.mark.parametrize("agg", ["select_each", "perround", "lastround"])
@pytest.mark.parametrize(
    "proposal", [BeamBayes(2), BeamExact(), SoftmaxSampling(0.7, 16)], ids=lambda p: p.name
)
@pytest.mark.parametrize("rule", [PrefixThreshold(0.05), Threshold(0.05)], ids=str)
def test_alpha_0_is_greedy_refinement(agg, proposal, rule):
    target = small_target(seed=4)
    refinement = Refinement(3, rule)
    greedy = generate(target, refinement)
    rounds = 1 if agg == "select_each" else 3
    best_of = BestOf(4, proposal, agg, rounds, alpha=0.0)
    chosen = generate(target, refinement, best_of=best_of, scores=head_scores())
    assert [r.token_ids for r in chosen] == [r.token_ids for r in greedy]
    assert all(r.work["flips"] == 0 for r in chosen)
    assert all(r.work["nfe"] > g.work["nfe"] for r, g in zip(chosen, greedy, strict=True))


@pytest.mark.parametrize("agg", ["select_each", "perround", "lastround"])
def test_a_scorer_changes_blocks_the_same_alone_and_together(agg):
    target = small_target(seed=5)
    rounds = 1 if agg == "select_each" else 2
    best_of = BestOf(4, BeamExact(), agg, rounds, alpha=5.0)
    options = {"best_of": best_of, "scores": head_scores(1)}
    together = generate(target, Refinement(3), **options)
    alone = generate(target, Refinement(3), batch_size=1, **options)
    assert together == alone
    assert sum(r.work["flips"] for r in together) > 0
    greedy = generate(target, Refinement(3))
    assert [r.token_ids for r in together] != [r.token_ids for r in greedy]


def test_gumbel_picks_are_keyed_by_the_request():
    target = small_target(seed=6)
    options = {"scores": head_scores(1)}
    best_of = BestOf(4, BeamExact(), alpha=0.1, pick="gumbel")
    first = generate(target, Refinement(2), best_of=best_of, **options)
    assert first == generate(target, Refinement(2), batch_size=2, best_of=best_of, **options)
    other = BestOf(4, BeamExact(), alpha=0.1, pick="gumbel", seed=1)
    assert first != generate(target, Refinement(2), best_of=other, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "bon.count=1"),
        ({"score_agg": "mean"}, "bon.score_agg=mean"),
        ({"alpha": -1.0}, "bon.alpha=-1.0"),
        ({"form": "convex", "alpha": 2.0}, "bon.alpha=2.0"),
        ({"score_agg": "select_each", "rounds": 2}, "bon.rounds=2"),
        ({"pick": "best"}, "bon.pick=best"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        BestOf(**options)


def test_sampling_is_refused():
    settings = GenerationSettings(temperature=0.7)
    with pytest.raises(ValueError, match=r"temperature=0\.7"):
        RefineGenerator(small_target(), settings, SIZE, Refinement())
