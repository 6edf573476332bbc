"""The reference of the benchmark of rollouts writes what is measured beside it."""

import torch

from benchmarks.rollouts import by_generate, furthest, resident_mib
from decoding.rollout import LocalRollouts
from decoding.rollout_record import RolloutSettings
from models.tiny_causal import tiny_causal


def test_generate_in_two_stages_writes_the_same_tokens():
    """With a nucleus of one token nothing is left to chance."""
    target = tiny_causal(extra_tokens=["<think>", "</think>"])
    settings = RolloutSettings(260, 261, target.stop_ids, 4, 5, top_p=1e-6)
    forbidden_V = torch.zeros(len(target.embedding_VD), dtype=torch.bool)
    forbidden_V[[260, 261, *target.stop_ids]] = True
    forbidden = forbidden_V.nonzero()[:, 0].tolist()
    prompt = [*range(5, 20), 260]
    ours = LocalRollouts(target.decoding_model, settings, forbidden_V).sample([("a", prompt)], 3)
    for together in (False, True):
        found = by_generate(target.model, prompt, 3, together, settings, forbidden)
        assert [(one.thought_ids, one.suffix_ids) for one in ours] == found
    assert max(furthest(target.model, one, settings, forbidden_V) for one in ours) < 1e-4
    assert 0 < resident_mib("VmRSS") <= resident_mib("VmHWM")
