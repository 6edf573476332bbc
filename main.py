"""Palimpsest: compose a configuration, check it, run one mode.

Exit codes: 0 done; 1 an unexpected error or a failed audit; 2 bad configuration, data or
checkpoint; 3 non-finite loss; 143 or 130 stopped by SIGTERM or SIGINT.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from data.errors import DataError
from runtime.config import ROOT, allow_plugins, locate
from runtime.devices import global_rank
from runtime.errors import AuditError, CheckpointError, ConfigError, Interrupted, NonFiniteError
from runtime.memory import keep_freed_memory
from runtime.messages import explain
from runtime.run import RunFolder
from runtime.validation import check_resolved, validate

FULL_ERROR = "HYDRA_FULL_ERROR"
_USERS_FULL_ERROR = os.environ.get(FULL_ERROR)
# Hydra copies the store of its own options for every group that --help lists, which takes more time
# than all else; what it takes out of the store it copies again.
ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]


class JobFailed(Exception):
    """A job of a sweep failed; what happened has been reported. `args` is (exit code,)."""


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def job(cfg: DictConfig) -> float | None:
    """One run; in a sweep, one of many, which returns the value to optimise."""
    with _full_error(_USERS_FULL_ERROR), _signals_raise():
        try:
            return run(cfg)
        except Interrupted as stop:
            # SystemExit is no Exception: it ends a whole sweep instead of failing one job.
            raise SystemExit(_report(stop, stop.exit_code)) from stop
        except Exception as error:
            code = _report(error, _exit_code(error))
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise JobFailed(code) from error
            raise SystemExit(code) from error


def run(cfg: DictConfig) -> float | None:
    """Check the configuration, then run its mode inside a run folder."""
    _refuse_shared_folder()
    cfg.paths.run_dir = HydraConfig.get().runtime.output_dir
    cfg.checkpointing.save_dir = cfg.checkpointing.save_dir or cfg.paths.run_dir
    check_resolved(cfg)
    allow_plugins(cfg.plugins)
    validate(cfg)
    mode = locate(cfg.mode._target_, "mode._target_")
    if global_rank() > 0:
        # Of a mode that uses one process, the others have nothing to do.
        metrics = {} if cfg.mode.get("single_process", False) else mode(cfg)
        return metrics.get(cfg.optimized_metric)
    folder = RunFolder(cfg)
    folder.open()
    try:
        metrics = mode(cfg)
    except BaseException as error:
        folder.close(error=error)
        raise
    folder.close(metrics)
    if cfg.optimized_metric and cfg.optimized_metric not in metrics:
        raise ConfigError(
            f"optimized_metric={cfg.optimized_metric}: mode={cfg.mode.name} has no such metric;"
            f" allowed: {', '.join(sorted(metrics))}"
        )
    return metrics.get(cfg.optimized_metric)


def _refuse_shared_folder() -> None:
    """Every job of a sweep has a folder of its own, which `paths.run_dir` cannot name."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return
    for override in hydra_config.overrides.task:
        key, _, value = override.partition("=")
        if key.lstrip("+") in ("paths.run_dir", "checkpointing.save_dir"):
            raise ConfigError(
                f"{key}={value}: the jobs of a sweep cannot share a folder; allowed:"
                " hydra.sweep.dir=FOLDER, in which each one gets its own"
            )


def main() -> int:
    """Run the command line; returns the exit code."""
    keep_freed_memory()
    try:
        # With this variable Hydra raises its errors instead of printing several lines.
        with _full_error("1"):
            job()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except JobFailed as failure:
        return failure.args[0]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _report(error, 2)
    return 0


def _exit_code(error: Exception) -> int:
    if isinstance(error, ConfigError | CheckpointError | NonFiniteError | AuditError):
        return error.exit_code
    if isinstance(error, DataError) or (isinstance(error, ValueError) and _is_ours(error)):
        return 2
    return 1


def _is_ours(error: Exception) -> bool:
    """Whether the line that raised belongs to this project, whose ValueErrors are for users."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    return file.is_relative_to(ROOT) and "site-packages" not in file.parts


def _report(error: BaseException, code: int) -> int:
    """Print one line for what was foreseen, a traceback for what was not; returns the code."""
    foreseen = code != 1 or isinstance(error, AuditError)
    if _USERS_FULL_ERROR == "1" or not foreseen:
        traceback.print_exception(error)
    else:
        print(f"{type(error).__name__}: {explain(error)}", file=sys.stderr)
    # Lightning kills the main process when a process it launched ends with an error. What all
    # ranks agreed on is for the main process to tell.
    agreed = isinstance(error, Interrupted | NonFiniteError)
    return 0 if agreed and _launched_by_lightning() else code


def _launched_by_lightning() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().job.name.startswith("train_ddp_process_")


@contextmanager
def _full_error(value: str | None) -> Iterator[None]:
    """Inside, HYDRA_FULL_ERROR has this value (None: it is not set)."""
    before = os.environ.get(FULL_ERROR)
    _set_full_error(value)
    try:
        yield
    finally:
        _set_full_error(before)


def _set_full_error(value: str | None) -> None:
    os.environ.pop(FULL_ERROR, None)
    if value is not None:
        os.environ[FULL_ERROR] = value


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise Interrupted; during training, GracefulStop replaces this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # data loader workers inherit the handler
            raise Interrupted(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
