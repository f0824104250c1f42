"""Where the weights of `corey.mamba` come from: a checkpoint in transformers' format, or a seed.

Only config.json and safetensors files are read, and no code that comes with a checkpoint is run.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from corey._check import bad_type, bad_value
from corey._operands import DTYPES
from corey.checkpoints import checkpoint_folder
from corey.mamba import Layer, Mamba, MambaConfig

SHAPES = {
    name: MambaConfig(d_model, n_layer, vocab_size=50280, d_inner=2 * d_model, dt_rank=math.ceil(d_model / 16))
    for name, d_model, n_layer in (("130m", 768, 24), ("370m", 1024, 48), ("1.4b", 2048, 48), ("2.8b", 2560, 64))
}
"""The published Mamba-1 models that this project measures."""

_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json")
_FIXED = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True}  # all there is here
_DEFAULTS = _FIXED | {  # what transformers' MambaConfig takes where config.json is silent
    "state_size": 16, "conv_kernel": 4, "expand": 2, "time_step_rank": "auto", "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def load_mamba(
    model: str = "corey-mini",
    *,
    revision: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Mamba:
    """A Mamba-1 checkpoint in transformers' format, such as `state-spaces/mamba-370m-hf`.

    model: the name of a folder in data/checkpoints, the path of a folder, or a hub name `owner/name`. revision: for a
        hub name the 40 hexadecimal digits of a commit; empty otherwise.
    dtype: float32, float16 or bfloat16. A, D and the bias of the step stay float32 as read, whatever the dtype.

    Raises ValueError, TypeError or FileNotFoundError that names the argument, config entry, file or tensor.
    """
    _check_dtype(dtype)
    folder = checkpoint_folder(model, revision)
    if folder is None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    config = read_config(folder)
    tensors = _read_tensors(folder)
    shapes = tensor_shapes(config)
    if missing := [name for name in shapes if name not in tensors]:
        first, others = missing[0], len(missing) - 1
        raise bad_value(first, f"no such tensor, nor {others} others", f"one of shape {shapes[first]}")
    # a checkpoint whose embeddings are tied may hold them once more as lm_head
    if unknown := sorted(set(tensors) - set(shapes) - {"lm_head.weight"}):
        raise bad_value(unknown[0], f"a tensor of shape {tuple(tensors[unknown[0]].shape)}", "the tensors of a Mamba-1")
    return _assemble(config, tensors.__getitem__, torch.device(device), dtype)


def random_mamba(
    shape: str | MambaConfig,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Mamba:
    """Random weights as mamba_ssm initialises them, so that activations have the scale of a model before training.

    shape: a name in `SHAPES` ("130m", "370m", "1.4b", "2.8b") or a config. One seed gives the same weights on devices
    of one kind; a CPU and a GPU draw different numbers.
    """
    _check_dtype(dtype)
    if isinstance(shape, str) and shape not in SHAPES:
        raise bad_value("shape", repr(shape), f"one of {', '.join(SHAPES)}, or a MambaConfig")
    config = SHAPES[shape] if isinstance(shape, str) else shape
    if not isinstance(config, MambaConfig):
        raise bad_type("shape", shape, "a name in corey.mamba_weights.SHAPES or a MambaConfig")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise bad_type("seed", seed, "an int")
    device = torch.device(device)
    draw = partial(_draw, config, torch.Generator(device).manual_seed(seed))
    return _assemble(config, draw, device, dtype)


def random_tensors(
    config: MambaConfig, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a checkpoint with random weights, by transformers' names, all of one dtype; drawn as above."""
    _check_dtype(dtype)
    generator = torch.Generator(torch.device(device)).manual_seed(seed)
    return {name: _draw(config, generator, name).to(dtype).contiguous() for name in tensor_shapes(config)}


def mamba_of(config: MambaConfig, tensors: Mapping[str, Tensor], *, dtype: torch.dtype) -> Mamba:
    """The model of a checkpoint's tensors, on their device; what has the dtype already is shared and not copied."""
    _check_dtype(dtype)
    return _assemble(config, tensors.__getitem__, tensors["backbone.embeddings.weight"].device, dtype)


# ---- config ----------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> MambaConfig:
    """config.json of a checkpoint, checked: an entry that this model does not compute is refused by its name."""
    entries = _DEFAULTS | _read_json(folder / "config.json")
    for name, want in ({"model_type": "mamba"} | _FIXED).items():
        if entries.get(name) != want:
            raise bad_value(name, repr(entries.get(name)), repr(want))

    def count(name: str, least: int, most: int) -> int:
        value = entries.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise bad_value(name, repr(value), f"an int from {least} to {most}")
        return value

    d_model = count("hidden_size", 1, 8192)
    d_inner = count("expand", 1, 16) * d_model
    if entries.get("intermediate_size", d_inner) != d_inner:
        raise bad_value("intermediate_size", repr(entries["intermediate_size"]), f"expand x hidden_size = {d_inner}")
    automatic = entries["time_step_rank"] == "auto"
    epsilon = entries["layer_norm_epsilon"]
    if not isinstance(epsilon, float) or not 0.0 < epsilon < 1.0:
        raise bad_value("layer_norm_epsilon", repr(epsilon), "a float between 0 and 1")
    if not isinstance(entries["tie_word_embeddings"], bool):
        raise bad_value("tie_word_embeddings", repr(entries["tie_word_embeddings"]), "true or false")
    return MambaConfig(
        d_model=d_model,
        n_layer=count("num_hidden_layers", 1, 1024),
        vocab_size=count("vocab_size", 1, 1 << 24),
        d_inner=d_inner,
        dt_rank=math.ceil(d_model / 16) if automatic else count("time_step_rank", 1, d_inner),
        d_state=count("state_size", 1, 256),
        d_conv=count("conv_kernel", 2, 4),
        norm_epsilon=epsilon,
        tie_embeddings=entries["tie_word_embeddings"],
    )


