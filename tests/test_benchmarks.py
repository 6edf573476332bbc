"""The benchmarks compare like with like: the reference computes the same loss, and cells run."""

import argparse
import mmap
import time

import pytest
import torch

from benchmarks import acceptance_loss, refining
from benchmarks.reference import ReferenceStep, ReferenceTrainer
from benchmarks.timer import product_rate
from benchmarks.training import step_flops
from decoding.chain import Refinement
from diffusion import Diffusion
from tests.blocks import small_target
from tests.small import small_batch, small_model


def reference_of(model: Diffusion) -> ReferenceStep:
    block = model.block_size if model.block_size < model.length else None
    return ReferenceStep(model.backbone, block)


@pytest.mark.parametrize("options", [["algo=mdlm"], ["algo=bd3lm", "block_size=4"]])
def test_reference_has_the_same_loss_and_gradient(options):
    """Dense mask, all logits, recomputed conditioning: the same number, the same gradient."""
    model, batch = small_model(*options), small_batch()
    inputs = model.corrupt(batch, 0)
    terms = model.loss_terms({**batch, "inputs": inputs})
    weight = torch.zeros(4 * 8)
    weight[inputs["rows"]] = inputs["weights"]
    ours = terms.loss / batch["input_ids"].numel()
    theirs = reference_of(model).loss(
        batch["input_ids"], inputs["xt"], weight.view(4, 8), model.special.mask
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    )
    for a, b in pairs:
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_reference_trainer_updates_everything():
    """One step moves weights, and the average a little less."""
    model = small_model()
    trainer = ReferenceTrainer(model)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.step(sum(p.square().sum() for p in trainer.parameters))
    for old, new, shadow in zip(before, trainer.parameters, trainer.shadow, strict=True):
        assert not torch.equal(old, new)
        assert (shadow - old).abs().max() < (new - old).abs().max()


def test_flop_count_of_the_published_size():
    """12 x 768, batch 8 x 128: about 586 GFLOP for MDLM with 477 masked rows.

    BD3-LM with two full halves would take 1086; without the last clean block of 16, 240/256 of the
    layers remain.
    """
    assert step_flops("mdlm", 477) / 1e9 == pytest.approx(586, rel=0.03)
    assert step_flops("bd3lm", 550) / 1e9 == pytest.approx(1086 * 240 / 256, rel=0.03)
    assert product_rate(torch.float32, 32, 32, 32) > 0


@pytest.mark.parametrize("name", acceptance_loss.OBJECTIVES)
def test_losses_of_drafts_have_one_gradient(name, monkeypatch):
    """Whole logits, whole logits with fewer tensors, fused: the same step."""
    sizes = {"VOCABULARY": 50, "FEATURES": 8, "ANCHORS": 5, "SLOTS": 3, "POSITIONS": 12}
    for key, size in sizes.items():
        monkeypatch.setattr(acceptance_loss, key, size)
    x = acceptance_loss.Inputs("fp32", "cpu")
    grads = [
        torch.autograd.grad(acceptance_loss.loss_of(variant, x, name), x.hidden)[0]
        for variant in (*acceptance_loss.VARIANTS, "fused 2")
    ]
    assert grads[0].any()
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-7)


def test_peak_memory_is_that_of_the_step():
    """200 MiB that are gone at the end were there; fresh pages, not ones that torch keeps."""
    size = 200 * 2**20
    with acceptance_loss.PeakMemory("cpu") as peak, mmap.mmap(-1, size) as pages:
        pages[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
        time.sleep(0.05)
    assert 180 < peak.mib < 300


def test_re_reading_every_block_writes_what_the_cache_does():
    """The reference of the decoding benchmark answers the same question."""
    target = small_target(dtype="float32")
    forbidden = torch.zeros(len(target.embedding_VD), dtype=torch.bool)
    forbidden[target.mask_token_id] = True
    prompts = [list(range(10, 31)), list(range(40, 48))]
    options = argparse.Namespace(new=18, block_size=4, batch=2)
    refinement = Refinement(3)
    cached, passes = refining.answer(target, prompts, options, refinement, None, None)
    found = [
        refining.reread(target, target.model, refinement, prompt, 18, 4, forbidden)
        for prompt in prompts
    ]
    assert [tokens for tokens, _ in found] == cached
    assert passes == sum(count for _, count in found) / 2
