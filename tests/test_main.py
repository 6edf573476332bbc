"""The command line: exit codes, one-line errors, help in no time, sweeps."""

import resource
from functools import partial

import pytest

from runtime.messages import explain
from runtime.run import SUMMARY_KEYS, load_summary
from tests.forks import fork_main
from tests.support import run_main

MODE = ("mode._target_=tests.plugins.endings.run", "trainer=cpu")


def ends(main, tmp_path, ending, **variables):
    return main(*MODE, f"+mode.ending={ending}", f"paths.run_dir={tmp_path}", **variables)


@pytest.fixture
def forked(tmp_path):
    return partial(fork_main, said=tmp_path / "said.txt")


@pytest.mark.parametrize(
    ("ending", "code", "status", "line"),
    [
        ("data", 2, "failed", "DataError: corpus.txt: line 3: not UTF-8"),
        ("checkpoint", 2, "failed", "CheckpointError: a.ckpt: no such checkpoint"),
        ("nonfinite", 3, "nonfinite", "NonFiniteError: non-finite loss at step 5, rows [1, 2]"),
        ("SIGTERM", 143, "interrupted", "Interrupted: stopped by SIGTERM"),
        ("SIGINT", 130, "interrupted", "Interrupted: stopped by SIGINT"),
    ],
)
def test_what_was_foreseen_ends_in_one_line(tmp_path, call, forked, ending, code, status, line):
    done = ends(forked if ending.startswith("SIG") else call, tmp_path, ending)
    assert (done.returncode, done.stderr.strip()) == (code, line)
    summary = load_summary(tmp_path)
    assert summary["status"] == status and summary["error"] == line


def test_a_run_that_is_done(tmp_path):
    done = ends(run_main, tmp_path, "well")
    assert done.returncode == 0 and done.stderr == ""
    summary = load_summary(tmp_path)
    assert tuple(summary) == SUMMARY_KEYS and summary["status"] == "done"
    assert (tmp_path / "config.yaml").is_file()


def test_a_bug_shows_its_traceback_and_exits_1(tmp_path, call):
    done = ends(call, tmp_path, "bug")
    assert done.returncode == 1
    assert "ZeroDivisionError: a mistake" in done.stderr and "endings.py" in done.stderr
    assert load_summary(tmp_path)["status"] == "failed"


def test_full_error_shows_the_traceback_of_what_was_foreseen(tmp_path, call):
    done = ends(call, tmp_path, "data", HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "endings.py" in done.stderr


@pytest.mark.parametrize(
    ("message", "cause", "line"),
    [
        ("a.json: no loss", "no loss", "a.json: no loss"),
        ("a.json: no; loss", "no\n  loss", "a.json: no; loss"),
        ("cannot be built", "no loss", "cannot be built; no loss"),
        ("alone", None, "alone"),
    ],
)
def test_a_cause_is_said_once(message, cause, line):
    error = ValueError(message)
    error.__cause__ = None if cause is None else KeyboardInterrupt(cause)
    assert explain(error) == line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["modle=tiny"],
            ["modle=tiny: no such key; did you mean mode", "block_size, bon, callbacks"],
        ),
        (["training.emma=0.5"], ["training.emma=0.5", "did you mean ema", "antithetic_sampling"]),
        (["model=huge"], ["model=huge: no such option; allowed: medium, nano, qwen3_0p6b, qwen3"]),
        (["experiment=nothing"], ["experiment=nothing: no such option", "bd3lm_cosine"]),
        (["seed=[1"], ["seed=[1: cannot be read"]),
        (["seed"], ["seed: cannot be read", "KEY=VALUE"]),
        (["+model=tiny"], ["model"]),
        (["reward=null"], ["reward=null: not the name of a choice", "reward=NAME, or ~reward for"]),
        (
            ["judge=7"],
            ["judge=7: not the name of a choice; allowed: judge=NAME, or ~judge for none"],
        ),
        (["+algo/rewrite=null"], ["+algo/rewrite=null: ", "algo/rewrite=NAME, or leave it out"]),
        (["block_size=24"], ["block_size=24: does not divide model.length=128; allowed: 1, 2, 4"]),
        (["noise._target_=os.system"], ["noise._target_=os.system: not an allowed target"]),
        (["mode=audit"], ["mode.run=???"]),
        (["mode._target_=modes.nothing.run"], ["mode._target_=modes.nothing.run"]),
        (["--resolve"], ["--resolve"]),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(tmp_path, call, arguments, parts):
    fixed = [] if arguments[0].startswith("-") else [f"paths.run_dir={tmp_path}", "trainer=cpu"]
    done = call(*arguments, *fixed)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not (tmp_path / "summary.json").exists()


def test_help_is_short_useful_and_fast():
    seconds = []
    # CPU seconds, which a busy machine lengthens, too: the best of a few tries.
    while not seconds or (min(seconds) >= 2.0 and len(seconds) < 5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_main("--help", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 60
    for part in (
        "python main.py",
        "algo: ar, bd3lm, dflash, draft_refine, masked_adapt, mdlm, nce, online_dpo",
        "mode: acceptance_eval",
        "trainer: auto, cpu",
    ):
        assert part in done.stdout
    assert min(seconds) < 2.0


def test_main_imports_nothing_heavy():
    import subprocess
    import sys

    from tests.support import ROOT, environment

    code = (
        "import main, sys; heavy = {'torch', 'lightning', 'transformers', 'pyarrow', 'numpy',"
        " 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--cfg", "job"], "run_dir: ${.output_dir}"),
        (["--cfg", "job", "--resolve"], "run_dir: outputs/train/mdlm/"),
        (["--info", "defaults-tree"], "algo: mdlm"),
        (["-sc", "install=bash"], "complete"),
        (["--version"], "."),
    ],
)
def test_hydra_commands_work(call, arguments, part):
    main = run_main if arguments[-1] == "job" else call  # the former needs a second
    done = main(*arguments, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert part in done.stdout


def sweep(main, tmp_path, *arguments):
    return main("--multirun", *MODE, f"hydra.sweep.dir={tmp_path}", *arguments)


def test_a_sweep_gives_every_run_its_folder(tmp_path, call):
    done = sweep(call, tmp_path, "+mode.ending=well", "seed=1,2")
    assert done.returncode == 0, done.stderr
    assert [load_summary(tmp_path / str(n))["status"] for n in (0, 1)] == ["done", "done"]


def test_a_sweep_outlives_a_bad_run_and_reports_it(tmp_path, call):
    done = sweep(call, tmp_path, "+mode.ending=nonfinite,well")
    assert done.returncode == 3
    statuses = [load_summary(tmp_path / str(n))["status"] for n in (0, 1)]
    assert statuses == ["nonfinite", "done"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("ending", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupt_ends_the_whole_sweep(tmp_path, forked, ending, code):
    done = sweep(forked, tmp_path, f"+mode.ending={ending},well")
    assert done.returncode == code
    assert (tmp_path / "0" / "summary.json").exists()
    assert not (tmp_path / "1" / "summary.json").exists()


def test_optuna_gets_the_optimised_metric(tmp_path, call):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = call(
        *MODE,
        "hparams_search=optuna",
        "hydra.sweeper.n_trials=2",
        f"hydra.sweep.dir={tmp_path}",
        "+mode.ending=well",
    )
    assert done.returncode == 0, done.stderr
    assert "best_value" in (tmp_path / "optimization_results.yaml").read_text()
