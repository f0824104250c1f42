"""LongBench rows, prompts, truncation and metrics, against lm-eval and against made-up bad input."""

import http.server
import json
import os
import random
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the metrics are lm-eval's")

from corey import longbench  # noqa: E402
from corey.longbench import TASKS, Score, download, load_rows, official, prompt_for, published  # noqa: E402
from corey.longbench_rows import MAX_LINE_BYTES  # noqa: E402

ROW = {
    "input": "What colour is the boat?",
    "context": "The boat is red. The sea is wide.",
    "answers": ["red", "a red boat"],
    "length": 8,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "r1",
}


class ByteTokenizer:
    """One token a byte after a start token 256, as a tokenizer that adds special tokens does."""

    def __call__(self, text, truncation, verbose):
        return {"input_ids": [256, *text.encode()]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(tmp_path, content: bytes, name="qasper.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


# ---- rows


@pytest.mark.parametrize("task", TASKS)
def test_made_rows_load_for_every_official_task(task):
    rows = load_rows("made", task)
    assert len(rows) == 20
    assert len({row["_id"] for row in rows}) == 20


def test_a_folder_a_file_a_zip_and_a_parquet_file_give_the_same_rows(tmp_path):
    rows = [{**ROW, "_id": f"r{i}", "context": f"line\u2028separator {i} é"} for i in range(3)]
    path = write(tmp_path, lines(*rows))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(path, "data/qasper.jsonl")
        archive.writestr("data/gov_report.jsonl", "not read")
    import pyarrow as pa
    import pyarrow.parquet as pq

    renamed = [{("question" if key == "input" else key): value for key, value in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(renamed), tmp_path / "part.parquet")
    for source in (tmp_path, path, str(path), tmp_path / "data.zip", tmp_path / "part.parquet"):
        assert load_rows(source, "qasper") == rows


def test_a_byte_order_mark_is_dropped_and_limit_stops_before_later_faults(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + lines(ROW) + b"broken\n")
    assert load_rows(path, "qasper", limit=1) == [ROW]


BAD_FIRST_LINES = {
    "not_json": (b'{"input": \n', "one JSON object"),
    "blank_line": (b"\n", "one JSON object"),
    "two_objects": (b"{} {}\n", "one JSON object"),
    "array": (b"[1]\n", "a JSON object"),
    "not_utf8": (b'{"input": "\xff"}\n', "UTF-8"),
    "utf16": ("\ufeff{}".encode("utf-16-le") + b"\n", "UTF-8"),
    "second_bom": (b"\xef\xbb\xbf" + lines(ROW), "one JSON object"),
    "nan": (lines({**ROW, "length": float("nan")}), "NaN"),
    "field_twice": (lines(ROW).replace(b'"input"', b'"_id": "x", "input"'), "field _id twice"),
    "too_deep": (b"[" * 200_000 + b"\n", "flat JSON"),
    "too_long": (b" " * (MAX_LINE_BYTES + 1), "bytes"),
    "no_context": (lines({k: v for k, v in ROW.items() if k != "context"}), "field context: got nothing"),
    "blank_context": (lines({**ROW, "context": " \n"}), "field context"),
    "number_context": (lines({**ROW, "context": 3}), "field context: got int"),
    "null_input": (lines({**ROW, "input": None}), "field input: got NoneType"),
    "surrogate": (lines({**ROW, "input": "\ud800"}), "field input: got a lone surrogate"),
    "answers_text": (lines({**ROW, "answers": "red"}), "field answers: got str"),
    "answers_empty": (lines({**ROW, "answers": []}), "field answers: got an empty list"),
    "answers_number": (lines({**ROW, "answers": ["red", 2]}), r"field answers\[1\]: got int"),
    "answers_blank": (lines({**ROW, "answers": [""]}), r"field answers\[0\]"),
    "length_text": (lines({**ROW, "length": "8"}), "field length: got str"),
    "length_bool": (lines({**ROW, "length": True}), "field length: got bool"),
    "length_negative": (lines({**ROW, "length": -1}), "field length: got -1"),
    "other_dataset": (lines({**ROW, "dataset": "gov_report"}), "field dataset: got 'gov_report'"),
}


@pytest.mark.parametrize("case", BAD_FIRST_LINES)
def test_a_bad_line_is_refused_with_file_line_and_field(case, tmp_path):
    line, message = BAD_FIRST_LINES[case]
    # a good line in front, so that the line number is not the first by accident
    path = write(tmp_path, lines({**ROW, "_id": "r0"}) + line)
    with pytest.raises((ValueError, TypeError), match=rf"qasper\.jsonl line 2.*{message}"):
        load_rows(path, "qasper")


def test_a_repeated_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2 field _id: got 'r1'"):
        load_rows(write(tmp_path, lines(ROW, ROW)), "qasper")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        pytest.param(("made", "trec"), ValueError, "task", id="unknown_task"),
        pytest.param(("made", None), TypeError, "task", id="no_task"),
        pytest.param((3, "qasper"), TypeError, "source", id="source_number"),
        pytest.param(("missing.jsonl", "qasper"), FileNotFoundError, "source", id="no_file"),
        pytest.param((Path(__file__), "qasper"), ValueError, "source", id="other_suffix"),
    ],
)
def test_bad_sources_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        load_rows(*arguments)


@pytest.mark.parametrize(
    "limit, error", [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), (21, ValueError)]
)
def test_bad_limits_are_refused(limit, error):
    with pytest.raises(error, match="limit"):
        load_rows("made", "qasper", limit=limit)


