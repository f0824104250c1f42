"""Load a causal language model in transformers' format with its tokenizer: committed, a folder, or a pinned hub commit.

Only safetensors weights are read and no code that comes with a checkpoint is run.
"""

import re
from pathlib import Path

import torch

from corey._check import bad_type, bad_value
from corey.paths import CHECKPOINTS


def load_checkpoint(
    model: str = "corey-mini",
    *,
    revision: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.nn.Module, object]:
    """(model in evaluation mode, tokenizer).

    model: the name of a folder in data/checkpoints, the path of a folder, or a hub name `owner/name`. revision: for a
    hub name the 40 hexadecimal digits of a commit; empty otherwise. Raises ValueError for a model that is none of them.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise bad_type("dtype", dtype, "a floating torch dtype")
    folder = checkpoint_folder(model, revision)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(folder or model), "trust_remote_code": False}
    if folder is None:
        where["revision"] = revision
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, use_safetensors=True)
    return loaded.to(device).eval(), tokenizer


def checkpoint_folder(model: str, revision: str) -> Path | None:
    """The folder that `model` names, or None for a hub name with a pinned revision; as in `load_checkpoint`."""
    for name, value in {"model": model, "revision": revision}.items():
        if not isinstance(value, str):
            raise bad_type(name, value, "a str")
    folder = next((path for path in (CHECKPOINTS / model, Path(model)) if (path / "config.json").is_file()), None)
    if folder is None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*/[\w-]+(\.[\w-]+)*", model):
        raise bad_value(
            "model", repr(model), "a folder with a config.json, its name in data/checkpoints, or owner/name"
        )
    if folder is None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise bad_value("revision", repr(revision), f"the 40 hexadecimal digits of a commit of {model}")
    if folder is not None and revision:
        raise bad_value("revision", repr(revision), f"nothing, since {model} is a folder")
    return folder
