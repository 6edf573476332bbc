"""A mode that trains a toy through the real trainer, callbacks and run folder, in a second.

The toy draws dropout from the global generators, so it resumes exactly only if they do.
"""

import time
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from modes.train import fit
from runtime.checkpoint import provenance
from runtime.errors import NonFiniteError
from runtime.trainer import resume_point

WIDTH = 4


class Rows(Dataset):
    """Row i is a fixed function of i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.sin(torch.arange(WIDTH) * (index + 1.0))


class FromStep:
    """The batches of a run from a step on; its length is that of the whole run."""

    def __init__(self, loader: DataLoader, total: int) -> None:
        self.loader, self.total = loader, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Any:
        return iter(self.loader)


class ToyData(L.LightningDataModule):
    """Rows in order, each rank its share of every global batch."""

    fingerprint = "toy"

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def train_dataloader(self) -> FromStep:
        trainer, size = self.trainer, self.cfg.loader.global_batch_size
        share = size // trainer.world_size
        micro = share // trainer.accumulate_grad_batches
        first = trainer.global_step
        order = [
            list(range(step * size + trainer.global_rank * share + start, step * size
                       + trainer.global_rank * share + start + micro))
            for step in range(first, trainer.max_steps)
            for start in range(0, share, micro)
        ]  # fmt: skip
        rows = Rows(trainer.max_steps * size)
        loader = DataLoader(rows, batch_sampler=order, num_workers=self.cfg.loader.num_workers)
        return FromStep(loader, trainer.max_steps * trainer.accumulate_grad_batches)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Rows(8), batch_size=4)


class ToyModel(L.LightningModule):
    """A regression with dropout and a learning rate that falls."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        steps = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.0, 1 - k / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        if step == self.cfg.mode.fail_at:
            raise NonFiniteError(f"non-finite loss at step {step}", step)
        time.sleep(self.cfg.mode.pause)
        loss = (self.net(x).squeeze(-1) - x.sum(-1)).square().mean()
        self.log("train/loss", loss, sync_dist=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        loss = (self.net(x).squeeze(-1) - x.sum(-1)).square().mean()
        self.log("val/nll", loss, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = {"config": {}}
        checkpoint["provenance"] = provenance(self.cfg, "toy")


def run(cfg: DictConfig) -> dict[str, float]:
    """Train the toy as `modes.train` trains an algorithm."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    model = ToyModel(cfg)
    metrics = fit(cfg, model, ToyData(cfg), resume_point(cfg))
    return metrics
