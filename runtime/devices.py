"""How many processes a trainer configuration means, counted without starting any."""

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

    cuda, mps = torch.cuda.device_count(), int(torch.backends.mps.is_available())
    by_name = {"cuda": cuda, "mps": mps, "gpu": cuda or mps, "auto": cuda or mps or 1}
    return by_name[accelerator]
