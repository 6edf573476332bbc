"""Recipes of thinking mid-training: their numbers, their chain, their twins, texts to tables."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from objectives.schedules import cosine_warmup
from runtime.run import load_summary
from runtime.trainer import accumulation_steps
from runtime.validation import validate
from tests.support import ROOT, compose_config, environment

FOLDER = ROOT / "scripts" / "thinking"
RECIPES = ("thoughts", "phase3", "sft", "rlmt", "gate", "eval")
STARTS = ("think_base", "think_phase3")
TRAININGS = (
    "base", "phase3", "sft_raw_base", *(f"sft_{arm}" for arm in STARTS),
    *(f"rlmt_{arm}" for arm in STARTS),
)  # fmt: skip
JUDGE = {
    "phase3": ["judge.backend.generator.model=a"],
    "rlmt_think_base": ["reward.backend.generator.model=a"],
    "rlmt_think_phase3": ["reward.backend.generator.model=a"],
}


def config(name: str, *overrides: str) -> DictConfig:
    """A training in its own folder."""
    chosen = (f"experiment=thinking/{name}", *JUDGE.get(name, []), *overrides)
    cfg = compose_config(*chosen, run_dir="${paths.recipe_dir}/elsewhere")
    OmegaConf.resolve(cfg)
    return cfg


def test_scripts_can_be_parsed():
    for path in FOLDER.glob("*.sh"):
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), path
        assert path.name == "recipe.sh" or path.stat().st_mode & 0o100, path
    named = re.search(r"for recipe in (.*); do", (FOLDER / "all.sh").read_text())
    assert named is not None and tuple(named[1].split()) == RECIPES
    assert {path.stem for path in FOLDER.glob("*.sh")} == {*RECIPES, "recipe", "all"}


@pytest.mark.parametrize("name", TRAININGS)
def test_numbers_that_all_trainings_share(name):
    cfg = config(name)
    assert (cfg.model.source, cfg.model.mask_token) == ("Qwen/Qwen3-0.6B-Base", 151669)
    assert (cfg.training.ema, cfg.trainer.precision, cfg.trainer.devices) == (0, "bf16-mixed", 1)
    assert cfg.lr_scheduler.name == "cosine_warmup"


def test_phase_3():
    cfg = config("phase3")
    cut = cfg.data.chunking
    assert (cut.mode, cut.prefix_len, cut.suffix_len, cut.min_source_tokens) == (
        "fixed", 384, 128, 640,
    )  # fmt: skip
    assert cfg.model.length == 384 + 128
    algo = cfg.algo
    assert (algo.name, algo.samples, algo.suffix_tokens, algo.beta) == ("online_dpo", 16, 128, 0.1)
    assert (algo.temperature, algo.top_p, algo.reference.kind) == (1.0, 1.0, "frozen")
    assert (algo.tournament, algo.orders, algo.pairing) == ("full", "one", "best_worst")
    assert algo.candidates.original and algo.candidates.rewrite is None
    assert cfg.loader.global_batch_size == 4 * 4
    assert (cfg.trainer.max_steps, cfg.trainer.gradient_clip_val) == (2000, 1.0)
    assert (cfg.optim.lr, cfg.optim.weight_decay) == (5e-6, 0.1)
    assert (cfg.lr_scheduler.warmup_steps, cfg.lr_scheduler.floor) == (100, 0.1)
    asked = cfg.judge.backend.settings
    assert (asked.temperature, asked.top_p, asked.max_new_tokens, cfg.judge.repeats) == (
        0.7, 0.6, 64, 1,
    )  # fmt: skip


def test_fine_tuning():
    arms = {arm: config(f"sft_{arm}") for arm in ("raw_base", *STARTS)}
    for cfg in arms.values():
        assert (cfg.algo.name, cfg.data.name, cfg.data.share) == ("sft_thoughts", "thoughts", "sft")
        assert (cfg.optim.lr, cfg.optim.weight_decay) == (5e-6, 0.1)
        assert (cfg.loader.batch_size, accumulation_steps(cfg), cfg.data.documents_per_row) == (
            4, 4, 1,
        )  # fmt: skip
        assert set(cfg.algo.weights.values()) == {1.0}
        # 8,192 rows of training and 512 of validation, and how many of all they are.
        assert round(8704 * cfg.data.valid_fraction) == 512
        assert round(8704 / cfg.data.shares.sft) == 14507
    assert [cfg.data.form for cfg in arms.values()] == ["raw", "interleaved", "interleaved"]
    assert [cfg.trainer.max_steps for cfg in arms.values()] == [657, 512, 512]
    assert 512 * 16 == 8192 and 657 * 16 * 384 == 4_036_608
    # The published arms differ by less than a step of either.
    assert abs(4_036_608 - 4_035_285) < 16 * 384


@pytest.mark.parametrize("arm", STARTS)
def test_rlmt(arm):
    cfg = config(f"rlmt_{arm}")
    algo = cfg.algo
    assert (algo.name, algo.samples, algo.thought_tokens, algo.suffix_tokens) == (
        "rlmt_seed", 16, 48, 128,
    )  # fmt: skip
    assert (algo.temperature, algo.top_p, algo.updates) == (1.0, 0.95, 1)
    assert (algo.kl.coefficient, algo.clip_low, algo.reference.kind) == (0.02, 0.2, "frozen")
    assert (algo.advantage, algo.ratio, algo.aggregation, algo.kl.level) == (
        "grpo", "sequence", "sequence_mean", "sequence",
    )  # fmt: skip
    assert (cfg.loader.global_batch_size, cfg.trainer.max_steps) == (2, 200)
    assert (cfg.optim.lr, cfg.optim.weight_decay) == (1e-7, 0)
    assert cfg.trainer.gradient_clip_val == 0.1
    assert (cfg.lr_scheduler.warmup_steps, cfg.lr_scheduler.floor) == (2, 0)
    assert (cfg.data.share, cfg.data.form) == ("rlmt", "prefixes")
    assert (cfg.data.min_prefix, cfg.data.min_suffix) == (128, 64)
    asked = cfg.reward.backend.settings
    assert (asked.temperature, asked.top_p, asked.max_new_tokens) == (0.7, 0.6, 64)
    assert cfg.reward.max_characters == 2000
    assert cfg.training.from_pretrained == f"{cfg.paths.recipe_dir}/sft/{arm}/checkpoints/last.ckpt"
    paper = config(f"rlmt_{arm}", "algo=rlmt_paper").algo
    assert (paper.name, paper.advantage, paper.ratio, paper.top_p) == (
        "rlmt_paper", "dr_grpo", "token", 1.0,
    )  # fmt: skip
    assert (paper.thought_tokens + paper.suffix_tokens, paper.aggregation) == (176, "constant")
    assert (paper.samples, paper.kl.coefficient) == (16, 0.02)


def test_trainings_find_each_other():
    """Each writes a folder of its own, and begins with one that another writes."""
    folders, starts = {}, {}
    for name in TRAININGS:
        cfg, place = config(name), ROOT / "configs" / "experiment" / "thinking" / f"{name}.yaml"
        own: Any = OmegaConf.to_container(OmegaConf.load(place), resolve=False)
        cfg.paths.run_dir = own["paths"]["run_dir"]
        folders[name] = cfg.paths.run_dir.removeprefix(f"{cfg.paths.recipe_dir}/")
        starts[name] = cfg.training.from_pretrained
    assert folders == {
        "base": "base", "phase3": "phase3", "sft_raw_base": "sft/raw_base",
        **{f"sft_{arm}": f"sft/{arm}" for arm in STARTS},
        **{f"rlmt_{arm}": f"rlmt_seed/{arm}" for arm in STARTS},
    }  # fmt: skip
    assert [starts[name] for name in TRAININGS[:4]] == [None] * 4
    for name, before in (("sft_think_phase3", "phase3"), ("rlmt_think_base", "sft_think_base"),
                         ("rlmt_think_phase3", "sft_think_phase3")):  # fmt: skip
        assert starts[name].endswith(f"/{folders[before]}/checkpoints/last.ckpt")


@pytest.mark.parametrize("name", TRAININGS)
def test_twins_change_size_alone(name):
    """A twin has the algorithm, the form of the data and the start of what it is the twin of."""
    small, large = config(f"{name}_smoke"), config(name)
    assert (small.model.name, small.trainer.accelerator) == ("tiny_thinker", "cpu")
    keys = ("algo.name", "algo.advantage", "algo.beta", "algo.reference", "algo.kl", "data.name",
            "data.share", "data.form", "data.chunking.mode", "optim", "lr_scheduler.floor",
            "trainer.gradient_clip_val")  # fmt: skip
    for key in keys:
        assert OmegaConf.select(small, key) == OmegaConf.select(large, key), key
    assert (small.training.from_pretrained is None) == (large.training.from_pretrained is None)
    for group in ("judge", "reward"):
        assert (small.get(group) is None) == (large.get(group) is None)


WRITING = {"CHECKPOINTS": "checkpoints"}


class Shell:
    """The recipes with a Python that only notes what it is told, and leaves a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.calls = folder, folder / "out", folder / "calls"
        self.python = folder / "python"
        self.python.write_text(
            '#!/bin/bash\n(IFS=$\'\\x1f\' && echo "$*" >>"$CALLS")\n'
            'for one in "$@"; do [[ $one == paths.run_dir=* ]] && folder=${one#*=}; done\n'
            'mkdir -p "$folder/$CHECKPOINTS"\n'
            '[ -z "$CHECKPOINTS" ] || touch "$folder/$CHECKPOINTS/last.ckpt"\n'
            "exit ${STATUS:-0}\n"
        )
        self.python.chmod(0o755)

    def __call__(self, *command: str, **variables: str) -> tuple[subprocess.CompletedProcess, list]:
        """What became of a command, and the overrides of every call of main.py."""
        settings = {"PYTHON": str(self.python), "OUT": str(self.out), "CALLS": str(self.calls)}
        done = subprocess.run(
            command, capture_output=True, text=True,
            env=environment(**settings, **{"CHECKPOINTS": "", **variables}),
        )  # fmt: skip
        calls = self.calls.read_text().splitlines() if self.calls.is_file() else []
        self.calls.unlink(missing_ok=True)
        return done, [line.split("\x1f")[1:] for line in calls]

    def stages(self, line: str, **variables: str) -> tuple[subprocess.CompletedProcess, list]:
        """The same of calls of `stage`."""
        return self("bash", "-c", f"source {FOLDER}/recipe.sh; {line}", **variables)


