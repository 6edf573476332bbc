"""Which and how many processes a trainer configuration means, without starting any."""

import os

from omegaconf import DictConfig, ListConfig


def count_devices(trainer: DictConfig) -> int:
    """Devices per node that `trainer` will use; 0 if it asks for an accelerator not present."""
    devices, accelerator = trainer.devices, trainer.accelerator
    available = _available(accelerator)
    if available == 0:
        return 0
    if isinstance(devices, ListConfig):
        return len(devices)
    if isinstance(devices, str) and devices != "auto":
        return _count_text(devices, available)
    return available if devices in ("auto", -1) else int(devices)


def world_size(trainer: DictConfig) -> int:
    """Processes of the whole run: devices x nodes."""
    return max(1, count_devices(trainer)) * int(trainer.num_nodes)


def _count_text(devices: str, available: int) -> int:
    """ "2" means two devices, "0,1" and "0," list them, "-1" means all."""
    if devices == "-1":
        return available
    return len([part for part in devices.split(",") if part]) if "," in devices else int(devices)


def _available(accelerator: str) -> int:
    """Devices here, where a CPU counts as one."""
    if accelerator == "cpu":
        return 1
    import torch

    cuda = torch.cuda.device_count()
    return cuda or (1 if accelerator == "auto" else 0)


def chosen_accelerator(accelerator: str) -> str:
    """What `auto` and `gpu` mean here: CUDA or the CPU.

    Not MPS, for which Lightning would decide on a Mac: it has no float64, and its fused AdamW takes
    no `grad_scale`, through which the gradient is normalised.
    """
    if accelerator == "auto":
        return "cuda" if _available("cuda") else "cpu"
    return "cuda" if accelerator == "gpu" else accelerator


def global_rank() -> int:
    """Rank of this process under torchrun, srun or Lightning's own launcher; else 0."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in ranks if rank is not None), 0)
