"""What `corey.routing` knows of the packages that it routes: their versions, their names, and how a mixer goes its way.

Every client's mixers look up the scan by name in a module, which is where a route puts its own in.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version

import torch
from packaging.version import Version
from torch import Tensor

SCAN_ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state")
UNSUPPORTED_MIXERS = ("Mamba2", "Mamba2Simple", "Mamba2Mixer", "Mamba3", "Mamba3Mixer")  # another recurrence

FUSED = "mamba_inner_fn"  # of every client: a block from its convolution on, with a scan inside

Replacement = tuple[object, str, Callable[[object], object]]  # owner, attribute, and what to make of its value


@dataclass(frozen=True)
class Client:
    """A class of mixers. The names of the scan's arguments are given in the order of SCAN_ARGUMENTS, where they differ.

    supported: versions of the package, from the first up to, but not including, the second.
    """

    package: str
    supported: tuple[Version, Version]
    mixer: str
    module: str
    scan: str
    renamed: tuple[str, ...] = ()
    further: tuple[str, ...] = ()  # parameters of the scan that a route drops
    kernels: tuple[str, ...] = ()  # beside scan and FUSED, what a package may have put in place of its PyTorch path

    @property
    def installed(self) -> str:
        return f"{self.package} {version(self.package)}"

    def check(self) -> None:
        """RuntimeError unless the installed version is known and its scan takes what a route hands on."""
        low, high = self.supported
        if not low <= Version(version(self.package)) < high:
            raise RuntimeError(f"{self.package}: got {version(self.package)}, want >={low},<{high}")
        for function in (self.scan, FUSED, *self.kernels):
            if not callable(getattr(sys.modules[self.module], function, None)):
                raise RuntimeError(f"{self.module}.{function}: got nothing in {self.installed}, want a function")
        wanted = (*self.arguments, *self.further)
        parameters = inspect.signature(getattr(sys.modules[self.module], self.scan)).parameters
        missing = [name for name in wanted if name not in parameters]
        if missing:
            raise RuntimeError(
                f"{self.module}.{self.scan}: got no parameter {', '.join(missing)} in {self.installed}, want all of "
                f"{', '.join(wanted)} ({self.package} >={low},<{high})"
            )

    @property
    def arguments(self) -> tuple[str, ...]:
        """The client's names of SCAN_ARGUMENTS."""
        return (*self.renamed, *SCAN_ARGUMENTS[len(self.renamed) :])

    def around_the_fused(self, mixers: Iterable[torch.nn.Module], routed: Callable[[], bool]) -> Iterator[Replacement]:
        """What sends a mixer through its scan where the client has a fused path; `routed` says if one is running."""
        raise NotImplementedError

    def start(self, mixer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[bool, Tensor | None]:
        """Whether a forward with these arguments will scan, and the state (B, D, N) that it should go on from."""
        raise NotImplementedError


def by_device(function: Callable) -> Callable:
    """The same function, but what it wraps for tensors on a CPU: of transformers' functions, the PyTorch path.

    transformers chooses between the two when it is imported, by what is installed, for tensors of every device.
    """
    in_pytorch = inspect.unwrap(function)

    @wraps(function)
    def choose(*args, **kwargs):
        first = (*args, *kwargs.values())[0]
        return (in_pytorch if first.device.type == "cpu" else function)(*args, **kwargs)

    return choose


class TransformersClient(Client):
    def around_the_fused(self, mixers: Iterable[torch.nn.Module], routed: Callable[[], bool]) -> Iterator[Replacement]:
        # None is the client's own word for "no fused kernel here": the mixer then goes through the scan
        def unless_routed(fused):
            fused = by_device(fused)
            return lambda *args, **kwargs: None if routed() else fused(*args, **kwargs)

        yield sys.modules[self.module], FUSED, unless_routed

    def start(self, mixer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[bool, Tensor | None]:
        seqlen = (args[0] if args else kwargs["hidden_states"]).shape[1]
        cache = args[1] if len(args) > 1 else kwargs.get("cache_params")
        if cache is None or not cache.has_previous_state(mixer.layer_idx):
            return True, None
        # the mixer has no argument for a state before the first token, so it travels beside the call
        return seqlen > 1, cache.layers[mixer.layer_idx].recurrent_states[0] if seqlen > 1 else None


class MambaSsmClient(Client):
    def around_the_fused(self, mixers: Iterable[torch.nn.Module], routed: Callable[[], bool]) -> Iterator[Replacement]:
        # the mixer's own switch: its other path is the same block with the scan as a call of its own
        for mixer in mixers:
            yield mixer, "use_fast_path", lambda value: False

    def start(self, mixer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[bool, Tensor | None]:
        inference = args[1] if len(args) > 1 else kwargs.get("inference_params")
        return inference is None or inference.seqlen_offset == 0, None  # after the prompt it steps by single tokens


_TRANSFORMERS = {
    "package": "transformers",
    "supported": (Version("5.15"), Version("6")),
    "scan": "mamba_selective_scan",
    "renamed": ("hidden_states", "dt"),
    "further": ("use_mambapy", "use_associative_scan"),
    "kernels": ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_state_update"),
}
CLIENTS = (
    TransformersClient(mixer="MambaMixer", module="transformers.models.mamba.modeling_mamba", **_TRANSFORMERS),
    TransformersClient(
        mixer="FalconMambaMixer", module="transformers.models.falcon_mamba.modeling_falcon_mamba", **_TRANSFORMERS
    ),
    MambaSsmClient(
        package="mamba_ssm",
        supported=(Version("2.3"), Version("2.4")),
        mixer="Mamba",
        module="mamba_ssm.modules.mamba_simple",
        scan="selective_scan_fn",
    ),
)


def client_of(module: torch.nn.Module) -> Client | None:
    """The client whose mixer, or a subclass of it, a module is."""
    return next(
        (
            client
            for base in type(module).__mro__
            for client in CLIENTS
            if (base.__name__, base.__module__) == (client.mixer, client.module)
        ),
        None,
    )
