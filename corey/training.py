"""Train corey-mini, the small byte-level Mamba in data/checkpoints, on text that any machine can make again.

    python -m corey.training --out build/corey-mini     # 15 minutes on one H100; needs mamba-ssm

Two kinds of text: the sources of Python's standard library, and the made tasks of `corey.samples` in the prompts of
LongBench's official protocol and in the paper's. Three things make so small a model answer: every fact of a document is
asked (not one), answer bytes have a loss of their own (they are under 3 % of the bytes), and documents start short and
grow.
"""

import argparse
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from corey import results
from corey._check import bad_value
from corey.routing import pytorch_on_cpu
from corey.samples import HELD_OUT_SEED, MADE_TASKS, make_document

EOS = 256  # the one token that is not a byte; also padding
VOCAB_SIZE = 264  # 257 rounded up to a multiple of 8
TOKENS_PER_STEP = 65_536
STAGES = ((256, 0.15), (512, 0.20), (1024, 0.25), (2048, 0.20), (4096, 0.20))  # (seqlen, share of the steps)
MADE_SHARE = 0.85  # of the rows; the rest is library source alone
PEAK_LR, WARMUP_STEPS = 2e-3, 200
ANSWER_WEIGHT = 2.0


def model_config():
    """The checkpoint's shape: 8 layers, d_model 256, d_inner 512, N = 16, conv 4; 3.6 M parameters."""
    from transformers import MambaConfig

    return MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, num_hidden_layers=8, state_size=16, expand=2, conv_kernel=4,
        initializer_range=0.02, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip


def byte_tokenizer():
    """A tokenizer in the hub's format whose ids are the bytes of the UTF-8 text; id 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=16_384,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def library_text() -> bytes:
    """The sources of Python's standard library (tests aside), in name order: 10 to 12 MB, by version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idle_test", "__pycache__", "lib2to3"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    return b"\n".join(path.read_bytes() for path in files)


def prompt_templates() -> dict[str, dict[str, str]]:
    """{protocol: {made task: template with {context} and {input}}}, from the code that evaluates with them."""
    from corey.longbench import prompt_for

    row = {"context": "{context}", "input": "{input}"}
    return {
        protocol: {made: prompt_for(official, row, protocol) for made, official in MADE_TASKS.items()}
        for protocol in ("published", "official")
    }


