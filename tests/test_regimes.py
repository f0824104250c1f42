"""Prompts are of the kind, length and batch that was asked for, and pure functions of their seed."""

import math
import re
from collections import Counter

import pytest
import torch

from corey.regimes import KINDS, Regime, parse_regime


def text(kind, seqlen, *, seed=7):
    return bytes(Regime(kind, 1, seqlen).prompts(seed=seed)[0].tolist())


def entropy_bits(data):
    return -sum(count / len(data) * math.log2(count / len(data)) for count in Counter(data).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 1), (16, 16), (2, 300), (1, 65536)])
def test_prompts_are_bytes_of_the_shape_that_was_asked_for(kind, batch, seqlen):
    ids = Regime(kind, batch, seqlen).prompts(seed=7)
    assert ids.shape == (batch, seqlen) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() <= 255


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_depend_on_the_seed_and_the_row_and_on_nothing_else(kind):
    regime = Regime(kind, 3, 2000)
    ids = regime.prompts(seed=7)
    assert torch.equal(ids, regime.prompts(seed=7)) and torch.equal(ids[:1], Regime(kind, 1, 2000).prompts(seed=7))
    assert not torch.equal(ids, regime.prompts(seed=8))
    assert not torch.equal(ids[0], ids[1])


def test_a_question_ends_the_prompts_that_have_one():
    for kind in ("retrieval", "long_doc_qa"):
        assert re.search(rb"\nQuestion: what was found on \w+\?\nAnswer:$", text(kind, 500))
        assert text(kind, 10) == b"s?\nAnswer:"


def test_kinds_are_what_they_say():
    assert len(re.findall(rb"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", text("logs_uuid", 2000))) > 20
    exec(text("code_repo", 4000).rpartition(b"def ")[0], {})
    assert all(line.count(b",") == 5 for line in text("tables_csv", 2000).splitlines()[:-1])
    sentence = text("repetition_policy", 2000).partition(b". ")[0]
    assert text("repetition_policy", 2000).count(sentence) > 20
    passage = text("retrieval", 8000).partition(b"[2]")[0]
    assert text("retrieval", 8000).count(passage) > 3
    story = text("very_long", 8000)
    assert story.count(story[:60]) == 1


def test_random_bytes_have_the_most_entropy_and_one_sentence_the_least():
    found = {kind: entropy_bits(text(kind, 20000)) for kind in KINDS}
    assert max(found, key=found.get) == "random_bytes" and found["random_bytes"] > 7.9
    assert min(found["tables_csv"], found["logs_uuid"]) < 5


def test_a_regime_is_kind_batch_and_tokens():
    assert parse_regime("short_chat 16 x 32") == Regime("short_chat", 16, 32)
    assert parse_regime("many_small 64x16") == Regime("many_small", 64, 16)
    for wrong in ("short_chat", "short_chat 16", "short_chat 0 x 32", "short_chat 4 x -1", "poetry 4 x 32", "4 x 32"):
        with pytest.raises(ValueError, match="regime: got"):
            parse_regime(wrong)
