"""Metrics to trackio, the local-first experiment tracker (`pip install trackio`)."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class TrackioLogger(Logger):
    """Logs to a trackio project; nothing leaves the machine unless `space_id` names a Space.

    Args:
        project: project to log into.
        run_name: name of the run; trackio invents one for null.
        space_id: Hugging Face Space to sync to, or null for local files only.
    """

    def __init__(
        self, project: str, run_name: str | None = None, space_id: str | None = None
    ) -> None:
        super().__init__()
        self._project, self._run_name, self._space_id = project, run_name, space_id
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str:
        """The run."""
        return self._run_name or ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one row; the run is opened by the first one."""
        if self._run is None:
            self._run = self._open()
        self._run.log(dict(metrics), step=None if step is None else step + 1)

    def _open(self) -> Any:
        import trackio

        return trackio.init(
            project=self._project, name=self._run_name, space_id=self._space_id, resume="allow"
        )

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
