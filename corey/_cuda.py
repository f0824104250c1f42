"""CUDA kernels at run time: NVRTC compiles them, two caches keep them, the driver launches them on torch's stream.

The sources are in kernels/. A variant (source, macros, architecture) is compiled when it is first asked for
and kept on disk, in kernels/ under $COREY_CACHE, else $XDG_CACHE_HOME/corey, else ~/.cache/corey. NVIDIA's packages are
imported on first use.
"""

import hashlib
import io
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from ctypes import addressof, c_char, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from corey._check import bad_value
from corey.paths import KERNELS

Macros = tuple[tuple[str, str | int], ...]

_INSTALL = 'pip install -e ".[cuda]" in the checkout (the extra corey[cuda])'
_lock = threading.RLock()


# ---- functions -------------------------------------------------------------------------------------------------------


class Function:
    """A kernel loaded on one device.

    handle: the CUfunction. registers: a thread. local_bytes: a thread, above 0 where registers spill.
    shared_bytes: static, a block. allowed: see `allow_shared`. max_threads: a block. param_bytes: the size of the
    kernel's one argument.
    """

    __slots__ = (
        "allowed",
        "device",
        "handle",
        "local_bytes",
        "max_threads",
        "name",
        "param_bytes",
        "registers",
        "shared_bytes",
    )

    def __init__(self, name: str, device: int, cubin: bytes):
        """The device must be current. The module stays loaded for the life of the process: graphs may hold it."""
        driver = _driver()
        module = _call(driver.cuModuleLoadData, cubin)
        function = _call(driver.cuModuleGetFunction, module, name.encode())
        attribute = driver.CUfunction_attribute
        _call(driver.cuFuncLoad, function)  # now, as a first launch inside a graph capture could not
        self.name = name
        self.device = device
        self.handle = function
        self.allowed = 0
        self.registers = _call(driver.cuFuncGetAttribute, attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
        self.local_bytes = _call(driver.cuFuncGetAttribute, attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function)
        self.shared_bytes = _call(driver.cuFuncGetAttribute, attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        self.max_threads = _call(driver.cuFuncGetAttribute, attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function)
        self.param_bytes = _call(driver.cuFuncGetParamInfo, function, 0)[1]

    def __repr__(self):
        return f"Function({self.name!r}, device={self.device}, registers={self.registers})"

    def allow_shared(self, nbytes: int) -> None:
        """Lets a launch ask for up to nbytes of dynamic shared memory; above 48 KiB this is needed.

        What was allowed stays so: several plans may have this function and need different amounts.
        """
        with _lock:
            if nbytes > self.allowed:
                driver = _driver()
                limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call(driver.cuFuncSetAttribute, self.handle, limit, nbytes)
                self.allowed = nbytes

    def blocks_per_sm(self, threads: int, shared_bytes: int) -> int:
        """How many blocks of so many threads and dynamic shared bytes one multiprocessor holds at a time."""
        return _call(_driver().cuOccupancyMaxActiveBlocksPerMultiprocessor, self.handle, threads, shared_bytes)


def function(source: str, name: str, device: int, macros: Macros = ()) -> Function:
    """The kernel `name` of kernels/`source` on CUDA device `device`, compiled with -DNAME=value for every macro.

    Costs a look at the files' times when it is in memory, about 10 ms from disk, and up to seconds when it is compiled.
    Callers keep the result; `source_version` says when to ask again. May be called while a graph is captured.
    Raises RuntimeError with NVRTC's log when the source does not compile, or with the install hint.
    """
    with _lock:
        key = (source, name, device, macros, _source_hash(source))
        found = _functions.get(key)
        if found is None:
            with torch.cuda.device(device), _relaxed_capture():
                _bind(device)
                found = Function(name, device, _cubin(source, architecture(device), macros))
            _functions[key] = found
        return found


def architecture(device: int) -> str:
    """The device's architecture as NVRTC names it: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def clear() -> None:
    """Forgets every function in memory, so that the next call looks at the sources again. The disk cache stays."""
    global _version
    with _lock:
        _functions.clear()
        _hashes.clear()
        _version += 1


_functions: dict[tuple, Function] = {}


# ---- launch ----------------------------------------------------------------------------------------------------------


class _Arguments(threading.local):
    """One thread's buffer for a kernel's argument (4 KiB at most): the driver copies it during the launch."""

    def __init__(self):
        self.buffer = (c_char * 4096)()
        self.view = memoryview(self.buffer).cast("B")
        self.pointers = (c_void_p * 1)(addressof(self.buffer))
        # What a launch needs, in one attribute, as each one of a `local` is looked up by thread.
        self.ready = self.view, addressof(self.pointers), _driver().cuLaunchKernel, torch._C._cuda_getCurrentRawStream
        _bind(torch.cuda.current_device())


_arguments: _Arguments | None = None


def launch(
    function: Function,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    params: bytes | bytearray | memoryview,
    *,
    together: bool = False,
    early: bool = False,
) -> None:
    """Puts the kernel on torch's current stream of the function's device, which must be the current device.

    params: the bytes of the one struct the kernel takes. Raises ValueError if their number is not the struct's size,
    and RuntimeError with the driver's error. Does not synchronise.
    together: the blocks wait for each other, so all must be resident at a time (a cooperative launch).
    early: the kernel calls wait_for_earlier_kernels (kernels/common.cuh), so that it may begin while the one before it
        ends; on compute capability 9.0 and later.
    """
    size = len(params)
    if size != function.param_bytes:
        raise bad_value("params", f"{size} bytes", f"the {function.param_bytes} bytes that {function.name} takes")
    view, address, launch, stream = (_arguments or _make_arguments()).ready
    view[:size] = params
    x, y, z = grid
    early = early and _starts_early(function.device)
    if together or early:
        config = _configs.get(together, early)
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.sharedMemBytes, config.hStream = threads, shared_bytes, stream(function.device)
        (error,) = _driver().cuLaunchKernelEx(config, function.handle, address, 0)
    else:
        (error,) = launch(function.handle, x, y, z, threads, 1, 1, shared_bytes, stream(function.device), address, 0)
    if error:
        raise RuntimeError(
            f"launch of {function.name} on cuda:{function.device}, grid {grid}, {threads} threads, "
            f"{shared_bytes} bytes of shared memory: {_error_text(error)}"
        )


def _make_arguments() -> _Arguments:
    global _arguments
    with _lock:
        if _arguments is None:
            _arguments = _Arguments()
        return _arguments


class _Configs(threading.local):
    """One thread's configurations of launches with attributes, reused as they take longer to make than to launch."""

    def __init__(self):
        self._made = {}

    def get(self, together: bool, early: bool):
        config = self._made.get((together, early))
        if config is None:
            driver, attributes = _driver(), []
            for wanted, name, field in (
                (together, "COOPERATIVE", "cooperative"),
                (early, "PROGRAMMATIC_STREAM_SERIALIZATION", "programmaticStreamSerializationAllowed"),
            ):
                if wanted:
                    attributes.append(driver.CUlaunchAttribute())
                    attributes[-1].id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
                    setattr(attributes[-1].value, field, 1)
            self._made[together, early] = config = driver.CUlaunchConfig()
            config.blockDimY = config.blockDimZ = 1
            config.attrs, config.numAttrs = attributes, len(attributes)
        return config


_configs = _Configs()


@cache
def _starts_early(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


# ---- scratch ---------------------------------------------------------------------------------------------------------


def scratch(device: int, nbytes: int, owner: str = "") -> torch.Tensor:
    """At least nbytes of uint8 on the device for kernels that talk across blocks. The device must be current.

    Zero when it is made, and afterwards as the last kernel on it left it: a kernel must leave it so that the next one
    finds its way, e.g. by counting upwards, or zero. Kernels that lay it out differently must not share one, so every
    operator but one names itself as the owner. Hold the tensor until the launch, as it may be the only reference; then
    ask again, as the next call may return another one, again zero.

    Eager calls on one stream share a tensor. While a graph is captured, calls of that capture on one stream share
    another, whose zeroing is the first thing recorded, so every replay starts from zero and never meets eager kernels.
    """
    stream = torch._C._cuda_getCurrentRawStream(device)
    capture = _capture_id(stream) if torch._C._cuda_isCurrentStreamCapturing() else 0
    key = (owner, device, stream, capture != 0)
    held = _scratch.get(key)
    if held is not None and held[0] == capture and held[1].numel() >= nbytes:
        return held[1]
    size = max(4096, 1 << (nbytes - 1).bit_length())
    made = torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))
    if not _inductor_owns_memory(device):
        # What is replaced is freed in stream order: by torch's allocator, for reuse on this stream or in this capture.
        _scratch[key] = (capture, made)
        if not capture:
            _scratch.pop((owner, device, stream, True), None)  # that capture has ended
    return made


_scratch: dict[tuple[str, int, int, bool], tuple[int, torch.Tensor]] = {}


def _capture_id(stream: int) -> int:
    driver = _driver()
    return int(_call(driver.cuStreamGetCaptureInfo, driver.CUstream(stream))[1])


def _inductor_owns_memory(device: int) -> bool:
    """Whether Inductor's CUDA graphs are in use in this thread: they refuse memory of their pool that outlives a call,
    in the captures and in the eager runs before those."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        return trees.get_manager(device, create_if_none_exists=False) is not None
    except AssertionError:  # a thread that Inductor has never run in
        return False


# ---- sources ---------------------------------------------------------------------------------------------------------


def source_version() -> int:
    """Another number whenever a file in kernels/ has changed, for callers that keep functions. Looks every 0.2 s."""
    global _looked, _stamp, _version
    now = time.monotonic()
    if now - _looked > 0.2:
        with _lock:
            _looked = now
            stamp = _stamps()
            if stamp != _stamp:
                _stamp = stamp
                _version += 1
    return _version


_looked = float("-inf")
_stamp: tuple = ()
_version = 0
_hashes: dict[str, tuple[tuple, str]] = {}


@contextmanager
def sources_in(folder: Path):
    """Compiles what lies in another folder, a copy of kernels/, inside the block."""
    global KERNELS
    kept, KERNELS = KERNELS, folder
    clear()
    try:
        yield
    finally:
        KERNELS = kept
        clear()


def _stamps() -> tuple:
    """Names, times and sizes of all sources."""
    with os.scandir(KERNELS) as entries:
        files = [(e.name, e.stat()) for e in entries if e.name.endswith((".cu", ".cuh"))]
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in files))


def _source_hash(source: str) -> str:
    """SHA-256 of everything the compiler may read of kernels/: the source and every header."""
    stamp = _stamps()
    known = _hashes.get(source)
    if known is not None and known[0] == stamp:
        return known[1]
    if not any(name == source for name, *_ in stamp):
        raise bad_value("source", repr(source), f"a file in {KERNELS}")
    digest = hashlib.sha256()
    for path in [KERNELS / source, *sorted(KERNELS.glob("*.cuh"))]:
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)}\n".encode() + text)
    _hashes[source] = (stamp, digest.hexdigest())
    return digest.hexdigest()


# ---- compiler --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What NVRTC made: the cubin; registers and local_bytes (stack and spills) a thread; the assembler's log."""

    cubin: bytes
    registers: int
    local_bytes: int
    log: str


def compile_only(source: str, name: str, arch: str, macros: Macros = ()) -> Compiled:
    """Compiles one variant for an architecture such as "sm_90". Needs no GPU and uses no cache."""
    cubin, log = _compile(source, arch, macros, report=True)
    section = re.search(rf"entry function '{re.escape(name)}'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL)
    if section is None:
        raise bad_value("name", repr(name), f'an extern "C" __global__ function of {source}')
    stack = re.search(rf"properties for {re.escape(name)}\s.*?(\d+) bytes stack frame", section[1], re.DOTALL)
    registers = re.search(r"Used (\d+) registers", section[1])
    if stack is None or registers is None:
        raise RuntimeError(f"NVRTC's log does not list the registers of {name}:\n{log}")
    return Compiled(cubin, int(registers[1]), int(stack[1]), log)


def _compile(source: str, arch: str, macros: Macros, report: bool = False) -> tuple[bytes, str]:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise _missing("cuda-core", error) from error
    options = ProgramOptions(
        name=source,
        arch=arch,
        std="c++17",
        define_macro=[(key, str(value)) for key, value in macros] or None,
        include_path=[str(KERNELS), _cuda_headers()],
        ptxas_options=["-v"] if report else None,
    )
    try:
        text = (KERNELS / source).read_text()
    except FileNotFoundError as error:
        raise bad_value("source", repr(source), f"a file in {KERNELS}") from error
    log = io.StringIO()
    try:
        program = Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:  # cuda.core's own classes are not public; their message holds NVRTC's log
        raise RuntimeError(f"{source} for {arch} with {dict(macros)}: {_text(str(error))}") from error
    return bytes(program.code), _text(log.getvalue())


def _text(log: str) -> str:
    """NVRTC ends its logs with a zero byte."""
    return log.strip("\0\n ")


def _cuda_headers() -> str:
    """The directory of cuda_bf16.h and cuda_fp16.h."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as error:
        raise _missing("cuda-pathfinder", error) from error
    directory = find_nvidia_header_directory("cudart")
    if directory is None or not (Path(directory) / "cuda_bf16.h").is_file():
        raise RuntimeError(
            f"CUDA's headers (cuda_bf16.h) are not installed: {_INSTALL} brings nvidia-cuda-runtime, which has them"
        )
    return str(directory)


# ---- disk cache ------------------------------------------------------------------------------------------------------


def _cubin(source: str, arch: str, macros: Macros) -> bytes:
    """The machine code of all kernels of a source, from disk if a sound copy is there, else compiled and put there."""
    text = repr((_source_hash(source), macros, arch, _nvrtc_version()))
    key = hashlib.sha256(text.encode()).hexdigest()
    directory = _cache_directory()
    path = None if directory is None else directory / f"{key}.cubin"
    cubin = None if path is None else _read_entry(path)
    if cubin is None:
        cubin, _ = _compile(source, arch, macros)
        # Unless a file was saved meanwhile: the key is stale then.
        if path is not None and _stamps() == _hashes[source][0]:
            _write_entry(path, cubin)
    return cubin


def _cache_directory() -> Path | None:
    """Where entries go, made if need be; None, with a warning, where no private directory can be had."""
    directory = Path()
    try:
        directory = _cache_root() / "kernels"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid != os.getuid():
            raise PermissionError("it belongs to another user, who could put other code there")
        if status.st_mode & 0o077:
            directory.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _warn_no_cache(directory, error)
        return None
    return directory


def _cache_root() -> Path:
    if root := os.environ.get("COREY_CACHE"):
        return Path(root)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "corey"
    return Path.home() / ".cache" / "corey"


def _warn_no_cache(directory: Path, error: Exception) -> None:
    if directory not in _warned:
        _warned.add(directory)
        warnings.warn(
            f"kernel cache {directory}: {error}. Kernels are compiled anew in every process; set COREY_CACHE to a "
            "directory of your own to keep them",
            stacklevel=2,
        )


_warned: set[Path] = set()


def _read_entry(path: Path) -> bytes | None:
    """An entry is a SHA-256 and the cubin; the sum covers the key too, so a misplaced entry is as good as a damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    return entry[32:] if entry[:32] == _checksum(path, entry[32:]) else None


def _write_entry(path: Path, cubin: bytes) -> None:
    """Readers see the whole entry or none, whatever other processes do."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_checksum(path, cubin) + cubin)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        _warn_no_cache(path.parent, error)


def _checksum(path: Path, cubin: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + cubin).digest()


# ---- driver ----------------------------------------------------------------------------------------------------------


def _driver():
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise _missing("cuda-bindings", error) from error
    return driver


def _nvrtc_version() -> list[int]:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise _missing("cuda-bindings", error) from error
    try:
        return _call(nvrtc.nvrtcVersion)
    except RuntimeError as error:  # the library is loaded here
        raise _missing("nvidia-cuda-nvrtc", error) from error


def _missing(package: str, error: Exception) -> RuntimeError:
    return RuntimeError(f"the CUDA kernels need {package} ({error}): {_INSTALL}")


def _call(routine, *arguments):
    """A call of cuda.bindings, whose results start with the error code: the rest, or RuntimeError."""
    error, *results = routine(*arguments)
    if error:
        raise RuntimeError(f"{routine.__name__}: {_error_text(error)}")
    return results[0] if len(results) == 1 else results


def _error_text(error) -> str:
    driver = _driver()
    if not isinstance(error, driver.CUresult):
        return error.name
    text = driver.cuGetErrorString(error)[1]
    return f"{error.name} ({text.decode()})" if text else error.name


def _bind(device: int) -> None:
    """Makes the device's context current for the driver, in a thread where torch has not done so yet."""
    torch.cuda.init()
    driver = _driver()
    if not int(_call(driver.cuCtxGetCurrent)) or int(_call(driver.cuCtxGetDevice)) != device:
        _call(driver.cuCtxSetCurrent, _call(driver.cuDevicePrimaryCtxRetain, driver.CUdevice(device)))


@contextmanager
def _relaxed_capture():
    """Allows loading a kernel while this thread captures a graph."""
    driver = _driver()
    mode = _call(driver.cuThreadExchangeStreamCaptureMode, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        yield
    finally:
        _call(driver.cuThreadExchangeStreamCaptureMode, mode)
