"""Checkpoints as bd3lms writes them, put together by hand from the documented layout.

Tensors, names and order are spelled out here once more: the code is not compared with itself.
"""

import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", ",", "un",
              "##like", "##ly")  # fmt: skip
HIDDEN, BLOCKS, COND, HEADS, LENGTH = 16, 2, 8, 2, 8

CONFIG = """
mode: train
diffusion: absorbing_state
seed: 7
block_size: 4
algo:
  name: bd3lm
  backbone: dit
  parameterization: subs
  time_conditioning: false
  T: 0
  causal_attention: false
  dropout: 0.0
  ignore_bos: true
  cross_attn: true
  var_min: true
  clip_search_delta: 0.05
  clip_search_widths: [0.5, 0.6]
  fix_clipping: false
  sampler: semi_ar
  mdlm_loss_scale: false
model:
  name: toy
  type: ddit
  hidden_size: 16
  cond_dim: 8
  length: 8
  n_blocks: 2
  n_heads: 2
  scale_by_sigma: true
  dropout: 0.1
  tie_word_embeddings: false
  attn_backend: flash_attn
data:
  train: lm1b
  valid: lm1b
  tokenizer_name_or_path: bert-base-uncased
  cache_dir: ${cwd:}/data
  wrap: true
  streaming: false
  insert_train_eos: true
masking:
  depth_mode: dependency
  mix_alpha: 0.0625
loader:
  global_batch_size: 512
  eval_global_batch_size: ${.global_batch_size}
  batch_size: ${div_up:${.global_batch_size}, ${eval:${trainer.devices} * ${trainer.num_nodes}}}
  num_workers: ${eval:"len(__import__('os').sched_getaffinity(0))"}
  pin_memory: true
sampling:
  noise_removal: false
  num_sample_batches: 1
  var_length: false
  logdir: ./samples_${algo.name}_len${model.length}
  nucleus_p: 0.9
  first_hitting: true
  kv_cache: false
training:
  ema: 0.9999
  antithetic_sampling: true
  sampling_eps: 1e-3
  coeff_clip: -1.0
  resample: true
  sampling_eps_min: 1e-3
  sampling_eps_max: 1.0
  from_pretrained: /elsewhere/last.ckpt
  eval_nll: true
eval:
  checkpoint_path: ${cwd:}/checkpoints/last.ckpt
optim:
  weight_decay: 0
  lr: 3e-4
  beta1: 0.9
  beta2: 0.999
  eps: 1e-8
trainer:
  _target_: lightning.Trainer
  accelerator: cuda
  num_nodes: 1
  devices: ${device_count:}
  gradient_clip_val: 1.0
  precision: bf16
  max_steps: 1000000
noise:
  type: loglinear
  sigma_min: 1e-4
lr_scheduler:
  _target_: transformers.get_constant_schedule_with_warmup
  num_warmup_steps: 2500
checkpointing:
  save_dir: ${cwd:}
  resume_ckpt_path: ${.save_dir}/checkpoints/last.ckpt
wandb: null
"""


def config(*overrides: str) -> Any:
    """The configuration object of a checkpoint."""
    return OmegaConf.merge(OmegaConf.create(CONFIG), OmegaConf.from_dotlist(list(overrides)))


def shapes(vocab_size: int, conditioned: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters in the order in which the network registers them."""
    found: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocab_size, HIDDEN)}
    if conditioned:
        found |= {
            "sigma_map.mlp.0.weight": (COND, 256), "sigma_map.mlp.0.bias": (COND,),
            "sigma_map.mlp.2.weight": (COND, COND), "sigma_map.mlp.2.bias": (COND,),
        }  # fmt: skip
    for block in range(BLOCKS):
        name = f"blocks.{block}."
        found |= {
            f"{name}norm1.weight": (HIDDEN,),
            f"{name}attn_qkv.weight": (3 * HIDDEN, HIDDEN),
            f"{name}attn_out.weight": (HIDDEN, HIDDEN),
            f"{name}norm2.weight": (HIDDEN,),
            f"{name}mlp.0.weight": (4 * HIDDEN, HIDDEN), f"{name}mlp.0.bias": (4 * HIDDEN,),
            f"{name}mlp.2.weight": (HIDDEN, 4 * HIDDEN), f"{name}mlp.2.bias": (HIDDEN,),
        }  # fmt: skip
        if conditioned:
            found[f"{name}adaLN_modulation.weight"] = (6 * HIDDEN, COND)
            found[f"{name}adaLN_modulation.bias"] = (6 * HIDDEN,)
    found["output_layer.norm_final.weight"] = (HIDDEN,)
    found["output_layer.linear.weight"] = (vocab_size, HIDDEN)
    found["output_layer.linear.bias"] = (vocab_size,)
    if conditioned:
        found["output_layer.adaLN_modulation.weight"] = (2 * HIDDEN, COND)
        found["output_layer.adaLN_modulation.bias"] = (2 * HIDDEN,)
    return {f"backbone.{name}": shape for name, shape in found.items()}


def weights(vocab_size: int, seed: int, conditioned: bool = True) -> dict[str, torch.Tensor]:
    """Random parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in shapes(vocab_size, conditioned).items()
    }


