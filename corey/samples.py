"""Four made tasks in LongBench's JSON format, so that metrics have something to lose without a download.

Each task follows one official task in prompt, metric and shape of the context: facts stand between filler sentences,
and a question asks for one of them. Every document is a pure function of its seed. `python -m corey.samples` writes the
held-out rows of data/samples; training draws its own documents and never sees those seeds.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from corey._check import bad_type, bad_value
from corey.paths import SAMPLES
from corey.sample_words import CORPORA, FIELDS, FILLER, FINDINGS, PARSERS, PEOPLE, PLACES, SCORES, TOPICS

MADE_TASKS = {
    "long_story_qa": "narrativeqa",
    "article_qa": "qasper",
    "multi_field_qa": "multifieldqa_en",
    "report_summary": "gov_report",
}
HELD_OUT_SEED = 1_000_000  # seeds from here on are held out; training stays below
ROWS_PER_TASK = 20
CONTEXT_BYTES = (1500, 2000, 2500, 3000)  # the held-out rows cycle through these lengths


@dataclass(frozen=True)
class Document:
    """A context and every question that it answers, each with its list of accepted answers."""

    task: str
    context: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def _facts(task: str, rng: random.Random, num_facts: int) -> tuple[list[str], list[tuple[str, tuple[str, ...]]]]:
    """Fact sentences in the order of the text, and the questions on them."""
    if task == "long_story_qa":
        pairs = list(zip(rng.sample(PEOPLE, num_facts), rng.sample(PLACES, num_facts)))
        return (
            [f"{person} was waiting in the {place}." for person, place in pairs],
            [(f"Where was {person} waiting?", (f"the {place}", place)) for person, place in pairs],
        )
    if task == "article_qa":
        parsers = rng.sample(PARSERS, num_facts)
        corpora, scores = rng.sample(CORPORA, num_facts), rng.sample(SCORES, num_facts)
        facts = [
            (f"{parser} was trained on {corpus}.", f"What was {parser} trained on?", corpus)
            if rng.random() < 0.5
            else (f"{parser} reached {score} points.", f"What did {parser} reach?", f"{score} points")
            for parser, corpus, score in zip(parsers, corpora, scores)
        ]
        return [sentence for sentence, _, _ in facts], [(question, (answer,)) for _, question, answer in facts]
    if task == "multi_field_qa":
        pairs = [(field, rng.choice(FIELDS[field])) for field in rng.sample(list(FIELDS), num_facts)]
        return (
            [f"The {field} is {value}." for field, value in pairs],
            [(f"What is the {field}?", (value,)) for field, value in pairs],
        )
    pairs = list(zip(rng.sample(TOPICS, num_facts), rng.sample(FINDINGS, num_facts)))
    summary = " ".join(f"On {topic}, {finding}." for topic, finding in pairs)
    return [f"Finding on {topic}: {finding}." for topic, finding in pairs], [("", (summary,))]


def make_document(task: str, seed: int, length_bytes: int, num_facts: int) -> Document:
    """A document of about `length_bytes` bytes that states `num_facts` facts (2 to 8) at random places."""
    if task not in MADE_TASKS:
        raise bad_value("task", repr(task), f"one of {', '.join(MADE_TASKS)}")
    for name, value in {"seed": seed, "length_bytes": length_bytes, "num_facts": num_facts}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise bad_type(name, value, "an int")
    if not 2 <= num_facts <= 8:
        raise bad_value("num_facts", num_facts, "2 to 8")
    if not 0 <= length_bytes <= 1_000_000:
        raise bad_value("length_bytes", length_bytes, "0 to 1 000 000 bytes")
    rng = random.Random(f"{task}/{seed}")
    sentences, questions = _facts(task, rng, num_facts)
    subjects, verbs, tails = FILLER[task]
    filler, missing = [], length_bytes - sum(len(sentence) + 1 for sentence in sentences)
    while missing > 0:
        filler.append(f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(tails)}")
        missing -= len(filler[-1]) + 1
    # each fact goes in front of a random filler sentence; facts keep their order
    places = sorted(rng.randrange(len(filler) + 1) for _ in sentences)
    for offset, (place, sentence) in enumerate(zip(places, sentences)):
        filler.insert(place + offset, sentence)
    paragraphs = [" ".join(filler[i : i + 8]) for i in range(0, len(filler), 8)]
    return Document(task, "\n".join(paragraphs), tuple(questions))


def make_row(task: str, seed: int, length_bytes: int) -> dict:
    """One row in LongBench's format: the first question on a document, with the keys of the official files."""
    document = make_document(task, seed, length_bytes, num_facts=4)
    question, answers = document.questions[seed % len(document.questions)]
    return {
        "input": question,
        "context": document.context,
        "answers": list(answers),
        "length": len(document.context.split()),
        "dataset": task,
        "language": "en",
        "all_classes": None,
        "_id": f"{task}-{seed}",
    }


def held_out_rows(task: str, rows: int = ROWS_PER_TASK) -> Iterator[dict]:
    """The first `rows` held-out rows of a task; the first 20 are the ones committed in data/samples."""
    for index in range(rows):
        yield make_row(task, HELD_OUT_SEED + index, CONTEXT_BYTES[index % len(CONTEXT_BYTES)])


def main() -> None:
    SAMPLES.mkdir(parents=True, exist_ok=True)
    for task in MADE_TASKS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in held_out_rows(task)]
        (SAMPLES / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