def test_a_stage_is_run_once(tmp_path):
    shell = Shell(tmp_path)
    assert shell.stages("stage a -- mode=x", STATUS="3")[0].returncode == 3
    place = f"paths.run_dir={shell.out}"
    assert shell.stages("stage a -- mode=x 'b=1 2'")[1] == [[f"{place}/a", "mode=x", "b=1 2"]]
    done, calls = shell.stages("stage a -- mode=x 'b=1 2'")
    assert "a: done" in done.stdout and not calls
    assert not shell.stages("stage a -- mode=x judge.base_url=http://elsewhere 'b=1 2'")[1]
    assert len(shell.stages("stage a -- mode=y")[1]) == 1
    early, _ = shell.stages("stage c b -- mode=x")
    assert early.returncode == 1 and f"{shell.out}/b: not done yet" in early.stderr
    assert len(shell.stages("for n in b 'c b' 'c b'; do stage $n -- mode=x; done")[1]) == 2
    # What it needs was done anew.
    (shell.out / "b" / "done").unlink()
    assert len(shell.stages("stage b -- mode=x; stage c b -- mode=x")[1]) == 2


def test_a_training_is_not_gone_on_with_under_other_overrides(tmp_path):
    shell = Shell(tmp_path)
    first = shell.stages("stage a -- experiment=x", **WRITING, LAUNCH="env LAUNCHED=1")
    assert len(first[1]) == 1
    other, calls = shell.stages("stage a -- experiment=x optim.lr=1")
    assert other.returncode == 1 and "with other overrides" in other.stderr and not calls
    # One that was broken off is no matter of this file: main.py goes on with it or refuses.
    (shell.out / "a" / "done").unlink()
    assert len(shell.stages("stage a -- experiment=x optim.lr=1")[1]) == 1


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """What the recipes ask main.py for, by the folder that it goes to."""
    shell = Shell(tmp_path_factory.mktemp("commands"))
    server = {"JUDGE_URL": "http://judge/v1", "JUDGE_MODEL": "a judge", "GPQA": "gpqa.csv"}
    done, calls = shell(str(FOLDER / "all.sh"), **WRITING, **server)
    assert done.returncode == 0, done.stderr
    refused, _ = shell(str(FOLDER / "rlmt.sh"), **WRITING, PRESET="rlmt_paper")
    assert refused.returncode == 1 and "JUDGE_MODEL" in refused.stderr
    for recipe in ("rlmt", "gate", "eval"):
        done, more = shell(str(FOLDER / f"{recipe}.sh"), **WRITING, PRESET="rlmt_paper", **server)
        assert done.returncode == 0, done.stderr
        calls += more
    return {call[0].removeprefix(f"paths.run_dir={shell.out}/"): call for call in calls}


