"""How runs that learn from their own samples end before their time: what is kept, what is said."""

import json

import pytest
import torch

from modes import train
from online import OnlineAlgorithm
from policy import ThoughtPolicy
from runtime.checkpoint import read_checkpoint
from runtime.errors import NonFiniteError
from runtime.full_state import full_states
from runtime.run import load_summary
from runtime.validation import validate
from tests.online_runs import fit, report, table, tiny_online
from tests.runs import call_main, last
from tests.support import compose_config, equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ends")


@pytest.fixture
def says(folder, tmp_path, capfd):
    """Run main with a tiny run's overrides and more; the exit code and the line on stderr."""

    def run(*overrides: str, without: tuple[str, ...] = ()) -> tuple[int, str]:
        base = [text for text in tiny_online(folder) if not text.startswith(without)]
        capfd.readouterr()
        code = call_main([*base, f"paths.run_dir={tmp_path}/run", *overrides])
        lines = [line for line in capfd.readouterr().err.strip().splitlines()
                 if not line.startswith("step ")]  # fmt: skip
        assert len(lines) == 1 or code == 0, lines
        return code, lines[0] if lines else ""

    return run


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_a_reward_without_bound_ends_the_run(folder, tmp_path):
    """The third step is not taken; the checkpoint is that of two steps."""
    fit(folder, tmp_path / "good", "checkpointing.full_state_every_n_steps=2")
    with pytest.raises(NonFiniteError) as error:
        fit(folder, tmp_path / "bad", reward={"infinite_at": 3})
    assert str(error.value).startswith("non-finite loss at step 2, rows [")
    assert len(json.loads(str(error.value).partition("rows ")[2].partition(":")[0])) == 16
    found = report(tmp_path / "bad")
    assert found["stopped_reason"] == str(error.value) and found["completed_steps"] == 2
    assert found["history"] == report(tmp_path / "good")["history"][:2]
    kept = last(tmp_path / "bad")
    assert kept["global_step"] == 2
    straight = read_checkpoint(full_states(tmp_path / "good" / "checkpoints")[0])
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "online"):
        assert equal(kept[part], straight[part]), part
    # The cause is mended: the run goes on as if nothing had been.
    fit(folder, tmp_path / "bad")
    assert equal(last(tmp_path / "bad")["state_dict"], last(tmp_path / "good")["state_dict"])
    assert table(tmp_path / "bad") == table(tmp_path / "good")
    assert report(tmp_path / "bad")["stopped_reason"] is None


def test_bad_in_the_second_update_of_a_batch(folder, tmp_path, monkeypatch):
    """The run goes on with that update, so that its steps are as many as they should be."""
    two = ("algo.updates=2", "trainer.max_steps=4")
    original = OnlineAlgorithm._update
    held = {}

    def spoiled(self, experience):
        if self.trainer.global_step == 3:
            held["weights"] = [w.detach().clone() for w in self.trained_parameters()]
            held["model"] = self
            experience.parts[0]["old"].fill_(torch.nan)
        original(self, experience)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineAlgorithm, "_update", spoiled)
        with pytest.raises(NonFiniteError, match="non-finite loss at step 3"):
            fit(folder, tmp_path, *two)
    assert all(map(torch.equal, held["model"].trained_parameters(), held["weights"]))
    assert last(tmp_path)["global_step"] == 3
    fit(folder, tmp_path, *two)
    assert last(tmp_path)["global_step"] == 4
    assert [row["step"] for row in table(tmp_path) if "lr" in row] == [1, 2, 3, 4]


def test_a_weight_that_is_not_finite(folder, tmp_path, monkeypatch):
    original = ThoughtPolicy.collect

    def collect(self, batch):
        found = original(self, batch)
        if self.trainer.global_step == 1:
            self.trained_parameters()[-1].fill_(torch.inf)
        return found

    monkeypatch.setattr(ThoughtPolicy, "collect", collect)
    with pytest.raises(NonFiniteError, match=r"at step 1, rows .*: the step was not applied"):
        fit(folder, tmp_path)
    assert report(tmp_path)["completed_steps"] == 1


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_exit_code_of_a_run_that_is_not_finite(says, tmp_path, monkeypatch):
    original = ThoughtPolicy.judged

    def judged(self, prefixes, rollouts):
        rows = original(self, prefixes, rollouts)
        if self.trainer.global_step == 1:
            rows[5]["reward"] = float("inf")
        return rows

    monkeypatch.setattr(ThoughtPolicy, "judged", judged)
    code, line = says()
    assert code == 3 and line.startswith("NonFiniteError: non-finite loss at step 1, rows [")
    found = report(tmp_path / "run")
    assert found["stopped_reason"] == line.removeprefix("NonFiniteError: ")
    assert last(tmp_path / "run")["global_step"] == 1
    assert load_summary(tmp_path / "run")["status"] != "done"


def test_an_alert_ends_the_run_if_it_shall(says, tmp_path):
    """Bytes at random are no text: the first step has an alert on artifacts."""
    code, _ = says("algo.enforce_stop_conditions=true")
    assert code == 0
    found = report(tmp_path / "run")
    assert found["completed_steps"] == 1 and len(found["history"]) == 1
    assert found["stopped_reason"].startswith(("artifact_rate=", "near_zero_group_rate="))
    assert last(tmp_path / "run")["global_step"] == 1
    assert found["history"][0]["alerts"] >= 1