def inv_freq() -> torch.Tensor:
    """The rotary buffer, as its program computes it."""
    head = HIDDEN // HEADS
    return 1.0 / (10_000 ** (torch.arange(0, head, 2).float() / head))


def checkpoint(
    tokenizer: Any, raw: dict, average: dict, cfg: Any, prefix: str = "backbone."
) -> dict[str, Any]:
    """The content of a checkpoint; `prefix` is what `torch.compile` may have put into the names."""
    state = OrderedDict()
    low, high = torch.tensor(0.45), torch.tensor(0.95)
    state["sampling_eps_min"], state["sampling_eps_max"] = low, high
    for name, value in raw.items():
        state[name.replace("backbone.", prefix)] = value
        if name.endswith("embedding"):
            state[f"{prefix}rotary_emb.inv_freq"] = inv_freq()
    counts = {"ready": 3, "completed": 3, "started": 3, "processed": 3}
    return {
        "epoch": 1,
        "global_step": 1234,
        "pytorch-lightning_version": "2.5.0.post0",
        "state_dict": state,
        "loops": {"fit_loop": {"epoch_progress": {"current": dict(counts)}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val/nll'}": {"dirpath": "/elsewhere"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        "lr_schedulers": [{"lr_lambdas": [{}], "last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": cfg, "tokenizer": tokenizer},
        "ema": {
            "decay": 0.9999, "num_updates": 1234, "shadow_params": list(average.values()),
        },
        "sampling_eps_min": low,
        "sampling_eps_max": high,
        "sampler": {"random_state": None},
    }  # fmt: skip


@contextmanager
def fake_class(module: str, name: str):
    """Inside, there is such a class in such a module: an older version of a library."""
    found = type(name, (), {"__module__": module})
    stub = types.ModuleType(module)
    setattr(stub, name, found)
    with pytest.MonkeyPatch.context() as patch:
        already = sys.modules.get(module)
        if already is not None and already.__doc__ == "fake":
            patch.setattr(already, name, found, raising=False)
        else:
            stub.__doc__ = "fake"
            patch.setitem(sys.modules, module, stub)
        yield found


def filled(kind: type, **state: Any) -> Any:
    """An object of a class with this state."""
    found = kind()
    found.__dict__.update(state)
    return found


def save_with_slow_bert(path: Path, content: dict, vocabulary=VOCABULARY, lower=True) -> None:
    """Save with the slow BERT tokenizer of transformers 4 in the place of the tokenizer."""
    ids = OrderedDict((token, index) for index, token in enumerate(vocabulary))
    bert, utils = "transformers.models.bert.tokenization_bert", "transformers.tokenization_utils"
    names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    with (
        fake_class(bert, "BertTokenizer") as kind,
        fake_class(bert, "BasicTokenizer") as basic,
        fake_class(bert, "WordpieceTokenizer") as pieces,
        fake_class(utils, "Trie") as trie,
    ):
        tokenizer = filled(
            kind,
            vocab=ids,
            ids_to_tokens=OrderedDict((index, token) for token, index in ids.items()),
            do_basic_tokenize=True,
            basic_tokenizer=filled(
                basic, do_lower_case=lower, never_split=set(), tokenize_chinese_chars=True,
                strip_accents=None, do_split_on_punc=True,
            ),
            wordpiece_tokenizer=filled(
                pieces, vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100
            ),
            tokens_trie=filled(trie, data={"[": {}}, _tokens={"[MASK]"}, _termination_char=""),
            _added_tokens_decoder={
                ids[text]: AddedToken(text, special=True, normalized=False)
                for text in names.values()
            },
            _added_tokens_encoder={text: ids[text] for text in names.values()},
            _special_tokens_map={
                # As bd3lms sets them; the others came from the class.
                "bos_token": "[CLS]", "eos_token": AddedToken("[SEP]", special=True),
                **{f"{name}_token": text for name, text in names.items()},
                "additional_special_tokens": [],
            },
            init_inputs=(),
            init_kwargs={"do_lower_case": lower},
            name_or_path="bert-base-uncased",
            clean_up_tokenization_spaces=True,
        )  # fmt: skip
        content["hyper_parameters"]["tokenizer"] = tokenizer
        torch.save(content, path)


def gpt2_like() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without a mask token and with the [PAD] that bd3lms adds."""
    vocabulary = {token: index for index, token in enumerate(["a", "b", "ab", "Ġ", "<|end|>"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>"
    )
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(
        ("<|end|>", 4), ("<|end|>", 4)
    )
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer
