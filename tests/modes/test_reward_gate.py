"""mode=reward_gate and its table: each rollout once, whatever kills it."""

import json
import os
import re
import shutil
import signal

import pytest
import torch

from data.errors import DataError
from decoding.rollout import LocalRollouts
from decoding.rollout_record import Rollout
from evaluation.gate_run import deranged
from modes import gate_folder, gate_table, reward_gate, train
from modes.gate_folder import read_arms, read_prefixes
from objectives.keyed import fold_key
from rewards.continuation import Judgement
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.forks import Fork
from tests.plugins.toy_reward import ByteReward
from tests.runs import EIGHT_STEPS, last
from tests.support import compose_config

ARMS = ("think_base", "think_phase3")
TINY = (
    "model=tiny_thinker", "model.hidden_size=32", "model.num_hidden_layers=2", "model.length=36",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "algo=sft_raw",
    "algo.attn_backend=math", "data=prefix_suffix", "data.split_paragraphs=true",
    "data.valid_fraction=0.3", "data.chunking.prefix_len=24", "data.chunking.suffix_len=12",
    "data.chunking.min_source_tokens=36", *EIGHT_STEPS, "trainer.max_steps=1",
    "trainer.val_check_interval=1", "training.ema=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints of unlike weights, and the text that they have seen."""
    folder = tmp_path_factory.mktemp("gate")
    lines = (f"line {n} says {'xy' * (n % 5)} and goes on until the end.\n\n" for n in range(60))
    (folder / "text.txt").write_text("".join(lines))
    more = (f"data.files={folder}/text.txt", f"paths.cache_dir={folder}/cache")
    train.run(compose_config(*TINY, *more, run_dir=folder / "run"))
    content = last(folder / "run")
    for scale, arm in enumerate(ARMS, start=1):
        weights = {name: value * scale for name, value in content["state_dict"].items()}
        torch.save({**content, "state_dict": weights}, folder / f"{arm}.ckpt")
    return folder


def configured(folder, run_dir, *overrides, arms=ARMS):
    """A gate: three prefixes, four samples each."""
    listed = ",".join(f"{arm}:{folder}/{arm}.ckpt" for arm in arms)
    cfg = compose_config(
        "mode=reward_gate", f"mode.checkpoints={{{listed}}}", "mode.prefixes=3", "mode.samples=4",
        "mode.thought_tokens=3", "mode.suffix_tokens=6", "mode.batch_size=8", "trainer=cpu",
        "+reward={_target_:tests.plugins.toy_reward.ByteReward,salt:a}",
        f"paths.cache_dir={folder}/cache", *overrides, run_dir=run_dir,
    )  # fmt: skip
    validate(cfg)
    return cfg


@pytest.fixture(scope="module")
def done(folder):
    """An unbroken gate with its probe, its metrics, and what the judge has seen."""
    run_dir, seen, judge = folder / "done", [], ByteReward.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ByteReward, "judge", lambda self, cases: seen.extend(cases) or judge(self, cases)
        )
        metrics = reward_gate.run(configured(folder, run_dir, "mode.probe=true"))
    return run_dir, metrics, seen


@pytest.fixture(autouse=True)
def undrawn(done, monkeypatch):
    """One picture is enough."""
    monkeypatch.setattr(gate_folder, "plot_gate", lambda path, gate: path.touch())


def rows_of(run_dir, arm, kind="arms"):
    return [json.loads(line) for line in (run_dir / kind / f"{arm}.jsonl").open()]


def test_rollouts_are_the_models_and_rewards_the_judges(folder, done):
    run_dir, metrics, _ = done
    prefixes = read_prefixes(run_dir)
    assert len({prefix.id for prefix in prefixes}) == 3
    for arm in ARMS:
        rows = rows_of(run_dir, arm)
        cfg = configured(folder, run_dir)
        opened = reward_gate.open_arm(cfg, f"{folder}/{arm}.ckpt")
        ends = (opened.model.tokenizer.eos_token_id,)
        settings = reward_gate.settings_of(cfg, opened.open_id, opened.close_id, ends)
        assert settings.seed == fold_key((cfg.seed, reward_gate._STREAM)) and settings.rows == 8
        wanted = opened.model.rollouts(settings).sample(
            [(prefix.id, prefix.prompt_ids) for prefix in prefixes], 4
        )
        assert [Rollout.from_row(row).sampled_ids for row in rows] == [
            one.sampled_ids for one in wanted
        ]
        for row, prefix in zip(rows, (p for p in prefixes for _ in range(4)), strict=True):
            assert (row["arm"], row["prefix_id"]) == (arm, prefix.id)
            assert row["prompt_ids"][-1] == opened.open_id
            assert opened.text(row["prompt_ids"][:-1]) == row["prefix"] == prefix.prefix
            assert (row["prefix"] + row["reference"]) in (folder / "text.txt").read_text()
            assert row["suffix"] == opened.text(row["suffix_ids"])
            judgement = ByteReward("a").one(row["suffix"])
            assert (row["reward"], row["reason"]) == (judgement.score, judgement.reason)
            assert row["judge_valid"] == (judgement.score is not None)
        mean = mean_of(rows)
        assert metrics[f"gate/{arm}/reward_mean"] == pytest.approx(mean) and 0 < mean < 1
        alone = json.loads((run_dir / "arms" / f"{arm}.json").read_text())
        assert alone["arm"] == arm and alone["reward_mean"] == pytest.approx(mean)
    assert (run_dir / "gate.png").stat().st_size > 1000
    assert rows_of(run_dir, ARMS[0])[0]["suffix_ids"] != rows_of(run_dir, ARMS[1])[0]["suffix_ids"]


def mean_of(rows):
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    return sum(rewards) / len(rewards)


def test_the_judge_sees_no_thought(done):
    run_dir, _, seen = done
    rows = [
        row for kind in ("arms", "probe") for arm in ARMS for row in rows_of(run_dir, arm, kind)
    ]
    assert [(case.prefix, case.reference, case.candidate) for case in seen] == [
        (row["prefix"], row["reference"], row["suffix"])
        for arm in ARMS for row in rows if row["arm"] == arm
    ]  # fmt: skip
    assert len({case.id for case in seen if "/" in case.id}) == 12 * 4


def test_the_probe_changes_nothing_but_the_thought(done):
    run_dir, metrics, _ = done
    rows = rows_of(run_dir, "think_base")
    own = {(row["prefix_id"], row["k"]): row for row in rows}
    other = deranged(list(dict.fromkeys(row["prefix_id"] for row in rows)), seed=1)
    probe = rows_of(run_dir, "think_base", "probe")
    assert [row["condition"] for row in probe] == ["blank"] * 12 + ["generic"] * 12 + [
        "swapped"
    ] * 12
    for row in probe:
        mine = own[row["prefix_id"], row["k"]]
        assert row["prompt_ids"] == mine["prompt_ids"] and row["reference"] == mine["reference"]
        if row["condition"] == "swapped":
            assert row["thought_ids"] == own[other[row["prefix_id"]], row["k"]]["thought_ids"]
        elif row["condition"] == "blank":
            assert row["thought_ids"] == []
        else:
            assert row["thought"] == "Let me think about what comes next."
        assert row["thought_logprobs"] is None and len(row["suffix_ids"]) <= 6
    by_prefix = [[row for row in probe[:12] if row["prefix_id"] == p] for p in other]
    means = [mean_of(rows) for rows in by_prefix]
    assert metrics["probe/think_base/blank/reward_mean"] == pytest.approx(sum(means) / 3)
    assert metrics["probe/think_base/blank/own_minus"] == pytest.approx(
        metrics["probe/think_base/own/reward_mean"] - sum(means) / 3
    )
    assert "| think_base | swapped |" in (run_dir / "thought_probe.md").read_text()


