"""The configuration of a bd3lms checkpoint in our words, and what is different about it.

Most keys have the same name; what differs is written down in the tables here. Values are taken only
if they are of the kind that our default has, so nothing but numbers, flags and names comes in.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runtime.bd3lms.tree import is_known
from runtime.config import ROOT
from runtime.excerpt import shown
from runtime.key_kinds import is_integer, is_number
from runtime.keys import KEYS, MAX_LENGTH, PRECISIONS

ALGORITHMS = ("ar", "bd3lm", "mdlm")
SCHEDULES = ("cosine", "log", "loglinear", "square", "square_root")
# Names of data sets, and the file of configs/data that has the same one.
_DATA = {
    "lm1b": "lm1b", "openwebtext": "openwebtext", "openwebtext-train": "openwebtext",
    "ptb": "ptb", "wikitext103": "wikitext", "lambada": "lambada", "ag_news": "ag_news",
    "scientific_papers_arxiv": "scientific_papers_arxiv",
    "scientific_papers_pubmed": "scientific_papers_pubmed",
}  # fmt: skip

_NEEDED = (
    "model.hidden_size", "model.n_blocks", "model.n_heads", "model.cond_dim", "model.length",
)  # fmt: skip
_SAME = (
    *_NEEDED, "seed", "model.dropout", "algo.T", "algo.ignore_bos", "algo.mdlm_loss_scale",
    "algo.time_conditioning", "training.ema", "training.antithetic_sampling", "training.resample",
    "training.sampling_eps_min", "training.sampling_eps_max", "loader.global_batch_size",
    "loader.eval_global_batch_size", "optim.lr", "optim.beta1", "optim.beta2", "optim.eps",
    "optim.weight_decay", "sampling.num_sample_batches", "sampling.nucleus_p",
    "sampling.first_hitting", "sampling.kv_cache", "sampling.var_length", "trainer.max_steps",
    "trainer.gradient_clip_val", "algo.var_min", "algo.clip_search_widths",
    "algo.clip_search_delta", "algo.fix_clipping",
)  # fmt: skip
# Taken over only where the data set is known: they belong together.
_SAME_DATA = (
    "data.tokenizer_name_or_path", "data.wrap", "data.insert_train_special",
    "data.insert_valid_special", "data.insert_train_eos", "data.insert_valid_eos",
)  # fmt: skip
# Without a counterpart and without effect on the weights, likelihoods or samples of the model here:
# sections and keys about the machine, about how a run was logged, or that nothing ever read.
_LEFT_OUT = (
    "mode", "diffusion", "strategy", "wandb", "hydra", "checkpointing", "callbacks", "eval",
    "trainer", "lr_scheduler", "loader", "noise", "algo.name", "algo.backbone",
    "algo.parameterization", "algo.causal_attention", "algo.dropout", "algo.cross_attn",
    "algo.sampler", "model.name", "model.type", "model.scale_by_sigma",
    "model.tie_word_embeddings", "model.adaln", "model.attn_backend", "model.causal_attention",
    "block_size", "training.sampling_eps", "training.coeff_clip", "training.eval_nll",
    "training.from_pretrained", "data.train", "data.valid", "data.cache_dir", "data.streaming",
    "sampling.noise_removal", "sampling.logdir",
)  # fmt: skip
# Of the checkpoints with depth reweighting. Their formula is not public, so their options do not
# become those of `masking=dependency`, whose formula is this project's own.
_REWEIGHTING = (
    "masking.mix_alpha", "masking.depth_mode", "masking.depth_temp", "masking.normalize_depth",
    "masking.reverse",
)  # fmt: skip


_SAID = 20  # of the keys that are unknown here


def convert_config(theirs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our configuration, and remarks on what is different, one line each.

    Args:
        theirs: the resolved tree (`runtime.bd3lms.tree.resolve`).

    Raises:
        ValueError: a method, network or schedule that is not here, or a value of a wrong kind.
    """
    algorithm = _choice(theirs, "algo.name", ALGORITHMS)
    _choice(theirs, "algo.backbone", ("dit",))
    _choice(theirs, "algo.parameterization", ("ar",) if algorithm == "ar" else ("subs",))
    schedule = _choice(theirs, "noise.type", SCHEDULES)
    data = _data_of(theirs)
    ours = _defaults(algorithm, schedule, data or "lm1b")
    for key in (*_SAME, *(_SAME_DATA if data else ())):
        value = _select(theirs, key)
        if value is not None and is_known(value):
            _put(ours, key, value)
        elif key in _NEEDED:
            raise ValueError(f"config.{key}={shown(value)}: a value is needed")
    precision = _select(theirs, "trainer.precision")
    if shown(precision) in PRECISIONS:
        ours["trainer"]["precision"] = precision
    ours["model"]["name"] = "bd3lms"
    ours["block_size"] = _block_size(theirs, algorithm, ours["model"]["length"])
    if data is None:
        del ours["data"]
    return ours, [*_remarks(theirs, ours), *_unknown(theirs)]


