"""The training of corey-mini: its text, its loss, and a few real steps on a CPU."""

import random

import numpy as np
import pytest
import torch

from corey import training
from corey.samples import MADE_TASKS

TEXT = np.frombuffer(b"def f(x):\n    return x\n" * 1000, np.uint8)


@pytest.fixture(scope="module")
def templates():
    return training.prompt_templates()


def batch(templates, seqlen, *, seed=0, tokens_per_step=8192):
    rows = training.Rows([seqlen], templates, tokens_per_step, seed)
    return rows._batch(random.Random(seed), seqlen, TEXT)


def test_the_tokenizer_gives_the_bytes_of_the_text_and_the_text_back(tmp_path):
    from transformers import AutoTokenizer

    training.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Résumé:\n\n  two  spaces\t日本 \x00 Ġ"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == training.EOS


def test_every_template_holds_the_context_and_questions_where_there_are_any(templates):
    assert set(templates) == {"published", "official"}
    for by_task in templates.values():
        assert list(by_task) == list(MADE_TASKS)
        assert all("{context}" in template for template in by_task.values())
        assert all(("{input}" in template) == (task != "report_summary") for task, template in by_task.items())


@pytest.mark.parametrize("seqlen", [256, 1024, 4096])
def test_answers_end_with_eos_and_stand_in_the_document(templates, seqlen):
    tokens, is_answer = batch(templates, seqlen)
    assert tokens.shape == is_answer.shape == (8192 // seqlen, seqlen + 1)
    assert is_answer.any()
    assert ((tokens == training.EOS) & ~is_answer).sum() == 0
    row, mask = next((row, mask) for row, mask in zip(tokens.tolist(), is_answer.tolist()) if any(mask))
    first = mask.index(True)
    answer = bytes(row[first : row.index(training.EOS)]).decode().strip()
    assert answer.removeprefix("On ").split(",")[0] in bytes(row[:first]).decode()


def test_a_batch_depends_on_its_step_and_not_on_the_number_of_workers(templates):
    rows = training.Rows([256, 512, 256], templates, 1024, seed=3)
    alone = list(rows)
    assert [tokens.shape[1] for tokens, _ in alone] == [257, 513, 257]
    again = rows._batch(random.Random("3/1"), 512, np.frombuffer(training.library_text(), np.uint8))
    assert torch.equal(alone[1][0], again[0])


class Oracle(torch.nn.Module):
    """A model that predicts given tokens with certainty."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions = predictions

    def forward(self, tokens, use_cache):
        logits = 50.0 * torch.nn.functional.one_hot(self.predictions, training.VOCAB_SIZE)
        return type("Output", (), {"logits": logits})


def test_recall_counts_whole_answers_and_losses_are_kept_apart(templates):
    tokens, is_answer = batch(templates, 512)
    tokens = tokens.long()
    perfect = tokens[:, 1:].clone()
    text_nats, answer_nats, recall = training.losses(Oracle(perfect), tokens, is_answer)
    assert (text_nats.item(), answer_nats.item(), recall.item()) == pytest.approx((0, 0, 1), abs=1e-6)
    row, position = is_answer[:, 1:].nonzero()[0].tolist()
    perfect[row, position] = 1  # one wrong byte spoils one answer
    answers = int(((tokens == training.EOS) & is_answer).sum())
    text_nats, answer_nats, recall = training.losses(Oracle(perfect), tokens, is_answer)
    assert text_nats.item() == pytest.approx(0, abs=1e-6)
    assert answer_nats.item() > 0
    assert recall.item() == pytest.approx(1 - 1 / answers)


def test_the_shifted_convolution_is_the_convolution():
    x, weight, bias = torch.randn(2, 6, 33), torch.randn(6, 4), torch.randn(6)
    expected = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=6)[..., :33]
    torch.testing.assert_close(training.short_convolution(x, weight, bias), torch.nn.functional.silu(expected))


def test_the_schedule_grows_and_the_learning_rate_falls():
    assert training.schedule(100) == sorted(training.schedule(100))
    assert set(training.schedule(100)) == {seqlen for seqlen, _ in training.STAGES}
    assert training.learning_rate(5000, 10_000) > training.learning_rate(9999, 10_000) > 0


def test_three_steps_on_a_cpu_leave_a_checkpoint_that_transformers_loads(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(training, "STAGES", ((64, 1.0),))
    log = training.train(tmp_path, 3, device="cpu", tokens_per_step=128, workers=0, log_every=1)
    assert log[-1]["text_nats_per_byte"] < log[0]["text_nats_per_byte"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 3_000_000 < sum(p.numel() for p in model.parameters()) < 5_000_000
    assert (tmp_path / "model.safetensors").stat().st_size < 12_000_000


def test_steps_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        training.train(tmp_path, 0, device="cpu")
