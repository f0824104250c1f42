"""The made tasks: what a row holds, that it can be answered, and that it never changes."""

import json

import pytest

from corey.longbench import prompt_for
from corey.paths import SAMPLES
from corey.samples import HELD_OUT_SEED, MADE_TASKS, ROWS_PER_TASK, held_out_rows, make_document, make_row


@pytest.mark.parametrize("task", MADE_TASKS)
def test_the_committed_rows_are_what_the_generator_makes(task):
    committed = [json.loads(line) for line in (SAMPLES / f"{task}.jsonl").read_text().splitlines()]
    assert committed == list(held_out_rows(task))
    assert len(committed) == ROWS_PER_TASK


@pytest.mark.parametrize("task", MADE_TASKS)
def test_every_answer_stands_in_the_context(task):
    for row in held_out_rows(task):
        answers = row["answers"] if task != "report_summary" else row["answers"][0].removesuffix(".").split(". ")
        for answer in answers:
            words = answer.removeprefix("On ").replace(", ", ": ")
            assert words in row["context"], (row["_id"], answer)


@pytest.mark.parametrize("task", sorted(set(MADE_TASKS) - {"report_summary"}))
def test_another_fact_of_the_context_is_a_wrong_answer(task):
    document = make_document(task, seed=5, length_bytes=1000, num_facts=4)
    answers = [answers for _, answers in document.questions]
    assert len({question for question, _ in document.questions}) == 4
    assert not set(answers[0]) & set(answers[1])


@pytest.mark.parametrize("task", MADE_TASKS)
@pytest.mark.parametrize("length_bytes", [0, 500, 3000])
def test_a_document_has_about_the_length_asked_for(task, length_bytes):
    context = make_document(task, seed=1, length_bytes=length_bytes, num_facts=3).context
    assert length_bytes - 1 <= len(context) <= max(length_bytes + 80, 160)


def test_a_row_has_the_keys_of_the_official_files_and_fits_the_official_prompt():
    row = make_row("article_qa", HELD_OUT_SEED, 800)
    assert set(row) == {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
    assert row["input"] in prompt_for("qasper", row)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"task": "story"}, ValueError),
        ({"seed": "1"}, TypeError),
        ({"seed": True}, TypeError),
        ({"length_bytes": -1}, ValueError),
        ({"length_bytes": 1.5}, TypeError),
        ({"num_facts": 1}, ValueError),
        ({"num_facts": 9}, ValueError),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(change, error):
    arguments = {"task": "article_qa", "seed": 1, "length_bytes": 100, "num_facts": 3} | change
    with pytest.raises(error, match=f"^{next(iter(change))}: got"):
        make_document(**arguments)
