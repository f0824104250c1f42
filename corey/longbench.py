"""LongBench as its authors run it, and as the COREY paper ran it, as two `Protocol` objects over the same rows.

Prompts, generation lengths and metrics of the official protocol come from lm-eval's task files and are not copied here.
Truncation is the official one (the middle of the tokenised prompt goes), which lm-eval itself does not offer for
transformers models. The published protocol keeps the paper's templates, cuts on the right and scores only the first
answer.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from corey._check import bad_type, bad_value
from corey.longbench_rows import TASKS, check_task, download, load_rows

__all__ = ["TASKS", "Prompt", "Protocol", "Score", "download", "load_rows", "official", "prompt_for", "published"]

MAX_RECURSION = 100_000  # frames granted to the rouge package; a longer pair is reported, not scored as zero
PUBLISHED_TEMPLATES = {
    "narrativeqa": "Context:\n{context}\n\nQuestion: {input}\nAnswer:",
    "qasper": "Document:\n{context}\n\nQuestion: {input}\nAnswer:",
    "multifieldqa_en": "Document:\n{context}\n\nQuestion: {input}\nShort answer:",
    "gov_report": "Report:\n{context}\n\nWrite a concise summary:\n",
}
PUBLISHED_MAX_NEW_TOKENS = {"narrativeqa": 128, "qasper": 96, "multifieldqa_en": 64, "gov_report": 256}


@dataclass(frozen=True)
class Prompt:
    """Token ids ready for the model, how many tokens the prompt had before it was cut, and whether it was."""

    ids: tuple[int, ...]
    tokens_before: int
    truncated: bool


@dataclass(frozen=True)
class Score:
    """A metric in [0, 1], and why rouge could not be computed for an answer (it then counts as zero): "" when it could,
    "empty" (one of the two holds no word) or "recursion" (deeper than MAX_RECURSION frames)."""

    value: float
    failure: str = ""


@dataclass(frozen=True)
class Protocol:
    """How a row becomes a prompt and a prediction becomes a score. Made by `official` and `published`."""

    name: str
    max_new_tokens: Mapping[str, int]
    _render: Callable[[str, dict], str]
    _cut: Callable[[object, str, int], tuple[list[int], int]]
    _score: Callable[[str, str, dict], Score]

    def prompt(self, task: str, row: dict) -> str:
        """The whole prompt as text. task: official name. row: one dict of `load_rows`."""
        check_task(task)
        _check_prompt_row(row)
        return self._render(task, row)

    def encode(self, tokenizer, task: str, row: dict, max_prompt_tokens: int) -> Prompt:
        """The prompt in token ids, cut to `max_prompt_tokens` the way the protocol cuts.

        tokenizer: a transformers tokenizer. The official cut decodes both halves and tokenises again, so its length may
        differ from `max_prompt_tokens` by a few tokens where the cut splits a character or a word.
        """
        text = self.prompt(task, row)
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise bad_type("tokenizer", tokenizer, "a transformers tokenizer")
        if not isinstance(max_prompt_tokens, int) or isinstance(max_prompt_tokens, bool):
            raise bad_type("max_prompt_tokens", max_prompt_tokens, "an int")
        if max_prompt_tokens < 2:
            raise bad_value("max_prompt_tokens", max_prompt_tokens, "at least 2 tokens")
        ids, tokens_before = self._cut(tokenizer, text, max_prompt_tokens)
        return Prompt(tuple(ids), tokens_before, truncated=tokens_before > max_prompt_tokens)

    def score(self, task: str, prediction: str, row: dict) -> Score:
        """Metric of one prediction against the row's answers, in [0, 1]."""
        check_task(task)
        if not isinstance(prediction, str):
            raise bad_type("prediction", prediction, "a str")
        if not isinstance(row, dict):
            raise bad_type("row", row, "a dict")
        answers = row.get("answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise bad_value("row field answers", repr(answers), "a list of at least one str")
        return self._score(task, prediction, row)


def official() -> Protocol:
    """LongBench's own protocol: its prompts, truncation in the middle, generation lengths, metrics over all answers."""
    lengths = {task: int(_config(task)["generation_kwargs"]["max_gen_toks"]) for task in TASKS}
    return Protocol("official", lengths, _official_prompt, _cut_middle, _official_score)


def published(cut: str = "right") -> Protocol:
    """The paper's protocol: short templates, truncation on the right, the first answer only, exact match for
    multifieldqa_en. Normalisation and ROUGE-L are lm-eval's, since the paper does not say which it used.

    cut="middle" (name "published_middle_cut") changes the truncation to the official one and nothing else.
    """
    cuts = {"right": ("published", _cut_right), "middle": ("published_middle_cut", _cut_middle)}
    if cut not in cuts:
        raise bad_value("cut", repr(cut), "'right' or 'middle'")
    name, function = cuts[cut]
    return Protocol(name, PUBLISHED_MAX_NEW_TOKENS, _published_prompt, function, _published_score)


_PROTOCOLS = {"official": official, "published": published}


def prompt_for(task: str, row: dict, protocol: str = "official") -> str:
    """The whole prompt of a row under a protocol's name, without truncation."""
    if protocol not in _PROTOCOLS:
        raise bad_value("protocol", repr(protocol), f"one of {', '.join(_PROTOCOLS)}")
    return _PROTOCOLS[protocol]().prompt(task, row)


def _check_prompt_row(row: object) -> None:
    if not isinstance(row, dict):
        raise bad_type("row", row, "a dict")
    for field in ("input", "context"):
        if not isinstance(row.get(field), str):
            raise bad_type(f"row field {field}", row.get(field), "a str")


@cache
def _config(task: str) -> dict:
    """lm-eval's task file: prompt template, generation lengths and the metric's function."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using slow pure-python")  # fuzzywuzzy's, which these tasks do not call
        return load_yaml(str(files("lm_eval") / "tasks" / "longbench" / f"{task}.yaml"))


def _official_prompt(task: str, row: dict) -> str:
    from lm_eval.utils import apply_template

    # lm-eval's rows come from a copy of the data set that calls the question `question`
    return apply_template(_config(task)["doc_to_text"], {"context": row["context"], "question": row["input"]})


def _published_prompt(task: str, row: dict) -> str:
    return PUBLISHED_TEMPLATES[task].format(context=row["context"], input=row["input"])


def _token_ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def _cut_middle(tokenizer, text: str, max_tokens: int) -> tuple[list[int], int]:
    """Both ends of the tokenised prompt, max_tokens // 2 tokens each, joined as text and tokenised again."""
    ids = _token_ids(tokenizer, text)
    if len(ids) <= max_tokens:
        return ids, len(ids)
    half = max_tokens // 2
    head, tail = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return _token_ids(tokenizer, head + tail), len(ids)


def _cut_right(tokenizer, text: str, max_tokens: int) -> tuple[list[int], int]:
    ids = _token_ids(tokenizer, text)
    return ids[:max_tokens], len(ids)


def _official_score(task: str, prediction: str, row: dict) -> Score:
    process_results = _config(task)["process_results"]
    with _recursion_room([prediction, *row["answers"]]) as enough:
        value = float(process_results({"answers": row["answers"]}, [prediction])["score"])
        if "rouge" in process_results.__name__ and (value == 0 or not enough):
            return Score(value, _rouge_failure(prediction, row["answers"]))
    return Score(value)


def _published_score(task: str, prediction: str, row: dict) -> Score:
    first = {"answers": row["answers"][:1]}
    if task != "multifieldqa_en":
        return _official_score(task, prediction, first)
    normalise = sys.modules[_config(task)["process_results"].__module__].normalize_answer
    return Score(float(normalise(prediction) == normalise(first["answers"][0])))


@contextmanager
def _recursion_room(texts: list[str]) -> Iterator[bool]:
    """Room for rouge's recursion, one frame a word of both texts, whatever the depth of the stack that calls it.

    At the interpreter's own limit a long sentence overflows, and the metric turns that into a score of zero. Yields
    whether MAX_RECURSION leaves enough room.
    """
    limit = sys.getrecursionlimit()
    needed = 2 * max(len(text.split(" ")) for text in texts) + limit + 200
    sys.setrecursionlimit(max(limit, min(needed, MAX_RECURSION)))
    try:
        yield needed <= MAX_RECURSION
    finally:
        sys.setrecursionlimit(limit)


def _rouge_failure(prediction: str, answers: list[str]) -> str:
    """Why lm-eval's rouge returned zero: it catches every error of the rouge package, so ask the package itself."""
    from rouge import Rouge

    for answer in answers:
        try:
            Rouge().get_scores([prediction.strip()], [answer], avg=True)
        except RecursionError:
            return "recursion"
        except ValueError as error:  # the package's refusal of a text without words
            if "empty" not in str(error).lower():
                raise
            return "empty"
    return ""