def test_what_is_run(commands):
    """The published arms, each once, and the variant beside them without a second fine-tuning."""
    tuned = [f"{arm}{end}" for arm in STARTS for end in ("", "_rlmt")]
    assert list(commands)[:20] == [
        "thoughts", "base", "phase3", "continuation",
        *(f"{part}/{arm}" for arm in ("raw_base", *STARTS) for part in ("sft", "sft_eval")),
        "sft_table", *(f"rlmt_seed/{arm}" for arm in STARTS), "rlmt_table/rlmt", "gate/rlmt",
        *(f"answers/{arm}" for arm in tuned), "reasoning/rlmt",
    ]  # fmt: skip
    assert list(commands)[20:] == [
        *(f"rlmt_paper/{arm}" for arm in STARTS), "rlmt_table/rlmt_paper", "gate/rlmt_paper",
        *(f"answers/{arm}_rlmt_paper" for arm in STARTS), "reasoning/rlmt_paper",
    ]  # fmt: skip


def composed(commands: dict[str, list[str]], name: str) -> DictConfig:
    """A command's configuration, after main.py's checks."""
    cfg = compose_config(*commands[name])
    validate(cfg)
    return cfg


def test_commands_of_trainings(commands):
    cfg = composed(commands, "rlmt_paper/think_phase3")
    out = cfg.paths.recipe_dir
    assert cfg.paths.run_dir == f"{out}/rlmt_paper/think_phase3"
    assert cfg.training.from_pretrained == f"{out}/sft/think_phase3/checkpoints/last.ckpt"
    assert cfg.data.files == f"{out}/thoughts/rows.jsonl"
    asked = cfg.reward.backend.generator
    assert (cfg.algo.name, asked.base_url, asked.model) == (
        "rlmt_paper", "http://judge/v1", "a judge",
    )  # fmt: skip
    cfg = composed(commands, "phase3")
    assert cfg.data.files == f"{out}/corpus/phase3/*.jsonl"
    assert cfg.judge.backend.generator.model == "a judge"


