"""The quick ways of the tests are those of main.py: a composed configuration, a forked process."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict

from tests.quick_hydra import remembering
from tests.runs import EIGHT_STEPS, WEIGHTED
from tests.support import ROOT, TOY, compose_config, plainly_composed

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
        plain = plainly_composed("paths.run_dir=here", *overrides)
        assert OmegaConf.to_yaml(cfg) == OmegaConf.to_yaml(plain)
        assert OmegaConf.is_struct(cfg) == OmegaConf.is_struct(plain)
        with open_dict(cfg):
            cfg.mode.mark, cfg.optim.lr = "of one test", 5.0


@pytest.mark.parametrize("overrides", SETS)
def test_hydra_remembers_what_it_has_composed(overrides):
    given = ["paths.run_dir=here", *overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        plain = compose("config", given, return_hydra_config=True)
        for _ in range(2):
            with remembering():
                found = compose("config", given, return_hydra_config=True)
            assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(plain)
            with open_dict(found):
                found.mode.mark, found.optim.lr = "of one test", 5.0


def test_hydra_does_not_remember_files_of_others(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    with remembering(), initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("config").a == 1
        (tmp_path / "config.yaml").write_text("a: 2")
        assert compose("config").a == 2


@pytest.mark.parametrize("wrong", ["modle=tiny", "model=huge", "training.emma=1", "~nothing"])
def test_what_hydra_refuses_is_refused(wrong):
    messages = []
    for composed in (compose_config, plainly_composed):
        with pytest.raises(ConfigCompositionException) as stop:
            composed(wrong)
        messages.append(str(stop.value))
    assert messages[0] == messages[1]