def _defaults(algorithm: str, schedule: str, data: str) -> dict[str, Any]:
    """Our configuration with these choices, without the sections of a run's own folder."""
    plain: Any = OmegaConf.to_container(_composed(algorithm, schedule, data), resolve=True)
    del plain["paths"]
    return plain


@functools.cache
def _composed(algorithm: str, schedule: str, data: str) -> DictConfig:
    folder = ROOT / "configs"
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    choices = {
        "algo": algorithm, "model": "small", "data": data, "noise": schedule, "masking": "none",
        "trainer": "auto", "lr_scheduler": "constant_warmup", "paths": "default",
    }  # fmt: skip
    for group, choice in choices.items():
        config[group] = OmegaConf.load(folder / group / f"{choice}.yaml")
        config[group].pop("defaults", None)
    for section in ("defaults", "hydra", "checkpointing", "eval"):
        del config[section]
    del config.paths.run_dir
    return config


def _choice(theirs: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = _select(theirs, key)
    if value not in allowed:
        raise ValueError(f"config.{key}={shown(value)}: allowed {', '.join(allowed)}")
    return value


def _data_of(theirs: Mapping[str, Any]) -> str | None:
    """The name of the data set here, if there is the same one."""
    name = _DATA.get(shown(_select(theirs, "data.train")))
    return "lm1b_wrap" if name == "lm1b" and _select(theirs, "data.wrap") is True else name


def _block_size(theirs: Mapping[str, Any], algorithm: str, length: int) -> int:
    """Only of bd3lm it is a choice: bd3lms has a block_size for the others too, and ignores it."""
    if algorithm != "bd3lm":
        return 1 if algorithm == "ar" else length
    value = _select(theirs, "block_size")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or length % value:
        raise ValueError(f"config.block_size={shown(value)}: allowed are divisors of {length}")
    return value


def _select(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _put(ours: dict[str, Any], key: str, value: Any) -> None:
    """Set a value that is of the kind of the default."""
    *sections, name = key.split(".")
    for section in sections:
        ours = ours[section]
    fits, allowed = _kind(ours[name])
    test, interval = _INTERVALS.get(key, (fits, allowed))
    if not fits(value) or not test(value):
        raise ValueError(f"config.{key}={shown(value)}: allowed {interval}")
    ours[name] = value


_INTERVALS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{key.path: (key.test, key.allowed) for key in KEYS if not key.nullable},
    # No weight is as long as a sequence.
    "model.length": (lambda value: 1 <= value <= MAX_LENGTH, f"an integer in [1, {MAX_LENGTH}]"),
}


def _kind(default: Any) -> tuple[Callable[[Any], bool], str]:
    """What a value in the place of `default` has to be, and how to call that."""
    if isinstance(default, bool):
        return lambda value: isinstance(value, bool), "true, false"
    if isinstance(default, int):
        return is_integer, "an integer"
    if isinstance(default, float):
        return is_number, "a number"
    if isinstance(default, list):
        return lambda value: isinstance(value, list) and all(map(is_number, value)), "numbers"
    return lambda value: isinstance(value, str), "a text"


def _remarks(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """What makes numbers of this model differ from those that bd3lms reports of it."""
    algorithm = ours["algo"]
    if algorithm["name"] != "ar":
        if not algorithm["ignore_bos"]:
            yield "algo.ignore_bos=false (default here: true): the first token is masked and scored"
        if algorithm["mdlm_loss_scale"]:
            yield "algo.mdlm_loss_scale=true (default here: false): masks with p(t) = (1 - 1e-3) t"
        yield (
            "likelihood: bd3lms draws one t in [1e-3, 1] per block; here eval.num_draws draws of"
            " the number of masked tokens, without bias"
        )
    if "bf16" in str(ours["trainer"]["precision"]):
        yield (
            "likelihood: bd3lms computes logits and loss in bf16, here they are in fp32: expect"
            " differences of 1e-3 to 1e-2 nats per token"
        )
    if ours["sampling"]["nucleus_p"] < 1.0:
        yield (
            f"sampling.nucleus_p={ours['sampling']['nucleus_p']}: bd3lms drops the token that"
            " crosses this mass, here it is kept"
        )
    found = {key: _select(theirs, key) for key in _REWEIGHTING}
    weights = [f"{key}={shown(value)}" for key, value in found.items() if value]
    if weights:
        yield (
            f"{', '.join(weights)}: not taken over, their formula is not public; likelihoods here"
            " are unweighted, and masking=dependency has a formula of its own"
        )
    if "data" not in ours:
        yield (
            f"data.train={shown(_select(theirs, 'data.train'))}: no such data set here; an"
            " evaluation needs data=NAME"
        )


def _unknown(theirs: Mapping[str, Any]) -> Iterator[str]:
    """One line with the keys that mean nothing here, if there are any."""
    known = {*_SAME, *_SAME_DATA, *_LEFT_OUT, *_REWEIGHTING}
    found = sorted(f"{shown(key)}={shown(value)}" for key, value in _leaves(theirs, known))
    if found:
        more = f" and {len(found) - _SAID} more" if len(found) > _SAID else ""
        yield f"kept out, unknown here: {', '.join(found[:_SAID])}{more}"


def _leaves(tree: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in known:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key, value


def their_config(ours: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of bd3lms that builds the same model.

    Raises:
        ValueError: it has no such method, network or schedule.
    """
    algorithm, model, noise = (ours[section] for section in ("algo", "model", "noise"))
    for key, value, allowed in (
        ("algo.name", algorithm["name"], ALGORITHMS),
        ("model._target_", model["_target_"], ("models.dit.DiT",)),
        ("noise.name", noise.get("name"), SCHEDULES),
    ):
        if value not in allowed:
            raise ValueError(f"{key}={value}: allowed {', '.join(allowed)}")
    theirs: dict[str, Any] = {key: dict(value) for key, value in _THEIR_DEFAULTS.items()}
    for key in _SAME:
        section, _, name = key.rpartition(".")
        value = _select(ours, key)
        if value is not None:
            (theirs[section] if section else theirs)[name] = value
    is_ar = algorithm["name"] == "ar"
    theirs["algo"] |= {
        "name": algorithm["name"],
        "parameterization": "ar" if is_ar else "subs",
        "sampler": "ar" if is_ar else "semi_ar",
        "causal_attention": is_ar,
        "cross_attn": algorithm["name"] == "bd3lm",
    }
    theirs["noise"] = {"type": noise["name"]}
    name = _select(ours, "data.name")
    theirs["data"] |= {"train": name, "valid": name}
    for key in _SAME_DATA:
        value = _select(ours, key)
        if value is not None:
            theirs["data"][key.removeprefix("data.")] = value
    return theirs | {"mode": "train", "diffusion": "absorbing_state", "wandb": None,
                     "block_size": ours["block_size"]}  # fmt: skip


# What bd3lms needs to be told and has no counterpart here.
_THEIR_DEFAULTS: dict[str, dict[str, Any]] = {
    "algo": {
        "backbone": "dit", "dropout": 0.0, "var_min": False, "clip_search_delta": 0.05,
        "clip_search_widths": [], "fix_clipping": False,
    },
    "model": {
        "name": "palimpsest", "type": "ddit", "scale_by_sigma": True,
        "tie_word_embeddings": False, "adaln": False, "attn_backend": "sdpa",
    },
    "data": {"cache_dir": "data", "streaming": False},
    "training": {
        "sampling_eps": 1e-3, "coeff_clip": -1.0, "from_pretrained": None, "eval_nll": True,
    },
    "loader": {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "pin_memory": False},
    "optim": {},
    "sampling": {"noise_removal": False, "logdir": "samples"},
    "eval": {
        "checkpoint_path": "", "disable_ema": False, "perplexity_batch_size": 8,
        "compute_perplexity_on_sanity": False, "generate_samples": False,
        "gen_ppl_eval_model_name_or_path": "gpt2-large",
    },
    "trainer": {
        "_target_": "lightning.Trainer", "accelerator": "auto", "num_nodes": 1, "devices": 1,
        "accumulate_grad_batches": 1, "precision": "32",
    },
    "lr_scheduler": {
        "_target_": "transformers.get_constant_schedule_with_warmup", "num_warmup_steps": 2500,
    },
    "checkpointing": {
        "save_dir": ".", "resume_from_ckpt": False, "resume_ckpt_path": None,
    },
}  # fmt: skip
