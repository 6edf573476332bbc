"""The quick ways of the tests are those of main.py: a composed configuration, a forked process."""

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict

from tests.runs import EIGHT_STEPS, WEIGHTED
from tests.support import TOY, compose_config, plainly_composed

SETS = (
    (),
    TOY,
    (*EIGHT_STEPS, *WEIGHTED, "seed=2"),
    ("optim.lr=1", "experiment=bd3lm_cosine", "optim.lr=2", "+mode.more=[1,{a: 2}]"),
    ("sampling/strategy=top_k", "mode=sample_eval", "data.files=[a.txt]", "data=text"),
    ("algo=nce", "model=tiny_causal", "bon/proposal=softmax_sampling", "callbacks=none"),
    ("experiment=large_scale/qwen3_4b_6n", "algo=masked_adapt", "~callbacks"),
)


@pytest.mark.parametrize("overrides", SETS)
def test_a_configuration_is_that_of_hydra(overrides):
    for _ in range(2):  # also from the files that are kept
        cfg = compose_config(*overrides, run_dir="here")
        plain = plainly_composed.__wrapped__("paths.run_dir=here", *overrides)
        assert OmegaConf.to_yaml(cfg) == OmegaConf.to_yaml(plain)
        assert OmegaConf.is_struct(cfg) == OmegaConf.is_struct(plain)
        with open_dict(cfg):
            cfg.mode.mark, cfg.optim.lr = "of one test", 5.0


@pytest.mark.parametrize("wrong", ["modle=tiny", "model=huge", "training.emma=1", "~nothing"])
def test_what_hydra_refuses_is_refused(wrong):
    messages = []
    for compose in (compose_config, plainly_composed):
        with pytest.raises(ConfigCompositionException) as stop:
            compose(wrong)
        messages.append(str(stop.value))
    assert messages[0] == messages[1]
