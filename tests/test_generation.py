"""Loading a checkpoint, prefill and greedy decoding, against transformers' own generate."""

import pytest
import torch

pytest.importorskip("transformers", reason="the models are transformers'")

from corey.checkpoints import load_checkpoint
from corey.generation import greedy_decode, greedy_tokens, prefill
from corey.paths import CHECKPOINTS
from corey.routing import pytorch_on_cpu

PROMPT = list(b"def add(a, b):\n    return a")


@pytest.fixture(scope="module")
def loaded():
    if not (CHECKPOINTS / "corey-mini" / "config.json").is_file():
        pytest.skip("data/checkpoints/corey-mini is not in this checkout")
    return load_checkpoint()


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def test_the_committed_model_comes_in_evaluation_mode_with_a_byte_tokenizer(loaded):
    model, tokenizer = loaded
    assert not model.training and model.dtype == torch.float32
    assert tokenizer("é\n")["input_ids"] == list("é\n".encode())
    assert tokenizer.eos_token_id == 256


def test_greedy_tokens_are_those_of_generate(model):
    with pytorch_on_cpu():
        expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    found = greedy_tokens(model, PROMPT, max_new_tokens=12, eos_token_id=None)
    assert list(found.tokens) == expected[0, len(PROMPT) :].tolist()
    logits, _ = prefill(model, PROMPT)
    best = logits[-1].topk(2).values
    assert found.top2_gaps[0] == (best[0] - best[1]).item()


def test_decoding_stops_after_the_end_token_and_keeps_it(model):
    tokens = greedy_tokens(model, PROMPT, max_new_tokens=12, eos_token_id=None).tokens
    stop = tokens[3]
    found = greedy_tokens(model, PROMPT, max_new_tokens=12, eos_token_id=stop)
    assert found.tokens == tokens[: tokens.index(stop) + 1]
    assert len(found.top2_gaps) == len(found.tokens)


@pytest.mark.parametrize(
    "arguments, name",
    [
        pytest.param({"model": "corey-none"}, "model", id="no_such_folder"),
        pytest.param({"model": "../owner/name"}, "model", id="climbing_name"),
        pytest.param({"model": 3}, "model", id="number"),
        pytest.param({"model": "owner/name"}, "revision", id="hub_without_revision"),
        pytest.param({"model": "owner/name", "revision": "main"}, "revision", id="hub_branch"),
        pytest.param({"model": "corey-mini", "revision": "0" * 40}, "revision", id="folder_with_revision"),
        pytest.param({"dtype": torch.int8}, "dtype", id="int8"),
        pytest.param({"dtype": "float32"}, "dtype", id="dtype_name"),
    ],
)
def test_checkpoints_that_are_not_pinned_or_not_there_are_refused(arguments, name, loaded):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got"):
        load_checkpoint(**arguments)


@pytest.mark.parametrize(
    "call, name",
    [
        pytest.param(lambda m: prefill(torch.nn.Linear(1, 1), [1]), "model", id="no_language_model"),
        pytest.param(lambda m: prefill(m, "ab"), "token_ids", id="text"),
        pytest.param(lambda m: prefill(m, []), "token_ids", id="no_token"),
        pytest.param(lambda m: prefill(m, [-1]), "token_ids", id="negative"),
        pytest.param(
            lambda m: greedy_tokens(m, [1], max_new_tokens=True, eos_token_id=None), "max_new_tokens", id="true"
        ),
        pytest.param(
            lambda m: greedy_decode(m, torch.zeros(3), object(), max_new_tokens=1, eos_token_id=None),
            "logits",
            id="logits_vector",
        ),
        pytest.param(
            lambda m: greedy_decode(m, torch.zeros(1, 3), None, max_new_tokens=1, eos_token_id=None),
            "cache",
            id="cache",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name, model):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got"):
        call(model)


def test_a_model_in_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(ValueError, match="model: got a model in training mode"):
            prefill(model, [1])
    finally:
        model.eval()