def test_a_derangement_leaves_nothing_in_its_place():
    ids = [f"p{n}" for n in range(9)]
    found = deranged(ids, 3)
    assert sorted(found) == sorted(found.values()) == ids
    assert all(one != other for one, other in found.items()) and found != deranged(ids, 4)
    with pytest.raises(DataError, match="at least 2"):
        deranged(["p"], 3)


def test_done_is_done(folder, done, tmp_path, monkeypatch):
    run_dir, metrics, _ = done
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(LocalRollouts, "_run", None)
    monkeypatch.setattr(ByteReward, "judge", None)
    monkeypatch.setattr(reward_gate, "open_arm", None)
    assert reward_gate.run(configured(folder, tmp_path, "mode.probe=true")) == metrics


def test_killed_anywhere_it_goes_on(folder, done, tmp_path):
    """The judge's process dies in the second arm; of the last line half is lost."""
    calls = []
    judge = ByteReward.judge

    def deadly(self, cases):
        calls.extend(cases)
        if len(calls) > 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(self, cases)

    def job():
        ByteReward.judge = deadly
        reward_gate.run(configured(folder, tmp_path, "mode.probe=false"))

    assert Fork(job, tmp_path / "said.txt").wait() == -signal.SIGKILL
    assert (tmp_path / "arms" / "think_base.jsonl").is_file()
    assert not (tmp_path / "arms" / "think_phase3.jsonl").exists()
    partial = tmp_path / "partial" / "think_phase3.rollouts.jsonl"
    kept = partial.read_bytes()
    assert kept.count(b"\n") == 8, "sampled before it was judged"
    partial.write_bytes(kept[:-30])
    reward_gate.run(configured(folder, tmp_path, "mode.probe=true"))
    for kind in ("arms", "probe"):
        for arm in ARMS:
            rows = zip(rows_of(tmp_path, arm, kind), rows_of(done[0], arm, kind), strict=True)
            for found, wanted in rows:
                for name in ("suffix_logprobs", "thought_logprobs"):
                    assert found.pop(name) == pytest.approx(wanted.pop(name))
                assert found == wanted
    assert (tmp_path / "gate.json").read_bytes() == (done[0] / "gate.json").read_bytes()


def test_what_was_invalid_is_asked_again(folder, done, tmp_path, monkeypatch):
    judge = ByteReward.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByteReward, "judge", lambda self, cases: [
            Judgement(None, "no answer") if place % 3 == 0 else one
            for place, one in enumerate(judge(self, cases))
        ])  # fmt: skip
        reward_gate.run(configured(folder, tmp_path, "mode.probe=false"))
    rows = rows_of(tmp_path, ARMS[0])
    invalid = [row["id"] for row in rows if row["reward"] is None]
    assert invalid and all(row["judge_valid"] == (row["reward"] is not None) for row in rows)
    asked = []
    monkeypatch.setattr(
        ByteReward, "judge", lambda self, cases: asked.extend(cases) or judge(self, cases)
    )
    (tmp_path / "arms" / f"{ARMS[0]}.jsonl").unlink()
    reward_gate.run(configured(folder, tmp_path, "mode.probe=false"))
    assert [case.id for case in asked] == invalid
    assert rows_of(tmp_path, ARMS[0]) == rows_of(done[0], ARMS[0])


def test_another_gate_is_refused(folder, done):
    run_dir = done[0]
    before = (run_dir / "conditions.json").read_bytes()
    changes = {
        "mode.thought_tokens=4": r"sampling\.thought_tokens=3, now 4; allowed: the same, or",
        "seed=2": r"sampling\.seed=1, now 2",
        "reward.salt=b": r'reward\.salt="a", now "b"',
        f"mode.checkpoints.think_base={folder}/think_phase3.ckpt": r"arms\.think_base=",
    }
    for change, message in changes.items():
        with pytest.raises(ConfigError, match=rf"paths\.run_dir=.*: was begun with {message}"):
            reward_gate.run(configured(folder, run_dir, change))
    assert (run_dir / "conditions.json").read_bytes() == before


