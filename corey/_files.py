"""Files that are whole or absent, whatever happens while they are written, and sizes above which none is read."""

import gzip
import json
import os
import tempfile
import zlib
from pathlib import Path

from corey._check import bad_value

MAX_BYTES = 64 << 20  # of a notebook or a result set
MAX_SETTINGS_BYTES = 1 << 20  # of a YAML file or of a state that this project wrote


def write_atomically(path: Path, content: bytes) -> Path:
    """Replace `path` by `content` in one step: a reader, or a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def sync_folder(folder: Path) -> None:
    """Make names in a folder, as a rename left them, survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_limited(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file, unpacked if its name ends with .gz; ValueError where it is longer than `limit` bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise bad_value(str(path), f"what gzip cannot read ({error})", "a whole .gz file") from error
    if len(content) > limit:
        raise bad_value(str(path), f"more than {limit} bytes", f"at most {limit}")
    return content


def parse_json(content: bytes, path: Path) -> dict:
    """A JSON object; ValueError naming the file for anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise bad_value(str(path), f"what is no JSON ({type(error).__name__}: {error})", "a JSON object") from error
    if not isinstance(found, dict):
        raise bad_value(str(path), f"a JSON {type(found).__name__}", "a JSON object")
    return found
