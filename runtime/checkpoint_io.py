"""Lightning's door to checkpoints: files as ever, and full states as folders."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from runtime.checkpoint import read_checkpoint
from runtime.full_state import is_full_state, step_of, write_full_state


class FolderCheckpointIO(TorchCheckpointIO):
    """Writes a folder where the path is named as one (`full_state.folder_name`), else a file.

    Strategies that shard the weights do not use it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save what Lightning gathered."""
        if step_of(Path(path)) is None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_full_state(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read it back; a folder as data, whatever `weights_only` says."""
        if not is_full_state(Path(path)):
            return super().load_checkpoint(path, map_location, weights_only)
        # A function as map_location loads copies: the state of a run must outlive its folder.
        return read_checkpoint(path, map_location)