def test_an_empty_file_and_an_oversized_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without rows"):
        load_rows(write(tmp_path, b""), "qasper")
    path = write(tmp_path, b"")
    os.truncate(path, (512 << 20) + 1)  # sparse
    with pytest.raises(ValueError, match="bytes"):
        load_rows(path, "qasper")


def test_a_zip_must_hold_the_task_exactly_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a/qasper.jsonl", lines(ROW))
        archive.writestr("b/qasper.jsonl", lines(ROW))
    with pytest.raises(ValueError, match="2 members"):
        load_rows(tmp_path / "data.zip", "qasper")


def test_real_rows_load_where_a_folder_is_given():
    folder = os.environ.get("COREY_LONGBENCH")
    if not folder:
        pytest.skip("COREY_LONGBENCH does not name a folder of LongBench rows")
    found = [task for task in TASKS if (Path(folder) / f"{task}.jsonl").is_file()]
    assert found
    for task in found:
        for row in load_rows(folder, task):
            assert official().score(task, row["answers"][0], row).value > 0.99


# ---- download


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local server in the place of the hub, and the sha256 of the file it serves."""
    import hashlib

    revision = "0123456789abcdef" * 2 + "01234567"
    root = tmp_path / "served" / "datasets" / "zai-org" / "LongBench" / "resolve" / revision
    root.mkdir(parents=True)
    content = lines(ROW)
    (root / "qasper.jsonl").write_bytes(content)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield revision, hashlib.sha256(content).hexdigest()
    server.shutdown()
    server.server_close()


def test_a_download_is_kept_only_if_its_digest_matches(hub, tmp_path):
    revision, sha256 = hub
    path = download(revision, sha256, filename="qasper.jsonl")
    assert load_rows(path, "qasper") == [ROW]
    with pytest.raises(ValueError, match="hash"):
        download(revision, "0" * 64, filename="qasper.jsonl")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "change, name",
    [
        pytest.param({"revision": "main"}, "revision", id="branch"),
        pytest.param({"revision": "A" * 40}, "revision", id="upper_case"),
        pytest.param({"sha256": "0" * 63}, "sha256", id="short_digest"),
        pytest.param({"sha256": None}, "sha256", id="no_digest"),
        pytest.param({"repository": "../x/y"}, "repository", id="climbing_repository"),
        pytest.param({"filename": "../data.zip"}, "filename", id="climbing_file"),
        pytest.param({"filename": "LongBench.py"}, "filename", id="script"),
    ],
)
def test_downloads_are_refused_unless_pinned(change, name):
    arguments = {"revision": "0" * 40, "sha256": "0" * 64, **change}
    with pytest.raises((ValueError, TypeError), match=name):
        download(**arguments)


# ---- prompts and truncation


@pytest.mark.parametrize("task", TASKS)
def test_official_prompts_hold_the_task_files_text_and_the_row_untouched(task):
    row = {**ROW, "context": "braces {x} {{y}} {% z %}\n\n", "input": "percent %s {context}?"}
    text = prompt_for(task, row)
    before, after = longbench._config(task)["doc_to_text"].split("{{context}}")
    assert text == before + row["context"] + after.replace("{{question}}", row["input"])
    assert ("asconcisely" in text) == (task == "narrativeqa")


def test_the_two_protocols_ask_differently():
    shapes = {name: {task: prompt_for(task, ROW, name) for task in TASKS} for name in ("official", "published")}
    assert shapes["published"]["qasper"] == f"Document:\n{ROW['context']}\n\nQuestion: {ROW['input']}\nAnswer:"
    assert shapes["published"]["multifieldqa_en"].endswith(f"Question: {ROW['input']}\nShort answer:")
    assert shapes["published"]["gov_report"] == f"Report:\n{ROW['context']}\n\nWrite a concise summary:\n"
    assert shapes["official"]["gov_report"].endswith("\n\nSummary:")
    assert ROW["input"] not in shapes["official"]["gov_report"]
    assert official().max_new_tokens == {"narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "gov_report": 512}
    assert published().max_new_tokens == {"narrativeqa": 128, "qasper": 96, "multifieldqa_en": 64, "gov_report": 256}


@pytest.mark.parametrize("max_tokens", [2, 3, 64, 65, 500])
def test_the_official_cut_keeps_both_ends_in_equal_parts(max_tokens):
    tokenizer, text = ByteTokenizer(), prompt_for("qasper", ROW).encode()
    prompt = official().encode(tokenizer, "qasper", ROW, max_tokens)
    half = max_tokens // 2
    # the start token is part of the head, skipped by decoding and added again
    assert prompt.ids == (256, *text[: half - 1], *text[-half:])
    assert prompt.tokens_before == len(text) + 1
    assert prompt.truncated


def test_the_published_cut_drops_the_question():
    tokenizer, text = ByteTokenizer(), prompt_for("qasper", ROW, "published").encode()
    prompt = published().encode(tokenizer, "qasper", ROW, 30)
    assert prompt.ids == (256, *text[:29])
    assert prompt.truncated
    assert b"Question" not in bytes(prompt.ids[1:])


def test_the_published_prompt_keeps_its_question_when_only_the_cut_is_changed():
    tokenizer, text = ByteTokenizer(), prompt_for("qasper", ROW, "published").encode()
    prompt = published(cut="middle").encode(tokenizer, "qasper", ROW, 60)
    assert bytes(prompt.ids[1:]) == text[:29] + text[-30:]
    assert published(cut="middle").name != published().name == "published"


@pytest.mark.parametrize("protocol", [official, published])
def test_a_prompt_that_fits_is_not_touched(protocol):
    text = protocol().prompt("qasper", ROW).encode()
    prompt = protocol().encode(ByteTokenizer(), "qasper", ROW, len(text) + 1)
    assert prompt.ids == (256, *text)
    assert not prompt.truncated


def test_a_cut_through_a_character_is_decoded_as_the_official_code_does():
    row = {**ROW, "context": "é" * 2000}
    prompt = official().encode(ByteTokenizer(), "qasper", row, 1001)
    assert "\ufffd" in bytes(i for i in prompt.ids if i < 256).decode()
    assert prompt.truncated


@pytest.mark.parametrize(
    "call, name",
    [
        pytest.param(lambda: prompt_for("qasper", ROW, "paper"), "protocol", id="protocol"),
        pytest.param(lambda: published(cut="left"), "cut", id="cut"),
        pytest.param(lambda: prompt_for("qasper", []), "row", id="row"),
        pytest.param(lambda: prompt_for("qasper", {**ROW, "input": 1}), "row field input", id="input"),
        pytest.param(lambda: prompt_for("hotpotqa", ROW), "task", id="task"),
        pytest.param(lambda: official().encode("gpt2", "qasper", ROW, 9), "tokenizer", id="tokenizer"),
        pytest.param(lambda: official().encode(ByteTokenizer(), "qasper", ROW, 1), "max_prompt_tokens", id="one_token"),
        pytest.param(lambda: official().encode(ByteTokenizer(), "qasper", ROW, 9.0), "max_prompt_tokens", id="float"),
        pytest.param(lambda: official().score("qasper", None, ROW), "prediction", id="prediction"),
        pytest.param(lambda: official().score("qasper", "red", {"answers": []}), "answers", id="answers"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises((ValueError, TypeError), match=name):
        call()


# ---- metrics


GOLDEN = [  # (task, prediction, answers, official score), computed with lm-eval 0.4.13
    ("qasper", "The red boat!", ["red", "a red boat"], 1.0),
    ("qasper", "It is red", ["red", "a red boat"], 0.5),
    ("qasper", "blue", ["red"], 0.0),
    ("narrativeqa", "at the old mill by the river", ["the mill", "mill"], 1 / 3),
    ("multifieldqa_en", "copper, the copper", ["copper"], 2 / 3),
    ("gov_report", "Costs rose. Staff fell.", ["Costs rose sharply. Staff fell."], 0.8888888839506174),
    ("gov_report", "Costs rose.", ["Staff fell."], 0.0),
]


@pytest.mark.parametrize("task, prediction, answers, score", GOLDEN)
def test_official_scores_match_golden_values(task, prediction, answers, score):
    assert official().score(task, prediction, {"answers": answers}).value == pytest.approx(score, abs=1e-12)


def test_official_scores_are_lm_evals_own_on_random_texts():
    from lm_eval.tasks.longbench import metrics

    rng, words = (
        random.Random(0),
        ["the", "a", "red", "blue", "boat", "sea.", "wide,", "is", "it!", "On", "bridges", "costs", "rose"],
    )
    for _ in range(200):
        prediction, *answers = (" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(3))
        doc = {"answers": answers}
        assert (
            official().score("qasper", prediction, doc).value
            == metrics.get_qa_f1_score(doc, [prediction])["qa_f1_score"]
        )
        assert (
            official().score("gov_report", prediction, doc).value
            == metrics.get_rouge_score(doc, [prediction])["rouge_score"]
        )


def test_published_scores_look_at_the_first_answer_and_at_exact_matches():
    row = {"answers": ["a red boat", "red"]}
    assert published().score("qasper", "red", row).value == pytest.approx(2 / 3)
    assert official().score("qasper", "red", row).value == 1.0
    assert published().score("multifieldqa_en", "The red boat.", row).value == 1.0
    assert published().score("multifieldqa_en", "red", row).value == 0.0
    assert official().score("multifieldqa_en", "red", row).value == 1.0


@pytest.mark.parametrize("prediction", ["", " ", "...", "\n"])
def test_a_prediction_without_words_scores_zero_and_says_why(prediction):
    assert official().score("gov_report", prediction, {"answers": ["Costs rose."]}) == Score(0.0, "empty")
    assert official().score("qasper", prediction, {"answers": ["red"]}) == Score(0.0)


def at_depth(frames, call):
    return call() if frames == 0 else at_depth(frames - 1, call)


def test_a_long_sentence_scores_the_same_at_any_stack_depth():
    from lm_eval.tasks.longbench import metrics

    # run-on sentences of 470 words: the rouge package recurses once a word
    prediction = " ".join(f"w{i}" for i in range(470))
    row = {"answers": [" ".join(f"w{2 * i}" for i in range(470))]}
    shallow = official().score("gov_report", prediction, row)
    deep = at_depth(600, lambda: official().score("gov_report", prediction, row))
    assert shallow == deep == Score(pytest.approx(0.5, abs=1e-6))
    # without the room, lm-eval's metric turns the overflow into a zero
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        assert at_depth(600, lambda: metrics.get_rouge_score(row, [prediction]))["rouge_score"] == 0.0
    finally:
        sys.setrecursionlimit(limit)


def test_the_recursion_limit_is_given_back():
    limit = sys.getrecursionlimit()
    official().score("gov_report", " ".join("w" * 5000), {"answers": ["w x"]})
    assert sys.getrecursionlimit() == limit


def test_an_overflow_beyond_the_room_is_reported(monkeypatch):
    monkeypatch.setattr(longbench, "MAX_RECURSION", 400)
    words = [f"w{i}" for i in range(1200)]
    row = {"answers": ["w1199", " ".join(reversed(words))]}
    score = official().score("gov_report", " ".join(words), row)
    assert score.failure == "recursion"
    assert score.value > 0  # the short answer was computed: the failure is told nonetheless
