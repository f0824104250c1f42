"""Serving regimes: made prompts of one kind, with a batch and a length, each a pure function of its seed.

A byte is a token, whatever the model's vocabulary, so that a length means the same for every kind and model.
"""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corey._check import bad_value
from corey.sample_words import CORPORA, FIELDS, FINDINGS, PEOPLE, PLACES, SCORES, TOPICS
from corey.samples import make_document


@dataclass(frozen=True)
class Kind:
    """What prompts of a kind hold. `published`: whether the paper's mixed-regime study has the kind; the wording is
    this project's in any case. write(rng, size) gives at least `size` bytes, of which a prompt is the first."""

    about: str
    published: bool
    write: Callable[[random.Random, int], bytes]


@dataclass(frozen=True)
class Regime:
    """`batch` prompts of one kind, each of `seqlen` tokens; `kind` is a name in `KINDS`."""

    kind: str
    batch: int
    seqlen: int

    def prompts(self, *, seed: int) -> Tensor:
        """Token ids (batch, seqlen), int64; every row is drawn anew."""
        write = KINDS[self.kind].write
        rows = [write(random.Random(f"{self.kind}/{seed}/{row}"), self.seqlen) for row in range(self.batch)]
        return torch.tensor([list(row[: self.seqlen]) for row in rows])


def parse_regime(text: str) -> Regime:
    """ "short_chat 16 x 32" as 16 prompts of 32 tokens."""
    kind, _, shape = text.partition(" ")
    batch, _, seqlen = (part.strip() for part in shape.partition("x"))
    if kind not in KINDS or not (batch.isdigit() and seqlen.isdigit() and int(batch) and int(seqlen)):
        raise bad_value("regime", repr(text), f"kind, batch x tokens, such as 'short_chat 16 x 32'; {', '.join(KINDS)}")
    return Regime(kind, int(batch), int(seqlen))


def _until(size: int, piece: Callable[[], str]) -> str:
    """Pieces, each made anew, until there are `size` bytes."""
    pieces: list[str] = []
    while size > 0:
        pieces.append(piece())
        size -= len(pieces[-1])
    return "".join(pieces)


def _asked(rng: random.Random, size: int, text: str) -> bytes:
    """`size` bytes: `text` over again, cut so that a question ends them."""
    question = f"\nQuestion: what was found on {rng.choice(TOPICS)}?\nAnswer:"
    context = (text * (size // len(text) + 1))[: max(size - len(question), 0)]
    return (context + question)[-size:].encode()


def _short_chat(rng: random.Random, size: int) -> bytes:
    def request() -> str:
        return f"Plan two days in {rng.choice(FIELDS['city'])} for me. I like {rng.choice(TOPICS)}. "

    return _until(size, request).encode()


def _many_small(rng: random.Random, size: int) -> bytes:
    def ticket() -> str:
        return f"Ticket {rng.randrange(10**6)} by {rng.choice(FIELDS['contact'])}, {rng.choice(PLACES)}: which team? "

    return _until(size, ticket).encode()


def _logs_uuid(rng: random.Random, size: int) -> bytes:
    def line() -> str:
        number = uuid.UUID(int=rng.getrandbits(128))
        return f"INFO request {number} done in {rng.randrange(10, 100)} ms\n"

    return _until(size, line).encode()


def _code_repo(rng: random.Random, size: int) -> bytes:
    def function() -> str:
        name, column = rng.choice(PLACES), rng.choice(list(FIELDS))
        return (
            f"def total_{name}_{rng.randrange(1000)}(rows):\n"
            f"    total = 0\n"
            f"    for row in rows:\n"
            f"        if row['{column}'] is not None:\n"
            f"            total += row['{column}']\n"
            f"    return total\n\n"
        )

    return _until(size, function).encode()


def _tables_csv(rng: random.Random, size: int) -> bytes:
    def row() -> str:
        cells = (rng.choice(FIELDS[field]) for field in ("supplier", "city", "material"))
        return f"{rng.randrange(10**5)},{','.join(cells)},{rng.randrange(1, 500)},{rng.uniform(1, 90):.2f}\n"

    return _until(size, row).encode()


def _repetition_policy(rng: random.Random, size: int) -> bytes:
    rule = f"Entries on {rng.choice(TOPICS)} are kept for {rng.choice(SCORES)} days and then removed. "
    return (rule * (size // len(rule) + 1)).encode()


def _random_bytes(rng: random.Random, size: int) -> bytes:
    return rng.randbytes(size)


def _retrieval(rng: random.Random, size: int) -> bytes:
    passages = (
        f"[{number}] {rng.choice(PEOPLE)} on {rng.choice(TOPICS)}: {rng.choice(FINDINGS)}, {rng.choice(CORPORA)}. "
        for number in range(1, 13)
    )
    return _asked(rng, size, "".join(passages))


def _long_doc_qa(rng: random.Random, size: int) -> bytes:
    memo = " ".join(f"On {topic}, {rng.choice(FINDINGS)}." for topic in rng.sample(TOPICS, len(TOPICS)))
    return _asked(rng, size, f"Memo. {memo} ")


def _very_long(rng: random.Random, size: int) -> bytes:
    return make_document("long_story_qa", rng.randrange(10**6), size + 100, num_facts=8).context.encode()


KINDS: dict[str, Kind] = {
    "short_chat": Kind("a request of two sentences", True, _short_chat),
    "many_small": Kind("one-line tickets to sort, many at a time", False, _many_small),
    "logs_uuid": Kind("log lines, alike but for random 128-bit ids", True, _logs_uuid),
    "code_repo": Kind("functions of six lines", True, _code_repo),
    "random_bytes": Kind("bytes drawn evenly, the highest entropy there is", False, _random_bytes),
    "retrieval": Kind("a dozen passages over again, and a question", False, _retrieval),
    "long_doc_qa": Kind("a memo over again, and a question", True, _long_doc_qa),
    "very_long": Kind("a story that does not repeat itself", False, _very_long),
    "tables_csv": Kind("rows of a table", True, _tables_csv),
    "repetition_policy": Kind("one sentence over again", True, _repetition_policy),
}
