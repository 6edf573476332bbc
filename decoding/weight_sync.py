"""The weights of training given to a vLLM server, by the client of the package `trl`."""

import importlib
from typing import Any

from torch import nn

# Where it is defined has changed.
_MODULES = ("trl.extras.vllm_client", "trl.generation.vllm_client")


class TrlVllm:
    """Every parameter by its name, over a communicator that opens with the first of them.

    Args:
        base_url: of the server, without a path; it has to know the routes of `trl vllm-serve`.
        group_port: of the communicator.
        timeout_s: longest wait for the server.

    Raises:
        ValueError: `trl` is not installed.
    """

    def __init__(
        self, base_url: str, group_port: int = 51216, timeout_s: float | int = 240.0
    ) -> None:
        self._class = _client_class()
        self.base_url, self.group_port, self.timeout_s = base_url, group_port, timeout_s
        self._client: Any = None

    def push(self, model: nn.Module) -> None:
        """Send all parameters, and have the server forget what it read with the old ones."""
        parameters = dict(model.named_parameters())
        if self._client is None:
            self._client = self._class(
                base_url=self.base_url, group_port=self.group_port,
                connection_timeout=self.timeout_s,
            )  # fmt: skip
            self._client.init_communicator(device=next(iter(parameters.values())).device)
        for name, parameter in parameters.items():
            self._client.update_named_param(name, parameter.data)
        self._client.reset_prefix_cache()

    def close(self) -> None:
        """Close the communicator, if it was opened."""
        if self._client is not None:
            self._client.close_communicator()
            self._client = None


def _client_class() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name).VLLMClient
        except ImportError:
            continue
    raise ValueError(
        "algo.sampler.sync: needs the package trl; allowed: pip install 'trl[vllm]', or"
        " algo.sampler.sync=none"
    )
