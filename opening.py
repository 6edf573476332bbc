"""From a configuration to a model, built anew or opened from a checkpoint, and to its data."""

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerFast

from algorithm import Algorithm
from data.errors import DataError
from data.tokenization import same_ids, tokenizer_state
from dataloader import LanguageData
from pretrained import PretrainedAlgorithm
from runtime.checkpoint import read_checkpoint, stored_hyper_parameters
from runtime.config import locate, to_plain
from runtime.errors import ConfigError
from runtime.overrides import checkpoint_config, overridden_keys
from runtime.validation import validate


def open_checkpoint(config: DictConfig) -> tuple[Algorithm, DictConfig]:
    """The model of `eval.checkpoint_path`, and the configuration to evaluate it with.

    What the model and its data are comes from the checkpoint, except for what the command line
    says (`runtime.overrides`).
    """
    path = config.eval.checkpoint_path
    stored = stored_hyper_parameters(read_checkpoint(path), f"eval.checkpoint_path={path}")
    merged = checkpoint_config(config, stored["config"], overridden_keys())
    validate(merged)
    model = Algorithm.load_from_checkpoint(path, merged, weights=config.eval.weights)
    return model, merged


def open_to_answer(config: DictConfig) -> tuple[Algorithm, DictConfig]:
    """The same, with its weights in `mode.dtype`, in evaluation mode.

    Raises:
        ConfigError: a dtype for an algorithm that answers in that of its training alone.
    """
    model, merged = open_checkpoint(config)
    dtype = config.mode.get("dtype")
    if dtype is not None:
        if not isinstance(model, PretrainedAlgorithm):
            raise ConfigError(
                f"mode.dtype={dtype}: algo={merged.algo.name} answers in the precision that it was"
                " trained in; allowed: null"
            )
        model.cast(dtype)
    return model.eval(), merged


def build_algorithm(config: DictConfig, data: LanguageData) -> Algorithm:
    """The algorithm that `config.algo._target_` names, started from pretrained weights if asked."""
    plain = to_plain(config)
    algorithm = locate(plain["algo"]["_target_"])(plain, tokenizer_state(data.tokenizer))
    algorithm.data_fingerprint = data.fingerprint
    data.require_features(algorithm.required_features)
    path = plain["training"]["from_pretrained"]
    if path is not None:
        algorithm.load_pretrained(path, plain["training"]["allow_partial"])
    return algorithm


def evaluation_data(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerFast,
    named: bool,
    with_parse: bool = False,
) -> LanguageData:
    """Data to evaluate a model on `eval.split`, read with the model's own tokenizer.

    Args:
        config: the configuration of the evaluation.
        tokenizer: the checkpoint's.
        named: whether the user asked for `data.tokenizer_name_or_path`; it must then agree.
        with_parse: whether depths are wanted; a likelihood needs none, so where the parse of
            its splits is not there the data is read without it.

    Raises:
        DataError: it does not.
    """
    data = LanguageData(config, tokenizer)
    # With the parse, the token cache of the training is found again.
    if not with_parse and not data.is_parsed(("train", config.eval.split)):
        config = config.copy()
        config.data.parse = None
        data = LanguageData(config, tokenizer)
    if named:
        theirs = LanguageData(config).tokenizer
        if not same_ids(theirs, tokenizer):
            raise DataError(
                f"data.tokenizer_name_or_path={config.data.tokenizer_name_or_path}: not the"
                " tokenizer that the checkpoint was trained with; leave it out to use that one"
            )
    return data