def test_commands_of_data_and_continuations(commands):
    cfg = composed(commands, "thoughts")
    mode = cfg.mode
    assert (mode.name, mode.backend.name, mode.backend.model) == (
        "insert_thoughts", "server", "a judge",
    )  # fmt: skip
    assert (mode.temperature, mode.top_p, mode.max_new_tokens) == (0.6, 0.95, 1536)
    limits = mode.annotator.limits
    assert (limits.min_thoughts, limits.max_thoughts) == (3, 6)
    assert round(mode.passage_words * 1.3) == 512
    cfg = composed(commands, "continuation")
    assert (cfg.mode.protocol, cfg.eval.limit_rows, cfg.mode.max_new_tokens) == (
        "seed_random_swap", 128, 128,
    )  # fmt: skip
    assert cfg.mode.against.endswith("/base/checkpoints/last.ckpt")


def test_command_of_the_gate(commands):
    cfg = composed(commands, "gate/rlmt")
    mode = cfg.mode
    assert (mode.prefixes, mode.samples, mode.thought_tokens, mode.suffix_tokens) == (
        64, 16, 48, 128,
    )  # fmt: skip
    assert (mode.temperature, mode.top_p, mode.probe, mode.dtype) == (1.0, 0.95, True, None)
    assert (cfg.data.share, cfg.data.form, cfg.data.min_prefix, cfg.data.min_suffix) == (
        "gate", "prefixes", 128, 64,
    )  # fmt: skip
    # Shares are those of the trainings, or the gate would see what these have seen.
    assert cfg.data.shares == config("rlmt_think_base").data.shares
    assert list(mode.checkpoints) == [*STARTS, *(f"{arm}_rlmt" for arm in STARTS)]
    places = [path.split("/")[-4:-2] for path in mode.checkpoints.values()]
    assert places == [[stage, arm] for stage in ("sft", "rlmt_seed") for arm in STARTS]


