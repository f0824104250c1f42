"""The peer that `corey.mamba` is measured against: transformers' Mamba on the kernels of mamba-ssm and causal-conv1d.

transformers takes those kernels where both packages can be imported, and its own loop over tokens where an import
fails for whatever reason. So whether it took them is read off the kernels that the device ran.
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from corey.kernel_times import kernel_times
from corey.mamba import MambaConfig

PACKAGES = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}  # as imported and as installed
STOCK_KERNELS = ("selective_scan_fwd", r"causal_conv1d\w*_fwd", "causal_conv1d_update", "selective_scan_update")


def check_installed() -> str:
    """The versions of transformers and of both packages; RuntimeError that names what to install without them."""
    found = [f"transformers {version('transformers')}"]
    for package, distribution in PACKAGES.items():
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise RuntimeError(
                f"{distribution}: got none that can be imported ({error}), want it as the peer: pip install "
                f"{' '.join(PACKAGES.values())}"
            ) from error
        try:
            found.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            found.append(f"{distribution} {module.__version__}")
    return ", ".join(found)


def build_client(config: MambaConfig, tensors: Mapping[str, Tensor]) -> torch.nn.Module:
    """transformers' MambaForCausalLM on these tensors, which it shares, of any device and dtype."""
    import transformers

    shape = transformers.MambaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layer,
        state_size=config.d_state, conv_kernel=config.d_conv, expand=config.d_inner // config.d_model,
        time_step_rank=config.dt_rank, layer_norm_epsilon=config.norm_epsilon,
        tie_word_embeddings=config.tie_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        client = transformers.MambaForCausalLM(shape)
    lm_head = tensors.get("lm_head.weight", tensors["backbone.embeddings.weight"])
    client.load_state_dict({**tensors, "lm_head.weight": lm_head}, assign=True)
    client.generation_config.eos_token_id = None  # so that a generation has the length that was asked for
    return client.eval()


@torch.inference_mode()
def prefill(client: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, V) after the last token of ids (B, L), with the state kept as a generation needs it."""
    return client(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


@torch.inference_mode()
def generate(client: torch.nn.Module, ids: Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy continuation of ids (B, L) by transformers' own `generate`."""
    tokens = client.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokens[:, ids.shape[1] :].tolist()


def check_kernels(client: torch.nn.Module, ids: Tensor) -> None:
    """RuntimeError unless a short generation runs the stock scan, convolution and both of their decode steps."""
    ran = kernel_times(lambda: generate(client, ids, 3)).name
    missing = [kernel for kernel in STOCK_KERNELS if not ran.str.contains(kernel).any()]
    if missing:
        raise RuntimeError(
            f"transformers {version('transformers')}: got a generation without the kernels {', '.join(missing)}, want "
            f"those of {' and '.join(PACKAGES.values())}, which it drops silently when their import fails"
        )
