"""How a replica that joins a training gets its state from one that is in it: over HTTP, as safetensors, no pickle."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.request import urlopen

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torchft.checkpointing import CheckpointTransport

from moeify.train.checkpoint.state import optimizer_state

_NUMBERS = "|numbers"


class State(NamedTuple):
    """The state of a training that a replica heals from: tensors by name, and what JSON can hold."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class _Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6  # which answers on IPv4 too
    daemon_threads = True


class Transport(CheckpointTransport[dict[str, Any]]):
    """Sends a `State` to replicas that heal, in the place of torchft's `HTTPTransport`, which unpickles what it gets.

    The state is copied before it is sent, so that training need not wait for who reads it. The server has no password,
    as torchft's own have none: run it in a network that you trust.

    Args:
        hostname: where the other replicas reach this one.
        key: under which the state is registered with the manager.
        timeout: how long a replica that heals waits, in seconds.
    """

    def __init__(self, hostname: str, key: str, timeout: float) -> None:
        self._key, self._timeout = key, timeout
        self._changed = threading.Condition()
        self._step, self._body = -1, b""
        transport = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = transport._wait(self.path)
                if body is None:
                    self.send_error(410, "this step is over")
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Print nothing."""

        self._server = _Server(("::", 0), Handler)
        self._address = f"http://{hostname}:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _wait(self, path: str) -> bytes | None:
        """The state of the step that a path names, once it is there; None if it no longer is."""
        step = int(path[1:]) if path[1:].isdigit() else -1
        with self._changed:
            self._changed.wait_for(lambda: self._step >= step, self._timeout)
            return self._body if self._step == step and self._body else None

    def metadata(self) -> str:
        """The address that other replicas ask."""
        return self._address

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        """Have a copy of the state ready for replicas that ask for it."""
        state: State = state_dict["user"][self._key]
        numbers = {"state": state.numbers, "torchft": state_dict["torchft"]}
        coded = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
        body = save({**state.tensors, _NUMBERS: coded})
        with self._changed:
            self._step, self._body = step, body
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """The step is over, and its state no longer the newest."""
        with self._changed:
            self._body = b""

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        """Fetch the state of a step from another replica."""
        with urlopen(f"{metadata}{step}", timeout=timeout.total_seconds()) as response:
            tensors = load(response.read())
        numbers = json.loads(bytes(tensors.pop(_NUMBERS).tolist()))
        return {"user": {self._key: State(tensors, numbers["state"])}, "torchft": numbers["torchft"]}

    def shutdown(self, wait: bool = True) -> None:
        """Answer no more."""
        if wait:
            self._server.shutdown()
        self._server.server_close()


def set_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Give an optimizer the state of another replica's, as `optimizer_state` returned it there.

    Raises:
        ValueError: its groups hold other parameters.
    """
    live = optimizer_state(optimizer, model)[1]["groups"]
    if [group["params"] for group in live] != [group["params"] for group in numbers["groups"]]:
        raise ValueError(
            "the optimizer groups other parameters than that of the replica that is training; freeze and group them "
            "as there"
        )
    state: dict[str, dict[str, Any]] = {name: dict(kept) for name, kept in numbers["state"].items()}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("|")
        state.setdefault(name, {})[kind] = tensor
    place = {name: i for i, name in enumerate(name for group in live for name in group["params"])}
    groups = [
        {key: _as(value, own.get(key)) for key, value in group.items()} | {"params": [place[n] for n in own["params"]]}
        for own, group in zip(live, numbers["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": {place[name]: kept for name, kept in state.items()}, "param_groups": groups})


def _as(value: Any, live: Any) -> Any:
    """JSON has lists and numbers only; betas are a tuple, and a learning rate may be a tensor."""
    if isinstance(live, tuple):
        return tuple(value)
    return torch.tensor(value, dtype=live.dtype) if isinstance(live, Tensor) else value


def overwrite(live: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
    """Copy received tensors into live ones of the same names, all or none.

    Raises:
        ValueError: names or shapes differ.
    """
    if odd := sorted(live.keys() ^ received.keys()):
        raise ValueError(
            f"{odd[0]} is in the model of only one of two replicas; start all of them with the same model and recipe"
        )
    for name, tensor in live.items():
        if tensor.shape != received[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} here and {tuple(received[name].shape)} in the replica that is "
                "training; start all of them with the same model and recipe"
            )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(received[name])