def _read_json(path: Path) -> dict:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding or the syntax
        raise bad_value(path.name, f"{path}, which is not JSON ({error})", "a JSON object") from error
    if not isinstance(entries, dict):
        raise bad_type(path.name, entries, "a JSON object")
    return entries


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name, from one safetensors file or from those that an index lists."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise bad_type("weight_map", weight_map, f"an object in {index.name}, from tensor to file")
        files = set(weight_map.values())
    tensors = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise bad_value("weight_map", repr(name), "names of safetensors files beside it")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name}: got none in {folder}, want the weights as safetensors; no pickle is read")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise bad_value(name, f"a file that safetensors cannot read ({error})", "a whole file") from error
    return tensors


def tensor_shapes(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Name, as in transformers' checkpoints, and shape of every tensor."""
    c = config
    mixer = {
        "A_log": (c.d_inner, c.d_state),
        "D": (c.d_inner,),
        "conv1d.weight": (c.d_inner, 1, c.d_conv),
        "conv1d.bias": (c.d_inner,),
        "in_proj.weight": (2 * c.d_inner, c.d_model),
        "x_proj.weight": (c.dt_rank + 2 * c.d_state, c.d_inner),
        "dt_proj.weight": (c.d_inner, c.dt_rank),
        "dt_proj.bias": (c.d_inner,),
        "out_proj.weight": (c.d_model, c.d_inner),
    }
    shapes = {"backbone.embeddings.weight": (c.vocab_size, c.d_model), "backbone.norm_f.weight": (c.d_model,)}
    for i in range(c.n_layer):
        shapes[f"backbone.layers.{i}.norm.weight"] = (c.d_model,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    return shapes if c.tie_embeddings else shapes | {"lm_head.weight": (c.vocab_size, c.d_model)}


def _assemble(config: MambaConfig, read: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype) -> Mamba:
    """The model whose tensors `read` gives by name."""
    shapes = tensor_shapes(config)

    def take(name: str, dtype: torch.dtype = dtype) -> Tensor:
        tensor = read(name)
        if tuple(tensor.shape) != shapes[name] or tensor.dtype not in DTYPES:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise bad_value(name, got, f"float32, float16 or bfloat16 of shape {shapes[name]}")
        return tensor.to(device=device, dtype=dtype).contiguous()

    def layer(prefix: str) -> Layer:
        return Layer(
            norm=take(f"{prefix}.norm.weight"),
            in_proj=take(f"{prefix}.mixer.in_proj.weight"),
            conv_weight=take(f"{prefix}.mixer.conv1d.weight")[:, 0],
            conv_bias=take(f"{prefix}.mixer.conv1d.bias"),
            x_proj=take(f"{prefix}.mixer.x_proj.weight"),
            dt_proj=take(f"{prefix}.mixer.dt_proj.weight"),
            out_proj=take(f"{prefix}.mixer.out_proj.weight"),
            dt_bias=take(f"{prefix}.mixer.dt_proj.bias", torch.float32),
            A=-torch.exp(take(f"{prefix}.mixer.A_log", torch.float32)),
            D=take(f"{prefix}.mixer.D", torch.float32),
        )

    embedding = take("backbone.embeddings.weight")
    return Mamba(
        config=config,
        embedding=embedding,
        layers=tuple(layer(f"backbone.layers.{i}") for i in range(config.n_layer)),
        norm=take("backbone.norm_f.weight"),
        lm_head=embedding if config.tie_embeddings else take("lm_head.weight"),
    )


def _draw(config: MambaConfig, generator: torch.Generator, name: str) -> Tensor:
    """One tensor of a random model, float32 on the generator's device.

    A = -1 .. -N in every channel (S4D-real); the step's bias such that softplus gives steps spread evenly in log from
    1e-3 to 1e-1; out_proj smaller by sqrt(n_layer), so that the residual stream does not grow with the depth.
    """
    shape = tensor_shapes(config)[name]
    x = torch.empty(shape, device=generator.device)
    if name.endswith("A_log"):
        return torch.arange(1.0, config.d_state + 1, device=x.device).log().expand(shape)
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return x.fill_(1.0)
    if name.endswith(("embeddings.weight", "lm_head.weight")):
        return x.normal_(0.0, 0.02, generator=generator)
    if name.endswith("dt_proj.bias"):
        step = x.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
        return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    fan_in = config.d_conv if "conv1d" in name else shape[-1]
    bound = fan_in**-0.5 / (config.n_layer**0.5 if name.endswith("out_proj.weight") else 1.0)
    return x.uniform_(-bound, bound, generator=generator)


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise bad_type("dtype", dtype, "a torch dtype")
    if dtype not in DTYPES:
        raise bad_value("dtype", dtype, "torch.float32, torch.float16 or torch.bfloat16")
