"""Tiny targets and drafts in double precision, and slow references, for the speculation tests."""

from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from decoding.drafts import NetworkDraft
from models.dflash import DFlashConfig, DFlashNetwork

VOCABULARY, MASK = 50, 49
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


@cache
def tiny_target(family="qwen3", seed=0, layers=3, vocabulary=VOCABULARY, longest=512):
    """A random causal model; in fp64, so that two ways of computing agree on every argmax."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=longest,
        initializer_range=0.3, tie_word_embeddings=False, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return model_class(config).double().eval().requires_grad_(False)


def network_draft(
    model, trained=16, block_size=None, sample_from_anchor=False, seed=0, mask_token=MASK
):
    """A random DFlash network of two layers for a target."""
    config = DFlashConfig.from_target(
        model.config, block_size=trained, num_hidden_layers=2, mask_token_id=mask_token,
        target_layer_ids=(0, 1), sample_from_anchor=sample_from_anchor,
    )  # fmt: skip
    torch.manual_seed(seed)
    network = DFlashNetwork(config).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return NetworkDraft(network, embedding, head, block_size)


@torch.inference_mode()
def slow_greedy(model, prompt, count, stop_ids=()):
    """The whole sequence anew for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] not in stop_ids):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
