"""The ablation as the paper's harness sees it: whole generations of transformers' model, routed through a policy."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec

import pandas as pd
import torch
from torch import Tensor

from corey import benchmark
from corey._check import bad_value
from corey.ablation_policies import REFERENCE
from corey.checkpoints import load_checkpoint
from corey.clocks import from_idle
from corey.entropy import histogram_entropy
from corey.generation import greedy_decode, prefill
from corey.mamba import ChunkPolicy
from corey.mamba_weights import SHAPES, load_mamba, random_mamba
from corey.published import read_published
from corey.routing import route
from corey.samples import held_out_rows

STOCK = "stock"  # transformers' own scan
HOOK = "passive-hook"  # the reference, with an entropy of the prompt's embeddings that nothing depends on


def load_models(model: str, revision: str, *, device, dtype: torch.dtype, seed: int) -> tuple:
    """(lean model, transformers client, tokenizer) of a checkpoint, or random weights for a name in SHAPES.

    A random client has the shape of the lean model, weights of its own, and no tokenizer: None.
    """
    if model not in SHAPES:
        lean = load_mamba(model, revision=revision, device=device, dtype=dtype)
        return lean, *load_checkpoint(model, revision=revision, device=device, dtype=dtype)
    from transformers import MambaConfig, MambaForCausalLM

    shape = SHAPES[model]
    config = MambaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, num_hidden_layers=shape.n_layer,
        state_size=shape.d_state, time_step_rank=shape.dt_rank,
    )  # fmt: skip
    torch.manual_seed(seed)
    client = MambaForCausalLM(config).to(device=device, dtype=dtype).eval()
    return random_mamba(model, seed=seed, device=device, dtype=dtype), client, None


def prompt_ids(tokenizer: object, vocab_size: int, tokens: int, *, seed: int, device) -> Tensor:
    """(1, tokens) int64: held-out text of the made tasks, or random ids where there is no tokenizer."""
    if tokenizer is None:
        return torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    text = "\n".join(row["context"] for row in held_out_rows("report_summary"))
    found = tokenizer(text[: 8 * tokens])["input_ids"][:tokens]
    if len(found) < tokens:
        raise bad_value("tokens", tokens, f"at most {len(found)}, which is all the text there is")
    return torch.tensor([found], device=device)


def client_rows(
    client: torch.nn.Module, ids: Sequence[int], policies: Mapping[str, ChunkPolicy], *, with_stock: bool,
    new_tokens: int, rounds: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """Paired greedy generations of transformers' model, prefill and decode in one time as the paper takes it.

    Each is routed through one of `policies`, the reference among them; HOOK is the reference with the entropy of the
    prompt's embeddings taken beside it, and STOCK, where wanted, is not routed.
    """
    generate = partial(_generate, client, list(ids), new_tokens)
    functions = {name: partial(generate, policy) for name, policy in policies.items()}
    functions[HOOK] = partial(generate, policies[REFERENCE], hooked=True)
    if with_stock:
        functions[STOCK] = partial(generate, None, routed=False)
    functions = {name: from_idle(function, client.device) for name, function in functions.items()}
    return benchmark.paired(functions, rounds=rounds, warmup=1, seed=seed, device=client.device)


def _generate(
    client: torch.nn.Module, ids: list[int], new_tokens: int, policy: ChunkPolicy | None, *, routed: bool = True,
    hooked: bool = False,
) -> object:  # fmt: skip
    with ExitStack() as stack:
        if routed:
            stack.enter_context(route(client, chunk_size=policy))
        if hooked:
            stack.callback(client.get_input_embeddings().register_forward_hook(_embedding_entropy).remove)
        logits, cache = prefill(client, ids)
        return greedy_decode(client, logits, cache, max_new_tokens=new_tokens, eos_token_id=None)


def _embedding_entropy(module: object, arguments: object, embeddings: Tensor) -> None:
    """The published passive hook: of a prompt, the entropy of its embeddings in bits, read by the host."""
    if embeddings.shape[1] > 1:
        float(histogram_entropy(embeddings, unit="bits"))


def stock_is_a_kernel(device: str | torch.device) -> bool:
    """Whether transformers' own scan on this device is mamba_ssm's kernel rather than a loop over tokens."""
    return torch.device(device).type == "cuda" and find_spec("mamba_ssm") is not None


def published_ratios() -> pd.DataFrame:
    """The published ablation over its static 512: scheduler, ratio, and low and high where deviations are published.

    The interval is that of a ratio of two means of n runs each, at 95 %; it knows of no drift between them.
    """
    rows = read_published("scheduler_ablation").set_index("scheduler")
    base = rows.loc[REFERENCE]
    relative = ((rows.std_ms / rows.latency_ms) ** 2 + (base.std_ms / base.latency_ms) ** 2) ** 0.5
    ratio = 1 + rows.over_static_512_percent / 100
    half = 1.96 * ratio * relative / rows.n**0.5
    found = pd.DataFrame({"ratio": ratio, "low": ratio - half, "high": ratio + half, "n": rows.n})
    return found.drop(index=REFERENCE).reset_index()
