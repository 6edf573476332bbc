"""Shapes of a draft: the published rule and size, what follows from a target, what is refused."""

import math

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from models.dflash import DFlashConfig, DFlashNetwork, target_layer_rule
from models.dflash_config import rotary_frequencies

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def config_of(**changes):
    values = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": 100,
        "block_size": 4, "mask_token_id": 99, "target_layer_ids": (1, 3),
        "num_target_layers": 6, "max_position_embeddings": 256,
    }  # fmt: skip
    return DFlashConfig(**values | changes)


@pytest.mark.parametrize(
    ("layers", "taps", "expected"),
    [
        (36, 5, (1, 9, 17, 25, 33)),  # Qwen3-4B and Qwen3-8B, as published
        (36, 1, (18,)), (30, 5, (1, 8, 14, 20, 27)), (8, 5, (1, 2, 3, 4, 5)), (2, 1, (0,)),
    ],
)  # fmt: skip
def test_layer_rule(layers, taps, expected):
    assert target_layer_rule(layers, taps) == expected


@pytest.mark.parametrize(("layers", "taps"), [(36, 0), (7, 5), (4, 2), (2, 2)])
def test_layer_rule_refuses(layers, taps):
    with pytest.raises(ValueError, match=f"num_taps={taps}: allowed 1 to"):
        target_layer_rule(layers, taps)


def test_size_of_the_published_draft():
    """537.4 million parameters in 58 tensors for Qwen3-4B."""
    target = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=151645,
    )  # fmt: skip
    config = DFlashConfig.from_target(
        target, block_size=16, num_hidden_layers=5, num_taps=5, mask_token_id=151669
    )
    assert (config.num_drafts, config.rope_theta, config.rope_scaling) == (15, 1e6, None)
    with torch.device("meta"):
        state = DFlashNetwork(config).state_dict()
    assert len(state) == 58
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 1) == 537.4


def test_draft_of_a_llama_target():
    """llama3 scaling, no head_dim of its own, several end tokens."""
    rope = {**LLAMA3, "rope_theta": 5e5}
    target = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, eos_token_id=[2, 3],
        max_position_embeddings=256,
    )  # fmt: skip
    config = DFlashConfig.from_target(
        target, block_size=8, num_hidden_layers=1, mask_token_id=63, target_layer_ids=[0, 2],
        sample_from_anchor=True,
    )  # fmt: skip
    assert (config.head_dim, config.num_drafts, config.eos_token_id) == (6, 8, (2, 3))
    assert config.rope_theta == 5e5 and config.rope_scaling == LLAMA3
    plain, _ = rotary_frequencies(config_of(head_dim=6, rope_theta=5e5))
    assert not torch.allclose(rotary_frequencies(config)[0], plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, "block_size=1: allowed at least 2"),
        ({"mask_token_id": 100}, r"mask_token_id=100: allowed 0 to 99"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: allowed a divisor of 4"),
        ({"head_dim": 7}, "head_dim=7: allowed an even number"),
        ({"target_layer_ids": (1, 6)}, r"target_layer_ids=\[1, 6\]: allowed .* 0 to 5"),
        ({"target_layer_ids": (1, 1)}, r"target_layer_ids=\[1, 1\]: allowed are distinct"),
        ({"target_layer_ids": ()}, r"target_layer_ids=\[\]"),
        ({"rope_theta": math.inf}, "rope_theta=inf: allowed a positive number"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic: allowed"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: not usable as llama3"),
    ],
)
def test_what_no_network_can_have(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "0.5: allowed 1",
        ),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta: needed"),
    ],
)
def test_targets_that_cannot_be_drafted_for(rope, message):
    target = Qwen3Config(num_hidden_layers=6)
    target.rope_parameters = rope
    with pytest.raises(ValueError, match=message):
        DFlashConfig.from_target(
            target, block_size=4, num_hidden_layers=1, num_taps=1, mask_token_id=5
        )