def test_the_table_is_rebuilt_from_rows_of_two_hosts(done, tmp_path):
    for arm in ARMS:
        for kind in ("arms", "probe"):
            (tmp_path / arm / kind).mkdir(parents=True)
            name = f"{kind}/{arm}.jsonl"
            shutil.copy(done[0] / name, tmp_path / arm / name)
    runs = f"mode.runs=[{tmp_path}/{ARMS[1]},{tmp_path}/{ARMS[0]}]"
    cfg = compose_config("mode=gate_table", runs, "mode.order=[think_base]", run_dir=tmp_path / "t")
    validate(cfg)
    assert gate_table.run(cfg) == done[1]
    for name in ("gate.json", "thought_probe.json", "thought_probe.md"):
        assert (tmp_path / "t" / name).read_bytes() == (done[0] / name).read_bytes()
    assert (tmp_path / "t" / "gate.png").is_file()


def test_a_probe_that_was_broken_off_is_not_taken_for_the_earlier_one(folder, done, tmp_path):
    """Between the rows and what they were asked for the process may die."""
    run_dir = tmp_path / "run"
    shutil.copytree(done[0], run_dir)
    write_json, other = gate_folder.write_json, ("mode.probe=true", "mode.generic=Hm.")

    def dies(path, content):
        if path.parent.name == "probe":
            raise KeyboardInterrupt
        write_json(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_folder, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            reward_gate.run(configured(folder, run_dir, *other, arms=ARMS[:1]))
    reward_gate.run(configured(folder, run_dir, "mode.probe=true"))
    for arm in ARMS:
        assert (run_dir / f"probe/{arm}.jsonl").read_bytes() == (
            done[0] / f"probe/{arm}.jsonl"
        ).read_bytes()


def test_an_arms_own_numbers_know_its_delimiters(done, tmp_path):
    """Three of them are an artifact, in the arm's file as in the gate's."""
    texts = {"thought": "so", "suffix": "so [t] it [t] goes [t] on", "k": 0}
    row = rows_of(done[0], ARMS[0])[0] | texts
    gate_folder.write_arm(tmp_path, "a", [row], ("[t]", "[/t]"))
    assert json.loads((tmp_path / "arms/a.json").read_text())["artifact_rate"] == 1.0
    gate_folder.write_arm(tmp_path, "a", [row], ("<think>", "</think>"))
    assert json.loads((tmp_path / "arms/a.json").read_text())["artifact_rate"] == 0.0


def test_prefixes_of_another_draw_are_not_taken_for_these(folder, tmp_path):
    """A gate that ends early, here for want of a thought, keeps its prefixes and how they came."""
    teacher = tmp_path / "teacher.jsonl"
    teacher.write_text('{"prefix": "p", "thought": "t"}\n')
    given = ("mode.probe=true", f"mode.teacher={teacher}")
    with pytest.raises(DataError, match="no thought for prefix"):
        reward_gate.run(configured(folder, tmp_path / "run", *given))
    assert len(read_prefixes(tmp_path / "run")) == 3
    with pytest.raises(ConfigError, match=r"was begun with sampling\.seed=1, now 2"):
        reward_gate.run(configured(folder, tmp_path / "run", "seed=2"))
    teacher.unlink()
    with pytest.raises(ConfigError, match=r"mode\.teacher=.*teacher\.jsonl: no such file; allowed"):
        reward_gate.run(configured(folder, tmp_path / "other", *given))
    assert not (tmp_path / "other" / "conditions.json").exists()


def test_prefixes_of_other_data_are_not_taken_for_these(folder, done, tmp_path, monkeypatch):
    """Kept prefixes are not drawn again, whatever data the command line names."""
    run_dir = tmp_path / "run"
    shutil.copytree(done[0], run_dir)
    more = ("data=prefix_suffix", f"data.files={folder}/other.txt", "data.chunking.suffix_len=5")
    said = [override.split("=")[0] for override in more]
    monkeypatch.setattr(reward_gate, "overridden_keys", lambda: [*said, "data.cache_dir", "seed"])
    cfg = configured(folder, run_dir, *more)
    assert reward_gate.data_as_said(cfg) == {
        "data": "prefix_suffix", "data.chunking.suffix_len": 5, "data.files": f"{folder}/other.txt",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"begun with prefixes\.said\.data=null, now \"prefix_su"):
        reward_gate.run(cfg)


def test_a_table_of_two_judges_is_none(done, tmp_path):
    conditions = json.loads((done[0] / "conditions.json").read_text())
    for arm, more in zip(ARMS, ({}, {"weights": "raw"}), strict=True):
        (tmp_path / arm / "arms").mkdir(parents=True)
        shutil.copy(done[0] / f"arms/{arm}.jsonl", tmp_path / arm / "arms")
        (tmp_path / arm / "conditions.json").write_text(json.dumps(conditions | more))
    runs = f"mode.runs=[{tmp_path}/{ARMS[0]},{tmp_path}/{ARMS[1]}]"
    cfg = compose_config("mode=gate_table", runs, run_dir=tmp_path / "t")
    gate_table.run(cfg)
    text = (tmp_path / "t" / "gate.md").read_text()
    assert (
        f'- weights: {json.dumps(conditions["weights"])} in {tmp_path}/{ARMS[0]}, "raw" in' in text
    )
    other = conditions | {"reward": {**conditions["reward"], "salt": "b"}}
    (tmp_path / ARMS[1] / "conditions.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r'reward\.salt="b", but "a" in .*; allowed: folders with'):
        gate_table.run(cfg)


def test_tables_that_cannot_be(done, tmp_path):
    cfg = compose_config("mode=gate_table", run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"mode\.runs=.*: no arms/ARM\.jsonl there"):
        gate_table.run(cfg)
    (tmp_path / "arms").mkdir()
    path, rows = tmp_path / "arms" / "a.jsonl", rows_of(done[0], ARMS[0])
    wrong = {
        "has not the samples 0 .. 3": rows[:-1],
        "a second row": [*rows, rows[0]],
        'reward="much"; allowed: a number or null': [{**rows[0], "reward": "much"}],
        "no rows": [],
    }
    for message, content in wrong.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        with pytest.raises(DataError, match=re.escape(message)):
            gate_table.run(cfg)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="arm a is in two folders"):
        read_arms([tmp_path, tmp_path])


REFUSED = {
    "mode.checkpoints=null": r"mode\.checkpoints=null: no arms",
    "mode.checkpoints.think_base=none.ckpt": r"think_base=none\.ckpt: no such file",
    "mode.temperature=0": r"mode\.temperature=0: wrong value; allowed: a number in \(0, inf\)",
    "mode.prefixes=999": r"mode\.prefixes=999: the validation split of data=prefix_suffix has \d+"
    r" rows; allowed: .* or eval\.split=train of a share that nothing was trained on",
    "mode.thought_tokens=3000": r"mode\.thought_tokens=3000 and mode\.suffix_tokens=6: leave no ",
    "mode.open='</think>'": r"mode\.close=</think>: the same as mode\.open; allowed: another one",
    "mode.open=think": r"mode\.open=think: 5 tokens of this model; allowed: a text that is one",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refusals(folder, tmp_path, change):
    with pytest.raises(ValueError, match=REFUSED[change]):
        reward_gate.run(configured(folder, tmp_path, change))
    assert not (tmp_path / "arms").exists()


def test_settings_out_of_range_name_their_keys(folder, tmp_path):
    cfg = configured(folder, tmp_path)
    cfg.mode.temperature = 0.0
    with pytest.raises(
        ConfigError, match=r"^mode\.temperature=0\.0: allowed a number in \(0, inf\)"
    ):
        reward_gate.settings_of(cfg, 0, 1, ())


def test_whole_texts_are_no_prefixes(folder, tmp_path, monkeypatch):
    """A checkpoint that was fine-tuned on texts brings these along."""
    cfg, open_arm = configured(folder, tmp_path), reward_gate.open_arm

    def opened(cfg, path):
        found = open_arm(cfg, path)
        found.cfg.data = {**found.cfg.data, "form": "interleaved"}
        return found

    monkeypatch.setattr(reward_gate, "open_arm", opened)
    message = r"data\.form=interleaved: rows without a prefix .*; allowed: data\.form=prefixes$"
    with pytest.raises(DataError, match=message):
        reward_gate.draw_prefixes(cfg, f"{folder}/{ARMS[0]}.ckpt")


def test_arms_that_are_named_have_to_be_there(folder, done, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(done[0], run_dir)
    one = tmp_path / "one"
    (one / "arms").mkdir(parents=True)
    shutil.copy(run_dir / "arms" / "think_base.jsonl", one / "arms" / "other.jsonl")
    table = ("mode=gate_table", f"mode.runs=[{one}]")
    # 1. Names that the mode has by itself need not be those of arms: it is said.
    metrics = gate_table.run(compose_config(*table, run_dir=tmp_path / "t"))
    said = "go/no-go of arms not compared: there is no arm think_base and no arm think_phase3"
    assert said in capsys.readouterr().out and said in (tmp_path / "t" / "gate.md").read_text()
    assert "go_no_go/phase3_higher_mean_reward" not in metrics
    assert "not compared" not in (done[0] / "gate.md").read_text()
    # 2. Those that the user gives have to be, before anything is sampled.
    monkeypatch.setattr("modes.gate_arms.overridden_keys", lambda: ["mode.base_arm"])
    named = "mode.base_arm=nobody"
    missing = r"mode\.base_arm=nobody: there is no arm nobody; allowed: "
    with pytest.raises(ConfigError, match=missing + "other$"):
        gate_table.run(compose_config(*table, named, run_dir=tmp_path / "t"))
    # An arm of an earlier run in the folder is one of its arms.
    with pytest.raises(ConfigError, match=missing + "think_phase3, think_base$"):
        reward_gate.run(configured(folder, run_dir, named, arms=ARMS[1:]))
    # 3. An order has no name by itself.
    with pytest.raises(
        ConfigError, match=r"mode\.order=\[other,b\]: there is no arm b; allowed: ot"
    ):
        order = ("mode.base_arm=other", "mode.order=[other,b]")
        gate_table.run(compose_config(*table, *order, run_dir=tmp_path / "t"))


def test_without_a_judge(folder, tmp_path):
    cfg = configured(folder, tmp_path)
    cfg.reward = None
    with pytest.raises(ConfigError, match=r"reward=null: nobody judges; allowed: a choice of its"):
        reward_gate.run(cfg)


def test_probes_that_cannot_be(folder, done, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(done[0], run_dir)
    with pytest.raises(ConfigError, match=r"mode\.probe_samples=5: allowed 1 \.\. mode\.samples=4"):
        reward_gate.run(configured(folder, run_dir, "mode.probe=true", "mode.probe_samples=5"))
    teacher = tmp_path / "teacher.jsonl"
    prefixes = read_prefixes(run_dir)
    lines = [{"prefix": prefix.prefix, "thought": f"as {prefix.id}"} for prefix in prefixes]
    given = ("mode.probe=true", "mode.probe_samples=2", f"mode.teacher={teacher}")
    teacher.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(DataError, match=f"no thought for prefix '{prefixes[1].id}'"):
        reward_gate.run(configured(folder, run_dir, *given))
    teacher.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arm = "think_phase3"
    metrics = reward_gate.run(configured(folder, run_dir, *given, arms=[arm]))
    probe = rows_of(run_dir, arm, "probe")
    assert [row["thought"] for row in probe if row["condition"] == "teacher"] == [
        f"as {prefix.id}" for prefix in prefixes for _ in range(2)
    ]
    assert {row["k"] for row in probe} == {0, 1}
    assert {"probe/think_phase3/teacher/own_minus", "probe/think_base/blank/oracle"} <= set(metrics)
