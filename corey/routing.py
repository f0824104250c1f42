"""Put corey's scan into a transformers Mamba or FalconMamba model for the length of a `with` block.

transformers 5.15 and later call the module functions `mamba_selective_scan` and `mamba_inner_fn` by name from every
mixer. `route` swaps them for dispatchers that look at which mixer is calling: the given model's mixers get corey's
scan, every other model gets what was there before.
"""

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version

import torch
from packaging.version import Version

from corey._check import bad_type, bad_value
from corey.scan import TILE, selective_scan

SUPPORTED = (Version("5.15"), Version("6"))  # at least the first, below the second
CLIENTS = {  # mixer class -> module whose functions it calls by name
    "MambaMixer": "transformers.models.mamba.modeling_mamba",
    "FalconMambaMixer": "transformers.models.falcon_mamba.modeling_falcon_mamba",
}
SCAN_PARAMETERS = (
    "hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state", "use_mambapy",
    "use_associative_scan",
)  # fmt: skip

_local = threading.local()  # .running: the routed mixer calls of this thread, innermost last
_lock = threading.Lock()
_originals: dict[str, tuple[Callable, Callable, int]] = {}  # module name -> (scan, fused training path, open routes)


def route(
    model: torch.nn.Module,
    *,
    chunk_size: int | torch.Tensor | Callable | None = None,
    scan: Callable = selective_scan,
) -> "Route":
    """A context manager in which the full-sequence scan of `model` is corey's.

    model: a transformers model with MambaMixer or FalconMambaMixer layers (MambaForCausalLM, FalconMambaModel, ...).
    chunk_size: None for the scan's own shape rule; an int, a multiple of the 128-token tile; a 0-dim int32 CUDA tensor;
        or a scheduler, called `scheduler(u, layer=int)` with u (B, D, L) before each scan and returning one of those.
    scan: the operator, corey's by default. Another with the same arguments serves as a control.

    Inside the block, `calls` counts scans and `chunks` holds the chunk of each, in order. Single-token decode steps use
    transformers' own state update and are not counted. transformers' functions come back on exit, whatever ended the
    block. Nested routes of one model are allowed and the innermost decides; a `Route` itself is entered once at a time.
    The route belongs to the model, so another thread that runs the same model meanwhile is routed too.

    A forward of several tokens on a cache that already holds a state goes on from that state, so a prompt may be fed in
    pieces. transformers by itself restarts the recurrence from zero there, without a word.

    Raises TypeError for a model without such layers, and RuntimeError for a version of transformers that is not known
    to work.

    The scan computes what the mixer's recurrence states (Gu and Dao 2023, algorithm 2), with the state kept in fp32.
    """
    if not isinstance(model, torch.nn.Module):
        raise bad_type("model", model, "a transformers Mamba or FalconMamba model")
    clients = {mixer: client for mixer in model.modules() if (client := _client_of(mixer))}
    if not clients:
        raise bad_type("model", model, f"a transformers model with layers of class {' or '.join(CLIENTS)}")
    if isinstance(chunk_size, bool) or not (
        chunk_size is None or isinstance(chunk_size, int | torch.Tensor) or callable(chunk_size)
    ):
        raise bad_type("chunk_size", chunk_size, "None, an int, a 0-dim int32 tensor or a scheduler")
    if isinstance(chunk_size, int) and (chunk_size < TILE or chunk_size % TILE):
        raise bad_value("chunk_size", chunk_size, f"a positive multiple of the {TILE}-token tile")
    if not callable(scan):
        raise bad_type("scan", scan, "a function with selective_scan's arguments")
    installed = Version(version("transformers"))
    if not SUPPORTED[0] <= installed < SUPPORTED[1]:
        raise RuntimeError(f"transformers: got {installed}, want >={SUPPORTED[0]},<{SUPPORTED[1]}")
    for module in set(clients.values()):
        _check_client(module)
    return Route(clients, chunk_size, scan)


def _client_of(module: torch.nn.Module) -> str | None:
    """The transformers module that a mixer, or a subclass of one, takes its functions from."""
    for base in type(module).__mro__:
        if CLIENTS.get(base.__name__) == base.__module__:
            return base.__module__
    return None


def _check_client(module: str) -> None:
    """The functions that a route replaces must exist and take the arguments that the dispatcher hands on."""
    client, installed = sys.modules[module], f"transformers {version('transformers')}"
    for function in ("mamba_selective_scan", "mamba_inner_fn"):
        if not callable(getattr(client, function, None)):
            raise RuntimeError(f"{module}.{function}: got nothing in {installed}, want a function")
    parameters = inspect.signature(client.mamba_selective_scan).parameters
    missing = [name for name in SCAN_PARAMETERS if name not in parameters]
    if missing:
        raise RuntimeError(
            f"{module}.mamba_selective_scan: got no parameter {', '.join(missing)} in {installed}, want all of "
            f"{', '.join(SCAN_PARAMETERS)} (transformers >={SUPPORTED[0]},<{SUPPORTED[1]})"
        )


