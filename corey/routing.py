"""Put corey's scan into a model of transformers or of mamba_ssm for the length of a `with` block.

The mixers of both call the scan by name in a module of theirs. `route` swaps it for a dispatcher that looks at which
mixer is calling: the given model's mixers get corey's scan, every other model gets what was there before. What is known
of each package is in `corey.routing_clients`.

Where mamba-ssm and causal-conv1d are installed, transformers hands CPU tensors to their CUDA kernels, which fail. In a
route, and in `pytorch_on_cpu` without one, those tensors take transformers' PyTorch path.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps

import torch

from corey._check import bad_type, bad_value
from corey.routing_clients import (
    CLIENTS,
    SCAN_ARGUMENTS,
    UNSUPPORTED_MIXERS,
    Client,
    Replacement,
    by_device,
    client_of,
)
from corey.scan import TILE, selective_scan

_local = threading.local()  # .running: the routed mixer calls of this thread, innermost last
_lock = threading.Lock()
_replaced: dict[tuple[object, str], tuple[object, int]] = {}  # owner and attribute -> (original, open routes)


def route(
    model: torch.nn.Module,
    *,
    chunk_size: int | torch.Tensor | Callable | None = None,
    scan: Callable = selective_scan,
) -> "Route":
    """A context manager in which the full-sequence scan of `model` is corey's.

    model: a transformers model with MambaMixer or FalconMambaMixer layers (MambaForCausalLM, FalconMambaModel, ...), or
        a mamba_ssm model with Mamba layers (MambaLMHeadModel).
    chunk_size: None for the scan's own shape rule; an int, a multiple of the 128-token tile; a 0-dim int32 CUDA tensor;
        or a scheduler, called `scheduler(u, layer=int)` with u (B, D, L) before each scan and returning one of those.
    scan: the operator, corey's by default. Another with the same arguments serves as a control.

    Inside the block, `calls` counts scans and `chunks` holds the chunk of each, in order. Single-token decode steps use
    the client's own state update and are not counted. The client's functions come back on exit, whatever ended the
    block. Nested routes of one model are allowed and the innermost decides; a `Route` itself is entered once at a time.
    The route belongs to the model, so another thread that runs the same model meanwhile is routed too.

    A forward of several tokens on a transformers cache that already holds a state goes on from that state, so a prompt
    may be fed in pieces. transformers by itself restarts the recurrence from zero there, without a word. mamba_ssm
    refuses such a forward. Its fused path (`use_fast_path`), which holds a scan of its own, is off inside the block.

    Raises TypeError for a model without such layers or with layers of Mamba-2 or 3, and RuntimeError for a version of
    the package that is not known to work.

    The scan computes what the mixer's recurrence states (Gu and Dao 2023, algorithm 2), with the state kept in fp32.
    """
    wanted = " or ".join(client.mixer for client in CLIENTS)
    if not isinstance(model, torch.nn.Module):
        raise bad_type("model", model, f"a transformers or mamba_ssm model with layers of class {wanted}")
    others = sorted({type(module).__name__ for module in model.modules()} & set(UNSUPPORTED_MIXERS))
    if others:
        raise TypeError(
            f"model: got {type(model).__name__} with layers of class {', '.join(others)}, whose scan is another; want "
            f"layers of class {wanted}"
        )
    clients = {mixer: client for mixer in model.modules() if (client := client_of(mixer))}
    if not clients:
        raise bad_type("model", model, f"a transformers or mamba_ssm model with layers of class {wanted}")
    if isinstance(chunk_size, bool) or not (
        chunk_size is None or isinstance(chunk_size, int | torch.Tensor) or callable(chunk_size)
    ):
        raise bad_type("chunk_size", chunk_size, "None, an int, a 0-dim int32 tensor or a scheduler")
    if isinstance(chunk_size, int) and (chunk_size < TILE or chunk_size % TILE):
        raise bad_value("chunk_size", chunk_size, f"a positive multiple of the {TILE}-token tile")
    if not callable(scan):
        raise bad_type("scan", scan, "a function with selective_scan's arguments")
    for client in set(clients.values()):
        client.check()
    return Route(clients, chunk_size, scan)


@contextmanager
def pytorch_on_cpu() -> Iterator[None]:
    """A block in which transformers' Mamba and FalconMamba compute with PyTorch on a CPU, whatever is installed.

    Tensors elsewhere go the way that they went. It is for models that exist when the block is entered and serves every
    thread meanwhile; blocks and routes may overlap in any order. As a decorator it wraps each call.
    """
    with ExitStack() as stack:
        for client in CLIENTS:
            if client.kernels and client.module in sys.modules:
                for owner, name, make in _replacements(client, ()):
                    _replace(owner, name, make)
                    stack.callback(_restore, owner, name)
        yield


@dataclass(eq=False)
class _MixerCall:
    owner: "Route"
    mixer: torch.nn.Module
    needs_scan: bool
    initial_state: torch.Tensor | None  # (B, D, N)


class Route:
    """What `route` returns. `calls`: scans so far. `chunks`, `layers`: chunk size in tokens and layer index of each."""

    def __init__(self, clients: dict[torch.nn.Module, Client], chunk_size: object, scan: Callable) -> None:
        self.chunks: list[int | torch.Tensor | None] = []
        self.layers: list[int] = []
        self._clients, self._chunk_size, self._scan = clients, chunk_size, scan
        self._hooks: list = []

    @property
    def calls(self) -> int:
        return len(self.chunks)

    def __enter__(self) -> "Route":
        if self._hooks:
            raise RuntimeError("route: got a Route that is already entered, want one `with` block at a time")
        for owner, name, make in self._replacements():
            _replace(owner, name, make)
        for mixer in self._clients:
            self._hooks.append(mixer.register_forward_pre_hook(self._enter_mixer, with_kwargs=True))
            # also after an error, so that a failed forward does not leave its mixer marked as running
            self._hooks.append(mixer.register_forward_hook(self._leave_mixer, always_call=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for owner, name, _ in self._replacements():
            _restore(owner, name)
        # an interrupt skips the forward hooks
        _running()[:] = [call for call in _running() if call.owner is not self]

    def _replacements(self) -> Iterator[Replacement]:
        for client in set(self._clients.values()):
            yield from _replacements(client, [mixer for mixer, each in self._clients.items() if each is client])

    def _enter_mixer(self, mixer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        _running().append(_MixerCall(self, mixer, *self._clients[mixer].start(mixer, args, kwargs)))

    def _leave_mixer(self, mixer: torch.nn.Module, args: tuple, output: object) -> None:
        ended = [call for call in _running() if call.owner is self and call.mixer is mixer]
        _running()[:] = [call for call in _running() if call not in ended]
        if output is not None and ended[-1].needs_scan:
            raise RuntimeError(f"{self._clients[mixer].installed}: got a mixer that bypassed its scan function")

    def _run_scan(self, current: _MixerCall, arguments: dict) -> object:
        """corey's scan on SCAN_ARGUMENTS, u (B, D, L) among them."""
        u, layer = arguments["u"], current.mixer.layer_idx
        chunk_size = self._chunk_size(u, layer=layer) if callable(self._chunk_size) else self._chunk_size
        self.chunks.append(chunk_size)
        self.layers.append(layer)
        for call in _running():  # nested routes of one model wait for the same scan
            call.needs_scan = call.needs_scan and call.mixer is not current.mixer
        return self._scan(**arguments, initial_state=current.initial_state, chunk_size=chunk_size)


