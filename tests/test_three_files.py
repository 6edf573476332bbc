"""A new objective, dataset or sampler is one module, one yaml and one test, with no edit elsewhere.

The modules and their yaml lie in tests/plugins; this is the test of all three.
"""

import json
import re
import shutil

import pytest
import torch

from decoding.settings import SamplingConfig
from objectives.noise import LogLinear
from runtime.run import load_summary
from tests.forks import fork_main
from tests.plugins.toy_objective import TemperedMDLM, tempered
from tests.plugins.toy_rule import LeftToRight
from tests.plugins.toy_source import Counting
from tests.runs import call_main
from tests.small import small_batch, small_model
from tests.support import ROOT

PLUGINS = ROOT / "tests" / "plugins"
TINY = (
    "trainer=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
    "model.length=16", "model.hidden_size=16", "model.n_blocks=1", "model.n_heads=2",
    "loader.global_batch_size=8", "data=counting",
)  # fmt: skip


def placed(folder, *arguments, config_dir=PLUGINS / "configs"):
    cache = f"paths.cache_dir={folder.parent / 'cache'}"
    return "--config-dir", str(config_dir), f"paths.run_dir={folder}", cache, *arguments


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with the objective and the dataset; both named on the command line alone."""
    folder = tmp_path_factory.mktemp("three_files") / "train"
    assert call_main(placed(folder, *TINY, "algo=tempered", "algo.power=0.25")) == 0
    return folder


def test_objective_and_dataset_train(trained):
    summary = load_summary(trained)
    assert (summary["algo"], summary["status"], summary["steps"]) == ("tempered", "done", 4)
    assert summary["metrics"]["val/nll"] > 0


def test_sampler_decodes_what_they_trained(trained, tmp_path, call):
    checkpoint = f"eval.checkpoint_path={trained / 'checkpoints' / 'best.ckpt'}"
    options = ("sampling/strategy=left_to_right", "sampling.tokens_per_step=5")
    more = (checkpoint, *options, "sampling.batch_size=2", "trainer=cpu")
    done = call(*placed(tmp_path / "samples", "mode=sample_eval", *more))
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == 2 and all("text" in json.loads(row) for row in rows)
    # 15 positions after the first token, 5 at a time.
    assert load_summary(tmp_path / "samples")["metrics"]["nfe"] == 3


def test_a_package_of_ones_own_needs_its_name_in_plugins(tmp_path, call, monkeypatch):
    """The same module and yaml outside of the repository."""
    shutil.copy(PLUGINS / "toy_objective.py", tmp_path / "elsewhere.py")
    shutil.copytree(PLUGINS / "configs", tmp_path / "configs")
    target = "algo._target_=elsewhere.TemperedMDLM"
    common = (*TINY, "algo=tempered", target)
    configs = tmp_path / "configs"
    monkeypatch.syspath_prepend(str(tmp_path))
    refused = call(*placed(tmp_path / "refused", *common, config_dir=configs))
    assert refused.returncode == 2
    assert "algo._target_=elsewhere.TemperedMDLM: not an allowed target" in refused.stderr
    allowed = placed(tmp_path / "run", *common, "plugins=[elsewhere]", config_dir=configs)
    # In a process of its own: what is allowed stays allowed.
    done = fork_main(*allowed, said=tmp_path / "said.txt")
    assert done.returncode == 0, done.stderr
    assert load_summary(tmp_path / "run")["status"] == "done"


def test_a_bad_option_of_a_plugin_is_one_line(tmp_path, call):
    done = call(*placed(tmp_path / "run", *TINY, "algo=tempered", "algo.power=2"))
    assert done.returncode == 2
    assert done.stderr.strip() == "ConfigError: algo.power=2: allowed 0 <= power <= 1"


def tempered_model(power: float) -> TemperedMDLM:
    model = small_model()
    config = {**model.config, "algo": {**model.config["algo"], "power": power}}
    return TemperedMDLM(config, model.tokenizer_state)


def test_tempered_weights():
    assert tempered(torch.tensor([4.0, 1.0]), 0.5).tolist() == [2.0, 1.0]
    batch = small_batch()
    bound, ours = small_model().corrupt(batch, 3), tempered_model(1.0).corrupt(batch, 3)
    assert all(torch.equal(bound[name], ours[name]) for name in bound)
    unweighted = tempered_model(0.0).corrupt(batch, 3)
    assert unweighted["weights"].unique().tolist() == [1.0]
    assert unweighted["scored"] == len(unweighted["rows"])


def test_counting():
    source = Counting(documents_per_split=12, words=3)
    texts = [document["text"] for document in source.documents("train")]
    assert len(texts) == 12 and texts[9] == "nine zero one"
    assert source.fingerprint() != Counting(12, 4).fingerprint()


def test_left_to_right():
    masked_BS = torch.tensor([[False, True, True, True], [True, False, True, False]])
    plan_BS = LeftToRight(2).plan(torch.rand(2, 4), masked_BS, LogLinear())
    assert plan_BS.tolist() == [[-1, 0, 0, 1], [0, -1, 0, -1]]
    seen = []
    small_model().sample(
        1, SamplingConfig(strategy=LeftToRight()), on_step=lambda x_BL: seen.append(x_BL.clone())
    )
    masked = [(x_BL[0] == 3).nonzero()[:, 0].tolist() for x_BL in seen]
    assert masked == [list(range(first, 8)) for first in range(2, 9)]


def lines(text: str) -> str:
    """A text without indentation and blank lines."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def test_contributing_shows_these_files():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = re.findall(r"```(?:python|yaml) (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 5
    for path, code in shown:
        assert lines(code) in lines((ROOT / path).read_text()), f"{path} is shown differently"