@dataclass(eq=False)
class _MixerCall:
    owner: "Route"
    mixer: torch.nn.Module
    needs_scan: bool
    initial_state: torch.Tensor | None  # (B, D, N)


class Route:
    """What `route` returns. `calls`: scans so far. `chunks`, `layers`: chunk size in tokens and layer index of each."""

    def __init__(self, clients: dict[torch.nn.Module, str], chunk_size: object, scan: Callable) -> None:
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
        for module in set(self._clients.values()):
            _install(module)
        for mixer in self._clients:
            self._hooks.append(mixer.register_forward_pre_hook(self._enter_mixer, with_kwargs=True))
            # also after an error, so that a failed forward does not leave its mixer marked as running
            self._hooks.append(mixer.register_forward_hook(self._leave_mixer, always_call=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for module in set(self._clients.values()):
            _restore(module)
        # an interrupt skips the forward hooks
        _running()[:] = [call for call in _running() if call.owner is not self]

    def _enter_mixer(self, mixer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seqlen = (args[0] if args else kwargs["hidden_states"]).shape[1]
        cache = args[1] if len(args) > 1 else kwargs.get("cache_params")
        continues = cache is not None and cache.has_previous_state(mixer.layer_idx)
        # the mixer has no argument for a state before the first token, so it travels beside the call
        state = cache.layers[mixer.layer_idx].recurrent_states[0] if continues and seqlen > 1 else None
        _running().append(_MixerCall(self, mixer, needs_scan=not continues or seqlen > 1, initial_state=state))

    def _leave_mixer(self, mixer: torch.nn.Module, args: tuple, output: object) -> None:
        ended = [call for call in _running() if call.owner is self and call.mixer is mixer]
        _running()[:] = [call for call in _running() if call not in ended]
        if output is not None and ended[-1].needs_scan:
            raise RuntimeError(f"transformers {version('transformers')}: got a mixer that bypassed its scan function")

    def _run_scan(self, current: _MixerCall, arguments: dict) -> object:
        u, layer = arguments["hidden_states"], current.mixer.layer_idx  # u: (B, D, L)
        chunk_size = self._chunk_size(u, layer=layer) if callable(self._chunk_size) else self._chunk_size
        self.chunks.append(chunk_size)
        self.layers.append(layer)
        for call in _running():  # nested routes of one model wait for the same scan
            call.needs_scan = call.needs_scan and call.mixer is not current.mixer
        return self._scan(
            u,
            arguments["dt"],  # (B, D, L)
            arguments["A"],  # (D, N)
            arguments["B"],  # (B, N, L)
            arguments["C"],  # (B, N, L)
            D=arguments.get("D"),
            z=arguments.get("z"),
            delta_bias=arguments.get("delta_bias"),
            delta_softplus=arguments.get("delta_softplus", False),
            return_last_state=arguments.get("return_last_state", False),
            initial_state=current.initial_state,
            chunk_size=chunk_size,
        )


def _running() -> list[_MixerCall]:
    if not hasattr(_local, "running"):
        _local.running = []
    return _local.running


def _install(module: str) -> None:
    with _lock:
        client = sys.modules[module]
        if module in _originals:
            scan, fused, routes = _originals[module]
            _originals[module] = (scan, fused, routes + 1)
            return
        scan, fused = client.mamba_selective_scan, client.mamba_inner_fn
        _originals[module] = (scan, fused, 1)
        signature = inspect.signature(scan)

        @wraps(scan)
        def mamba_selective_scan(*args, **kwargs):
            if not _running():
                return scan(*args, **kwargs)
            current = _running()[-1]
            return current.owner._run_scan(current, signature.bind(*args, **kwargs).arguments)

        @wraps(fused)
        def mamba_inner_fn(*args, **kwargs):
            # None is the client's own word for "no fused kernel here": the mixer then goes through the scan
            return None if _running() else fused(*args, **kwargs)

        client.mamba_selective_scan, client.mamba_inner_fn = mamba_selective_scan, mamba_inner_fn


def _restore(module: str) -> None:
    with _lock:
        scan, fused, routes = _originals[module]
        if routes > 1:
            _originals[module] = (scan, fused, routes - 1)
            return
        client = sys.modules[module]
        client.mamba_selective_scan, client.mamba_inner_fn = scan, fused
        del _originals[module]