def _replacements(client: Client, mixers: Iterable[torch.nn.Module]) -> Iterator[Replacement]:
    """What to replace for these mixers. In a module it is the same for every block, so that blocks may overlap."""
    module = sys.modules[client.module]
    yield module, client.scan, partial(_dispatcher, client)
    for name in client.kernels:
        yield module, name, by_device
    yield from client.around_the_fused(mixers, lambda: bool(_running()))


def _running() -> list[_MixerCall]:
    if not hasattr(_local, "running"):
        _local.running = []
    return _local.running


def _dispatcher(client: Client, scan: Callable) -> Callable:
    """In place of a client's scan: the running mixer's route, or that scan where no mixer is running."""
    signature = inspect.signature(scan)
    unrouted = by_device(scan)

    @wraps(scan)
    def dispatch(*args, **kwargs):
        if not _running():
            return unrouted(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        arguments = {ours: given[theirs] for ours, theirs in zip(SCAN_ARGUMENTS, client.arguments) if theirs in given}
        current = _running()[-1]
        return current.owner._run_scan(current, arguments)

    return dispatch


def _replace(owner: object, name: str, make: Callable[[object], object]) -> None:
    """Set an attribute to what `make` makes of it, once for all open routes."""
    with _lock:
        original, routes = _replaced.get((owner, name), (getattr(owner, name), 0))
        if not routes:
            setattr(owner, name, make(original))
        _replaced[owner, name] = (original, routes + 1)


def _restore(owner: object, name: str) -> None:
    with _lock:
        original, routes = _replaced.pop((owner, name))
        if routes > 1:
            _replaced[owner, name] = (original, routes - 1)
        else:
            setattr(owner, name, original)