class Rows(torch.utils.data.IterableDataset):
    """Batches of (tokens, is_answer), both (batch, seqlen + 1); batch k is the same whatever the number of workers."""

    def __init__(self, seqlens: list[int], templates: dict, tokens_per_step: int, seed: int):
        self.seqlens, self.templates, self.tokens_per_step, self.seed = seqlens, templates, tokens_per_step, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        text = np.frombuffer(library_text(), np.uint8)
        for step in range(first, len(self.seqlens), stride):
            yield self._batch(random.Random(f"{self.seed}/{step}"), self.seqlens[step], text)

    def _batch(self, rng: random.Random, seqlen: int, text: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        batch = max(1, self.tokens_per_step // seqlen)
        tokens, is_answer = np.empty((batch, seqlen + 1), np.int16), np.zeros((batch, seqlen + 1), bool)
        for row in range(batch):
            start = rng.randrange(len(text) - seqlen - 1)
            tokens[row] = text[start : start + seqlen + 1]
            if rng.random() < MADE_SHARE:  # a made document in front, library source after it to the end of the row
                pieces = self._document(rng, seqlen)
                at = 0
                for piece, answer in pieces:
                    end = min(at + len(piece), seqlen + 1)
                    tokens[row, at:end] = piece[: end - at]
                    is_answer[row, at:end] = answer
                    at = end
        return torch.from_numpy(tokens), torch.from_numpy(is_answer)

    def _document(self, rng: random.Random, seqlen: int) -> list[tuple[np.ndarray, bool]]:
        """One document and all its questions, as (ids, is_answer) pieces that fit into seqlen bytes."""
        task = rng.choice(list(MADE_TASKS))
        template = self.templates["official" if seqlen >= 1024 and rng.random() < 0.5 else "published"][task]
        num_facts = rng.randint(2, 3 if seqlen <= 256 else 4 if seqlen <= 512 else 6)
        room = seqlen - len(template) - (64 if seqlen > 256 else 45) * num_facts
        document = make_document(
            task, rng.randrange(HELD_OUT_SEED), max(0, int(room * rng.uniform(0.6, 1.0))), num_facts
        )
        questions = list(document.questions)
        rng.shuffle(questions)  # or the order of the facts would tell which one is asked
        question, answers = questions[0]
        pieces = [
            (_ids(template.format(context=document.context, input=question)), False),
            (_answer_ids(answers), True),
        ]
        asking = template[template.index("Question:") :] if "Question:" in template else ""
        for question, answers in questions[1:]:
            pieces += [(_ids("\n\n" + asking.format(input=question)), False), (_answer_ids(answers), True)]
        return pieces


def _ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _answer_ids(answers: tuple[str, ...]) -> np.ndarray:
    return np.append(_ids(" " + answers[0]).astype(np.int16), EOS)


@pytorch_on_cpu()
def losses(model, tokens: torch.Tensor, is_answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean nats per byte of the text, mean nats per byte of the answers, and the share of answers recalled whole."""
    targets, answer = tokens[:, 1:], is_answer[:, 1:]  # (batch, seqlen)
    logits = model(tokens[:, :-1], use_cache=False).logits  # (batch, seqlen, vocab)
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    text_nats = (nats * ~answer).sum() / (~answer).sum().clamp(min=1)
    answer_nats = (nats * answer).sum() / answer.sum().clamp(min=1)
    with torch.no_grad():  # an answer is recalled when each of its bytes is the most likely one, eos included
        wrong = ((logits.argmax(-1) != targets) & answer).cumsum(1)
        ends = answer & (targets == EOS)
        starts = answer & ~F.pad(answer, (1, 0))[:, :-1]
        before = torch.where(starts, F.pad(wrong, (1, 0))[:, :-1], 0).cummax(1).values  # errors before this answer
        recall = ((wrong == before) & ends).sum() / ends.sum().clamp(min=1)
    return text_nats, answer_nats, recall


def learning_rate(step: int, steps: int) -> float:
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    return PEAK_LR * min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def schedule(steps: int) -> list[int]:
    """The seqlen of every step, short documents first."""
    shares = np.cumsum([share for _, share in STAGES])
    return [STAGES[int(np.searchsorted(shares, (step + 0.5) / steps))][0] for step in range(steps)]


def short_convolution(hidden_states, weight, bias=None, activation=None, **_):
    """The depthwise causal convolution as shifted products: what a compiler fuses, forward and backward, on any GPU."""
    width = weight.shape[-1]
    padded = F.pad(hidden_states, (width - 1, 0))  # (B, D, L + width - 1)
    seqlen = hidden_states.shape[-1]
    out = sum(padded[..., tap : tap + seqlen] * weight[:, tap, None] for tap in range(width)) + bias[:, None]
    return F.silu(out).to(hidden_states.dtype)


def train(
    out: Path,
    steps: int,
    *,
    device: str,
    tokens_per_step: int = TOKENS_PER_STEP,
    seed: int = 0,
    workers: int = 12,
    log_every: int = 50,
) -> list[dict]:
    """Train from scratch; save model, tokenizer and log.json to `out`; return the log, a row per `log_every` steps."""
    if steps < 1:
        raise bad_value("steps", steps, "at least 1")
    from transformers import MambaForCausalLM
    from transformers.models.mamba import modeling_mamba

    torch.manual_seed(seed)
    model = MambaForCausalLM(model_config()).to(device)
    if device == "cuda":
        modeling_mamba.causal_conv1d_fn = torch.compile(short_convolution, dynamic=True)
        modeling_mamba.mamba_inner_fn = lambda *args, **kwargs: (
            None
        )  # needs causal-conv1d; the scan kernel alone will do
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "A_log" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "A_log" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95),
        fused=device == "cuda",
    )  # fmt: skip
    rows = Rows(schedule(steps), prompt_templates(), tokens_per_step, seed)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None,
        pin_memory=device == "cuda", prefetch_factor=4 if workers else None,
    )  # fmt: skip
    log, seen, started = [], 0, time.monotonic()
    for step, (tokens, is_answer) in enumerate(loader):
        tokens, is_answer = tokens.to(device, torch.long, non_blocking=True), is_answer.to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            text_nats, answer_nats, recall = losses(model, tokens, is_answer)
        (text_nats + ANSWER_WEIGHT * answer_nats).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += is_answer.numel()
        if step % log_every == 0 or step == steps - 1:
            log.append({
                "step": step, "seqlen": is_answer.shape[1] - 1, "seen_bytes": seen,
                "text_nats_per_byte": text_nats.item(), "answer_nats_per_byte": answer_nats.item(),
                "answer_recall": recall.item(), "elapsed_s": time.monotonic() - started,
            })  # fmt: skip
            print(json.dumps({key: round(value, 4) for key, value in log[-1].items()}), flush=True)
        if (step + 1) % 2000 == 0 or step == steps - 1:
            save(model, log, out)
    return log


def save(model, log: list[dict], out: Path) -> None:
    """The checkpoint in transformers' format, weights rounded to bf16 (7 MB), and the log beside it."""
    from transformers import MambaForCausalLM

    copy = MambaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    (out / "log.json").write_text(json.dumps(log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=13_179, help="optimizer steps of 65 536 bytes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--workers", type=int, default=12, help="processes that write documents")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parameters = {"steps": options.steps, "tokens_per_step": options.tokens_per_step, "seed": options.seed}
    log = train(options.out, device=options.device, workers=options.workers, **parameters)
    rows = [row | {"device": options.device} for row in log]
    print(results.write_rows(rows, "corey_mini_training", parameters=parameters))


if __name__ == "__main__":
    main()
