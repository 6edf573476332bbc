"""instantiate builds what is allowed, and nothing else runs."""

import functools

import pytest
import torch
from omegaconf import OmegaConf

from runtime import config
from runtime.config import allow_plugins, check_targets, instantiate, locate, one_line, targets
from runtime.errors import ConfigError


@pytest.fixture
def no_plugins(monkeypatch):
    monkeypatch.setattr(config, "_plugins", set())


def test_builds_nested_targets_and_hands_over_plain_python():
    node = OmegaConf.create(
        {
            "fit": {
                "_target_": "lightning.pytorch.Trainer",
                "max_steps": 3,
                "logger": False,
                "accelerator": "cpu",
                "enable_checkpointing": False,
                "callbacks": [{"_target_": "callbacks.exact_resume.ExactResume", "seed": 4}],
            }
        }
    )
    trainer = instantiate(node.fit, enable_progress_bar=False)
    assert trainer.max_steps == 3
    assert [c.seed for c in trainer.callbacks if type(c).__name__ == "ExactResume"] == [4]


def test_partial_stays_a_partial_of_the_target():
    node = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}
    build = instantiate(node)
    assert isinstance(build, functools.partial) and build.func is torch.optim.SGD
    assert build([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.5


def test_arguments_are_never_built_from(tmp_path):
    """A configuration handed over as an argument stays data, whatever targets it names."""
    inner = OmegaConf.create({"_target_": "os.mkdir", "path": str(tmp_path / "canary")})
    callback = instantiate({"_target_": "callbacks.exact_resume.ExactResume"}, seed=inner)
    assert callback.seed is inner and not (tmp_path / "canary").exists()


HOSTILE = [
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "torch.load",
    "pathlib.Path",
    "modes.train.Path",
    "runtime.run.os.system",
    "callbacks.graceful_stop.os.system",
    "lightning.pytorch.trainer.connectors.signal_connector.call",
    "objectives_evil.f",
    "",
    3,
]


@pytest.mark.parametrize("target", HOSTILE)
def test_refused_wherever_it_stands(target, no_plugins):
    inner = {"_target_": target}
    outer = {"_target_": "callbacks.exact_resume.ExactResume", "seed": [{"deep": inner}]}
    for node in (inner, outer, OmegaConf.create({"a": inner, "b": "${a}"}).b):
        with pytest.raises(ConfigError) as error:
            instantiate(node)
        assert "_target_" in str(error.value) and "\n" not in str(error.value)


def test_message_names_path_and_value():
    cfg = OmegaConf.create({"model": {"blocks": [{"_target_": "os.system"}]}})
    with pytest.raises(ConfigError, match=r"^model\.blocks\.0\._target_=os\.system: not"):
        check_targets(cfg)


def test_targets_follow_interpolations():
    cfg = OmegaConf.create({"a": {"_target_": "x"}, "b": ["${a}"]})
    assert list(targets(cfg)) == [("a._target_", "x"), ("b.0._target_", "x")]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("models.nothing_here.Net", "no such module|has no"),
        ("callbacks.exact_resume.Nothing", "has no Nothing"),
        ("callbacks.exact_resume", "not a class or function"),
        ("callbacks.checkpoints.L.Trainer.fit", ""),
    ],
)
def test_locate_says_what_is_wrong(target, message):
    if not message:
        assert callable(locate(target))  # a name that passes through still ends at home
        return
    with pytest.raises(ConfigError, match=message):
        locate(target)


def test_unknown_option_names_it_and_what_there_is():
    cfg = OmegaConf.create({"c": {"_target_": "callbacks.exact_resume.ExactResume", "sead": 1}})
    with pytest.raises(ConfigError, match=r"^c\.sead: unknown option .*; allowed: seed, updates$"):
        instantiate(cfg.c)


def test_name_is_a_label_unless_the_target_wants_it():
    node = {"_target_": "callbacks.exact_resume.ExactResume", "name": "exact", "seed": 1}
    assert instantiate(node).seed == 1


def test_a_component_raises_its_own_error():
    node = {"_target_": "objectives.noise.LogLinear", "eps": 2.0}
    with pytest.raises(ValueError, match=r"eps=2\.0"):
        instantiate(node)


def test_plugins_are_allowed_by_the_user_only(tmp_path, monkeypatch, no_plugins):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").write_text("def make(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "my_lab.make", "x": 1}
    with pytest.raises(ConfigError, match="plugins="):
        instantiate(node)
    with monkeypatch.context() as patch:
        patch.setenv(config.PLUGINS_VARIABLE, "my_lab")
        assert instantiate(node) == 2
    allow_plugins(["my_lab"])
    assert instantiate(node) == 2


def test_one_line():
    assert one_line("a\n\n  b \n") == "a; b"
