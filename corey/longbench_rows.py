"""LongBench rows from a file, a folder, the made samples or a pinned hub file, each checked field by field.

Rows are plain dicts with LongBench's keys. Nothing here runs code that came with the data: JSON lines are parsed by the
standard library, parquet by pyarrow, and a download is accepted only by its sha256.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from corey._check import bad_type, bad_value
from corey.paths import SAMPLES
from corey.samples import MADE_TASKS

TASKS = ("narrativeqa", "qasper", "multifieldqa_en", "gov_report")  # official names
MAX_FILE_BYTES = 512 << 20  # the largest official file is some 25 MB
MAX_LINE_BYTES = 16 << 20
_MADE_NAME = {official: made for made, official in MADE_TASKS.items()}
_BOM = b"\xef\xbb\xbf"


def check_task(task: str) -> str:
    if not isinstance(task, str):
        raise bad_type("task", task, "a str")
    if task not in TASKS:
        raise bad_value("task", repr(task), f"one of {', '.join(TASKS)}")
    return task


def load_rows(source: str | Path, task: str, *, limit: int | None = None) -> list[dict]:
    """Rows of one task, checked.

    source: "made" for the committed samples; a .jsonl or .parquet file; a folder that holds <task>.jsonl; or a .zip
        with a member <task>.jsonl (LongBench's own data.zip).
    task: official name, one of TASKS. limit: the first `limit` rows, None for all; rows beyond it are not read.

    Raises ValueError or TypeError that names file, line and field; FileNotFoundError for a path that is not there.
    """
    check_task(task)
    if not isinstance(source, str | Path):
        raise bad_type("source", source, '"made" or a path')
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise bad_type("limit", limit, "an int or None")
    if limit is not None and limit < 1:
        raise bad_value("limit", limit, "at least 1, or None for all rows")
    path = SAMPLES / f"{_MADE_NAME[task]}.jsonl" if source == "made" else Path(source)
    if path.is_dir():
        path = path / f"{task}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"source: got {path}, want a .jsonl, .zip or .parquet file, or a folder with {task}.jsonl"
        )
    if path.suffix not in _READERS:
        raise bad_value("source", path.name, f"a file ending in {', '.join(_READERS)}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise bad_value("source", f"{path.name} of {path.stat().st_size} bytes", f"at most {MAX_FILE_BYTES} bytes")
    datasets = {task, _MADE_NAME[task]}
    rows, seen = [], set()
    for where, row in _READERS[path.suffix](path, task):
        _check_row(row, where, datasets)
        if row["_id"] in seen:
            raise bad_value(f"{where} field _id", repr(row["_id"]), "an id that no earlier row has")
        seen.add(row["_id"])
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise bad_value("source", f"{path.name} without rows", "at least one row")
    if limit is not None and len(rows) < limit:
        raise bad_value("limit", limit, f"at most the {len(rows)} rows of {path.name}")
    return rows


def download(revision: str, sha256: str, *, repository: str = "zai-org/LongBench", filename: str = "data.zip") -> Path:
    """Fetch one file of a hub dataset at a pinned commit into pooch's cache and return its path, for `load_rows`.

    revision: the 40 hexadecimal digits of a commit (a branch may move, so it is refused). sha256: the 64 hexadecimal
    digits of the file's digest; a file with another one is refused and not kept. The server is HF_ENDPOINT, as for the
    hub's own client. Raises ValueError for an argument that does not pin the file and for a digest that does not match.
    """
    for name, value in {"revision": revision, "sha256": sha256, "repository": repository, "filename": filename}.items():
        if not isinstance(value, str):
            raise bad_type(name, value, "a str")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise bad_value("revision", repr(revision), "the 40 hexadecimal digits of a commit")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise bad_value("sha256", repr(sha256), "the 64 hexadecimal digits of the file's digest")
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*/[\w-]+(\.[\w-]+)*", repository):
        raise bad_value("repository", repr(repository), "owner/name")
    if not re.fullmatch(r"([\w-]+/)*[\w-]+(\.[\w-]+)*\.(zip|parquet|jsonl)", filename):
        raise bad_value("filename", repr(filename), "a relative path that ends in .zip, .parquet or .jsonl")
    import pooch

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return Path(
        pooch.retrieve(
            f"{endpoint}/datasets/{repository}/resolve/{revision}/{filename}",
            known_hash=f"sha256:{sha256}",
            fname=f"{sha256[:16]}-{Path(filename).name}",
            path=pooch.os_cache("corey"),
        )
    )


def _read_jsonl(path: Path, task: str) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as stream:
        yield from _json_lines(stream, path.name)


def _read_zip(path: Path, task: str) -> Iterator[tuple[str, dict]]:
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if Path(info.filename).name == f"{task}.jsonl"]
        if len(members) != 1:
            raise bad_value("source", f"{path.name} with {len(members)} members {task}.jsonl", "exactly one")
        if members[0].file_size > MAX_FILE_BYTES:
            raise bad_value(
                "source", f"{path.name} member of {members[0].file_size} bytes", f"at most {MAX_FILE_BYTES}"
            )
        with archive.open(members[0]) as stream:
            yield from _json_lines(stream, f"{path.name}/{members[0].filename}")


def _read_parquet(path: Path, task: str) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    # the parquet copies on the hub call the question `question`; LongBench's own files call it `input`
    names = ["input" if name == "question" else name for name in table.column_names]
    for number, row in enumerate(table.rename_columns(names).to_pylist(), start=1):
        yield f"{path.name} row {number}", row


_READERS = {".jsonl": _read_jsonl, ".zip": _read_zip, ".parquet": _read_parquet}


def _json_lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, dict]]:
    """Objects of a JSON-lines stream; a byte-order mark at its start is dropped, everything else must be exact."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{name} line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise bad_value(where, f"more than {MAX_LINE_BYTES} bytes", f"at most {MAX_LINE_BYTES}")
        if number == 1:
            line = line.removeprefix(_BOM)
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        except UnicodeDecodeError as error:
            raise bad_value(where, f"byte {line[error.start]:#04x} at {error.start}", "UTF-8") from error
        except (json.JSONDecodeError, _BadJsonError) as error:
            raise bad_value(where, str(error), "one JSON object a line") from error
        except RecursionError as error:
            raise bad_value(where, "JSON nested too deeply", "one flat JSON object a line") from error
        yield where, row


class _BadJsonError(ValueError):
    """JSON that the standard library would accept though no LongBench row may hold it."""


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _BadJsonError(f"field {next(name for name in names if names.count(name) > 1)} twice")
    return row


def _refuse_constant(constant: str) -> None:
    raise _BadJsonError(f"the constant {constant}")


def _check_row(row: object, where: str, datasets: set[str]) -> None:
    if not isinstance(row, dict):
        raise bad_type(where, row, "a JSON object")
    for field in ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"):
        if field not in row:
            raise bad_value(f"{where} field {field}", "nothing", "a value")
    for field in ("input", "context", "dataset", "language", "_id"):
        _check_text(row[field], f"{where} field {field}", may_be_empty=field == "input")
    if not isinstance(row["answers"], list):
        raise bad_type(f"{where} field answers", row["answers"], "a list of str")
    if not row["answers"]:
        raise bad_value(f"{where} field answers", "an empty list", "at least one answer")
    for index, answer in enumerate(row["answers"]):
        _check_text(answer, f"{where} field answers[{index}]", may_be_empty=False)
    if not isinstance(row["length"], int) or isinstance(row["length"], bool):
        raise bad_type(f"{where} field length", row["length"], "an int (words)")
    if row["length"] < 0:
        raise bad_value(f"{where} field length", row["length"], "0 or more words")
    if row["dataset"].removesuffix("_e") not in datasets:
        raise bad_value(f"{where} field dataset", repr(row["dataset"]), f"one of {', '.join(sorted(datasets))}")


def _check_text(value: object, name: str, *, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        raise bad_type(name, value, "a str")
    if not value.strip() and not may_be_empty:
        raise bad_value(name, repr(value[:20]), "text that is not blank")
    if re.search("[\ud800-\udfff]", value):
        raise bad_value(name, "a lone surrogate", "text that UTF-8 can hold")