def test_an_alert_is_said_when_it_begins(folder, tmp_path, caplog):
    fit(folder, tmp_path, "trainer.max_steps=3", "trainer.val_check_interval=3")
    said = [record.message for record in caplog.records if "artifact_rate" in record.message]
    assert len(said) == 1 and said[0].startswith("step 0: artifact_rate=")
    assert report(tmp_path)["stopped_reason"] is None
    assert all(row["alerts"] >= 1 for row in report(tmp_path)["history"])


BAD = {
    "open": (["algo.open='<thought>'"], ["algo.open='<thought>': 9 tokens of the tokenizer"]),
    "close": (["algo.close=''"], ["algo.close="]),
    "samples": (["algo.samples=1"], ["algo.samples=1: ", "allowed an integer >= 2"]),
    "updates": (["algo.updates=4"], ["algo.updates=4: does not divide trainer.max_steps=6"]),
    "no_updates": (["algo.updates=0"], ["algo.updates=0: wrong value; allowed: an integer >= 1"]),
    "batch_size": (["loader.batch_size=2"],
                   ["loader.batch_size=2: ", "allowed: null", "rows_per_pass"]),
    "dropout": (["algo.lora={r:2,lora_dropout:0.1}"],
                ["algo.lora.lora_dropout=0.1: ", "sampled without dropout", "allowed: 0"]),
    "nucleus": (["algo.top_p=0.9", "algo.updates=2"],
                ["algo.updates=2 algo.top_p=0.9: ", "allowed: algo.top_p=1, or algo.updates=1"]),
    "no_reference": (["algo.reference=null"], ["algo.kl.coefficient=0.02: needs a reference"]),
    "fsdp": (["trainer=fsdp"], ["trainer.strategy: algo=rlmt_paper has weights that cannot be"]),
    "reward": ([], ["reward=null: algo=rlmt_paper learns from rewards"], "reward="),
    "pattern": (["reward.pattern='('"], ["pattern='(': ", "allowed: a regular expression"]),
    "top_p": (["algo.top_p=1.5"], ["algo.top_p=1.5: wrong value; allowed: a number in (0, 1]"]),
    "temperature": (["algo.temperature=0"], ["algo.temperature=0: wrong value"]),
    "advantage": (["algo.advantage=best"], ["algo.advantage=best: ", "grpo, dr_grpo, rloo"]),
    "level": (["algo.kl.level=word"], ["algo.kl.level=word: ", "token, sequence"]),
    "kind": (["algo.reference.kind=last"], ["algo.reference.kind=last: ", "frozen, periodic, ema"]),
    "decay": (["algo.reference.decay=1"], ["algo.reference.decay=1: ", "[0, 1)"]),
    "cap": (["algo.correction={level:token,cap:0}"], ["algo.correction.cap=0: "]),
    "correction": (["algo.correction={}"], ["algo.correction={}: ", "{level:token,cap:2.0}"]),
    "no_cap": (["algo.correction={level:token}"],
               ["algo.correction={'level': 'token'}: ", "{level:token,cap:2.0} (both, nothing"]),
    "no_level": (["algo.correction={cap:2.0}"], ["algo.correction={'cap': 2.0}: ", "(both, "]),
    "more": (["algo.correction={level:token,cap:2.0,foo:1}"],
             ["'foo': 1}: ", "(both, nothing else), null"]),
    "reference": (["++algo.reference.foo=1"],
                  ["algo.reference={", "'foo': 1}: ", "beside kind only every, decay"]),
    "tags": (["algo.open='</think>'"], ["algo.close=</think>: the token of algo.open=</think>"]),
    "model": (["model=nano"], ["model=nano: mode=train algo=rlmt_paper needs another kind"],
              "model."),
    "no_thinker": (["model=tiny_causal"], ["algo.open='<think>': 7 tokens", "model=tiny_thinker"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_before_a_network_is_built(folder, tmp_path, monkeypatch, name):
    def build(*_):
        raise AssertionError("a network is built")

    monkeypatch.setattr("pretrained.Backbone", build)
    overrides, parts, *without = BAD[name]
    base = [text for text in tiny_online(folder) if not text.startswith(tuple(without))]
    cfg = compose_config(*base, *overrides, run_dir=tmp_path)
    with pytest.raises(ValueError, match="allowed") as error:
        validate(cfg)
        train.run(cfg)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


ROWS = {
    "too_long": (["model.max_position_embeddings=24"],
                 ["ValueError: prefix '", "tokens, and the model has room for 14"]),
    "stream": (["data=text", "data.tokenizer_name_or_path=target"],
               ["data=text: rows that do not say where documents begin", "data=prefix_suffix"],
               "data.chunking", "data="),
    "texts": (["data=text", "data.tokenizer_name_or_path=target", "+data.join=true",
               "data.wrap=false",
               "data.insert_train_special=false", "data.insert_valid_special=false"],
              ["data=text: row ", "is not a prefix", "data=prefix_suffix", "data.form=prefixes"],
              "data.chunking", "data="),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_nothing_can_be_learned_from(says, name):
    overrides, parts, *without = ROWS[name]
    code, line = says(*overrides, without=tuple(without))
    assert code == 2, line
    for part in parts:
        assert part in line