def test_commands_of_the_benchmarks(commands):
    cfg = composed(commands, "answers/think_base_rlmt")
    mode, benchmarks = cfg.mode, cfg.benchmark
    assert (mode.samples, mode.temperature, mode.top_p, mode.max_new_tokens) == (8, 0.6, 0.95, 512)
    assert list(benchmarks) == ["gsm8k", "math500", "gpqa_diamond", "olympiad_bench"]
    gpqa = benchmarks.gpqa_diamond
    # All 198 are asked, which is what 1584 samples are.
    assert (benchmarks.gsm8k.shots, gpqa.shots, gpqa.prompts.expected * 8) == (2, 0, 1584)
    assert "Answer: " in gpqa.template and gpqa.prompts.table.files == "gpqa.csv"
    assert cfg.eval.checkpoint_path.endswith("/rlmt_seed/think_base/checkpoints/last.ckpt")
    cfg = composed(commands, "reasoning/rlmt")
    assert list(cfg.mode.arms) == ["think_base", "think_base_rlmt", "think_phase3",
                                   "think_phase3_rlmt"]  # fmt: skip
    assert [list(pair) for pair in cfg.mode.comparisons] == [
        ["think_base_rlmt", "think_base"], ["think_phase3_rlmt", "think_phase3"],
        ["think_phase3_rlmt", "think_base_rlmt"], ["think_phase3", "think_base"],
    ]  # fmt: skip


def test_what_bf16_would_round_away():
    """What gate.sh gives as its reason: steps of Adam on a weight of 0.02, along the schedule."""
    moved = sum(1e-7 * cosine_warmup(step, 200, warmup_steps=2) for step in range(200))
    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    below = torch.nextafter(weight, torch.zeros_like(weight))
    assert moved < float(weight) / 1000 and moved < float(weight - below) / 4


def run_all(out: Path, **variables: str) -> None:
    settings = {
        "SMOKE": "1", "OUT": str(out), "PYTHON": sys.executable,
        "PALIMPSEST_CACHE": str(out.parent / "cache"), **variables,
    }  # fmt: skip
    done = subprocess.run(
        [str(FOLDER / "all.sh")], env=environment(**settings), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def numbers(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke_twins_run_the_whole_recipe(tmp_path):
    """From texts to the gate and the benchmarks; a second call finds everything done."""
    out = tmp_path / "out"
    run_all(out)
    trained = {"base": 1, "phase3": 4, "sft/raw_base": 6}
    trained |= {f"{stage}/{arm}": 4 for stage in ("sft", "rlmt_seed") for arm in STARTS}
    for folder, steps in trained.items():
        summary = load_summary(out / folder)
        assert (summary["status"], summary["steps"]) == ("done", steps), folder
    four = {*STARTS, *(f"{arm}_rlmt" for arm in STARTS)}
    gate = load_summary(out / "gate" / "rlmt")["metrics"]
    assert {name.split("/")[1] for name in gate if name.startswith("gate/")} == four
    assert {name.split("/")[1] for name in gate if name.startswith("probe/")} == four
    reasoning = numbers(out / "reasoning" / "rlmt" / "reasoning_table.json")
    assert {row["arm"] for row in reasoning["rows"]} == four
    arms = [row["arm"] for row in numbers(out / "sft_table" / "sft_table.json")["arms"]]
    assert arms == ["raw_base", *STARTS]
    rlmt = numbers(out / "rlmt_table" / "rlmt" / "rlmt_table.json")
    assert [row["arm"] for row in rlmt["rows"]] == list(STARTS)
    assert load_summary(out / "continuation")["status"] == "done"
    notes = {path: path.stat().st_mtime_ns for path in out.rglob("done")}
    assert len(notes) == 20
    run_all(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("done")} == notes
