"""Tidy rows in and out: one CSV and one JSON of provenance per result set.

This is the only module that writes rows. The set `03_chunk_sweep` is `03_chunk_sweep.csv` and `03_chunk_sweep.json`;
the JSON is written last and holds the checksum of the CSV, so a torn, edited or unexplained set is refused on reading.
Live sets are in build/results, committed ones in data/results; `python -m corey.results publish NAME` copies. A large
set is committed as `.csv.gz`; the checksum is that of the CSV.
"""

import argparse
import gzip
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from corey import paths
from corey._check import bad_type, bad_value
from corey._files import parse_json, read_limited, write_atomically
from corey._sources import sha256, source_hashes, versions

CODE_PATHS = ("corey", "kernels", "notebooks")  # what can change a number; README edits do not make rows dirty
PROVENANCE = {  # what every record must hold; a set whose record lacks any of it is refused
    "": (
        "time_utc",
        "code",
        "versions",
        "machine",
        "notebook",
        "seeds",
        "parameters",
        "name",
        "rows",
        "columns",
        "sha256",
    ),
    "code": "commit dirty corey_sha256 kernels_sha256".split(),
    "versions": "python torch corey".split(),
    "machine": "platform cpu cores gpu".split(),
}
PACKED_FROM = 1_500_000  # bytes of a committed CSV
EVIDENCE_COLUMNS = ("claim", "quantity", "value", "low", "high", "n", "device")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_TOLD_COMMIT = re.compile(r"([0-9a-f]{40})(-dirty)?")
_TORCH_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_CPU_SUFFIX = re.compile(r", \d+ threads?$")


def write_rows(rows, name: str, *, parameters: Mapping, notebook: str | None = None) -> Path:
    """Write tidy rows to build/results/<name>.csv with their provenance; returns the path of the CSV.

    `rows` is a DataFrame or a list of dicts of scalars with a `device` column, which holds a torch device ("cpu",
    "cuda:0"; replaced by `device_name`) or a name that `device_name` gave. `parameters` are those of the run, JSON
    scalars and lists. `notebook` is the stem of the measuring notebook, e.g. "03_chunk_sweep": its cells are hashed.
    """
    _check_name("name", name)
    table = _tidy(rows)
    record = provenance(parameters, notebook=notebook)
    content = table.to_csv(index=False, lineterminator="\n").encode()
    record |= {"name": name, "rows": len(table), "columns": list(table.columns), "sha256": sha256(content)}
    return _store(paths.LIVE_RESULTS, name, content, record)


def write_evidence(rows, notebook: str, *, parameters: Mapping) -> Path:
    """Write the quantities that decide claims, as the result set `<NN>_evidence` of notebook `<NN>_...`.

    One row per claim and quantity: claim ("C01"), quantity, value and optionally low, high (an interval), n, device.
    """
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", notebook):
        raise bad_value("notebook", repr(notebook), "a stem such as '03_chunk_sweep'")
    table = pd.DataFrame(rows)
    missing = {"claim", "quantity", "value", "device"} - set(table.columns)
    extra = set(table.columns) - set(EVIDENCE_COLUMNS)
    if missing or extra:
        raise bad_value("rows", f"columns {sorted(table.columns)}", f"{', '.join(EVIDENCE_COLUMNS)} and nothing else")
    table = table.reindex(columns=list(EVIDENCE_COLUMNS))
    _check_evidence(table)
    table["value"] = table["value"].astype(float)
    return write_rows(table, f"{notebook[:2]}_evidence", parameters=parameters, notebook=notebook)


def read_rows(name: str, source: str = "live") -> pd.DataFrame:
    """Read a result set and add the column `source`, "live" or "committed".

    `source="all"` puts whichever of the two exist under each other. Raises FileNotFoundError where there is nothing to
    read and ValueError for a set without provenance, with a checksum that does not match, or of two GPU models.
    """
    _check_name("name", name)
    if source not in ("live", "committed", "all"):
        raise bad_value("source", repr(source), "'live', 'committed' or 'all'")
    wanted = ("committed", "live") if source == "all" else (source,)
    present = [each for each in wanted if _csv(_folder(each), name).exists()]
    if not present:
        raise FileNotFoundError(
            f"no {source} rows called {name}: {' and '.join(str(_csv(_folder(each), name)) for each in wanted)}"
        )
    return pd.concat([_read_one(name, each) for each in present], ignore_index=True)


def read_provenance(name: str, source: str = "live") -> dict:
    """The provenance of one result set: commit, hashes, versions, machine, parameters, time, row count and checksum."""
    return _read_record(_folder(source) / f"{name}.json")


def names(source: str = "live") -> list[str]:
    """Names of the result sets that exist, sorted."""
    return _names(_folder(source))


def publish(name: str, folder: Path | None = None) -> Path:
    """Copy a live result set, once it has been checked, to data/results; returns the path of the committed CSV.

    `folder` is where the set lies: build/results, or build/grid/<notebook>/rows for the rows of a grid.
    """
    _check_name("name", name)
    folder = paths.LIVE_RESULTS if folder is None else Path(folder)
    _, record, content = _read_set(folder, name)
    if record["code"]["commit"] == "unknown":
        raise bad_value(f"commit of {name}", "unknown", "rows of a checkout in git, or of a copy told $COREY_COMMIT")
    return _store(paths.RESULTS, name, content, record, packed=len(content) > PACKED_FROM)


def gather(runs: Mapping[str, tuple[Path, Mapping]], name: str, folder: Path, *, parameters: Mapping, notebook: str):
    """One set, <name>_grid in `folder`, from the sets `name` that the runs of a grid left; returns the path of its CSV.

    `runs` maps the identity of a run to the folder of its rows and to the parameters that the grid crosses. These
    become the columns `run` and `grid_<parameter>`; the provenance of each run is kept under `runs` in the record.
    """
    tables, records = [], {}
    for run, (results, crossed) in runs.items():
        table, records[run], _ = _read_set(results, name)
        values = {
            f"grid_{key}": json.dumps(value) if isinstance(value, list) else value for key, value in crossed.items()
        }
        taken = {"run", *values} & set(table.columns)
        if taken:
            raise bad_value(f"columns of {name}", sorted(taken), "other names: a grid adds these columns")
        front = pd.DataFrame({"run": run, **values}, index=table.index)
        tables.append(pd.concat([front, table], axis=1))
    table = _tidy(pd.concat(tables, ignore_index=True))
    content = table.to_csv(index=False, lineterminator="\n").encode()
    record = provenance(parameters, notebook=notebook) | {"name": f"{name}_grid", "rows": len(table)}
    record |= {"columns": list(table.columns), "sha256": sha256(content), "runs": records}
    return _store(folder, f"{name}_grid", content, record)


def whole_sets(folder: Path) -> list[str]:
    """Names of the result sets in a folder, each of which has been read and checked."""
    found = _names(folder)
    for name in found:
        _check_name("name", name)
        _read_set(folder, name)
    return found


def device_name(device: str | torch.device) -> str:
    """The model behind a torch device: the GPU's name, or the CPU's with the threads that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        raise bad_value("device", repr(str(device)), "'cpu' or 'cuda[:index]'")
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def is_cpu(name: str) -> bool:
    """Whether a name that `device_name` gave belongs to a CPU."""
    return bool(_CPU_SUFFIX.search(name))


def cpu_model() -> str:
    """The CPU's model without the trademark signs."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b", " ", model).split())


def machine(device: str | torch.device = "cpu") -> str:
    """One line for the top of a notebook: device, torch, Python and the commit of this checkout."""
    code = git_state()
    commit = code["commit"][:12] + (" with uncommitted changes" if code["dirty"] else "")
    return f"{device_name(device)} | torch {torch.__version__} | Python {platform.python_version()} | commit {commit}"


def provenance(parameters: Mapping, *, notebook: str | None = None) -> dict:
    """Where a number comes from: code, versions, machine, seeds, parameters and UTC time, ready for JSON."""
    if not isinstance(parameters, Mapping):
        raise bad_type("parameters", parameters, "a mapping of names to JSON values")
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": git_state() | source_hashes(notebook),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpu": cpu_model(), "cores": os.cpu_count(), "gpu": _gpus()},
        "notebook": notebook,
        "seeds": {key: value for key, value in parameters.items() if "seed" in key},
        "parameters": json.loads(json.dumps(dict(parameters), allow_nan=False)),
    }


def git_state() -> dict:
    """Commit of this checkout and whether its code paths differ from it; commit "unknown" where git cannot say.

    A copy of the sources without git, as on a lent GPU machine, may be told in $COREY_COMMIT what it is a copy of: a
    full commit hash, with "-dirty" behind it for uncommitted changes. `commit_from_environment` marks such a record,
    which rests on the word of whoever set the variable; the source hashes beside it can be checked against that commit.
    """
    top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "--verify", "HEAD")
    if top is not None and head is not None and Path(top).resolve() == paths.ROOT:
        return {"commit": head, "dirty": bool(_git("status", "--porcelain", "--", *CODE_PATHS))}
    told = os.environ.get("COREY_COMMIT")
    if told is None:
        return {"commit": "unknown", "dirty": None, "why_unknown": "no git, or no commit of this project here"}
    found = _TOLD_COMMIT.fullmatch(told)
    if found is None:
        raise bad_value("COREY_COMMIT", repr(told), "40 hexadecimal digits, with -dirty behind them or not")
    return {"commit": found[1], "dirty": found[2] is not None, "commit_from_environment": True}


def _store(folder: Path, name: str, content: bytes, record: dict, *, packed: bool = False) -> Path:
    plain, small = folder / f"{name}.csv", folder / f"{name}.csv.gz"
    path = write_atomically(small, gzip.compress(content, mtime=0)) if packed else write_atomically(plain, content)
    (plain if packed else small).unlink(missing_ok=True)
    write_atomically(
        folder / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode()
    )  # last: it marks the set whole
    return path


def _read_one(name: str, source: str) -> pd.DataFrame:
    return _read_set(_folder(source), name)[0].assign(source=source)


def _read_set(folder: Path, name: str) -> tuple[pd.DataFrame, dict, bytes]:
    path = _csv(folder, name)
    record, content = _read_record(folder / f"{name}.json"), read_limited(path)
    if sha256(content) != record["sha256"]:
        raise ValueError(f"{path} differs from the checksum in {name}.json: the rows were edited or half written")
    table = pd.read_csv(io.BytesIO(content), keep_default_na=False, na_values=[""])
    _check_devices(table["device"], path)
    return table, record, content


def _read_record(path: Path) -> dict:
    if not path.exists():
        raise ValueError(f"{path.with_suffix('.csv')} has no provenance file {path.name}, so its rows are refused")
    record = parse_json(read_limited(path), path)
    for part, wanted in PROVENANCE.items():
        found = record[part] if part else record
        missing = [key for key in wanted if not isinstance(found, dict) or key not in found]
        if missing:
            where = f"{path}, {part}" if part else str(path)
            raise bad_value(where, f"a record without {', '.join(missing)}", "the whole provenance of its rows")
    return record


def _folder(source: str) -> Path:
    if source not in ("live", "committed"):
        raise bad_value("source", repr(source), "'live' or 'committed'")
    return paths.LIVE_RESULTS if source == "live" else paths.RESULTS


def _csv(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.csv.gz"
    return packed if packed.exists() else folder / f"{name}.csv"


def _names(folder: Path) -> list[str]:
    return sorted({path.name.partition(".")[0] for path in (*folder.glob("*.csv"), *folder.glob("*.csv.gz"))})


def _check_name(argument: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_value(argument, repr(name), "lower-case letters, digits and underscores")


def _tidy(rows) -> pd.DataFrame:
    table = rows.reset_index(drop=True) if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    if table.empty:
        raise bad_value("rows", "no rows", "at least one")
    if "device" not in table.columns:
        raise bad_value("rows", f"columns {list(table.columns)}", "a column 'device'")
    if "source" in table.columns:
        raise bad_value("rows", "a column 'source'", "another name: read_rows adds that column")
    for column in table.columns:
        if not isinstance(column, str) or not column.isidentifier():
            raise bad_value("rows", f"column {column!r}", "column names that are identifiers")
        _check_scalars(table[column])
    table = table.assign(device=[_named(device) for device in table["device"]])
    _check_devices(table["device"], "rows")
    return table


def _check_scalars(column: pd.Series) -> None:
    for value in column if column.dtype == object else ():
        if not (value is None or isinstance(value, (str, bool, Real, np.generic)) or value is pd.NA):
            raise bad_type(f"rows[{column.name!r}]", value, "a scalar in every cell")


def _named(device: object) -> str:
    if isinstance(device, torch.device) or (isinstance(device, str) and _TORCH_DEVICE.fullmatch(device)):
        return device_name(device)
    if not isinstance(device, str) or not device:
        raise bad_type("device", device, "a torch device or the name of one in every row")
    return device


def _check_devices(devices: Iterable[str], where: object) -> None:
    gpus = sorted({device for device in devices if not is_cpu(device)})
    if len(gpus) > 1:
        raise ValueError(f"{where}: rows of {' and '.join(gpus)} in one result set, want one GPU model")


def _check_evidence(table: pd.DataFrame) -> None:
    for row in table.itertuples():
        if not isinstance(row.claim, str) or not re.fullmatch(r"C\d\d", row.claim):
            raise bad_value("claim", repr(row.claim), "an identifier of the ledger such as 'C01'")
        if not isinstance(row.quantity, str) or not row.quantity.isidentifier():
            raise bad_value("quantity", repr(row.quantity), "an identifier")
        if math.isnan(row.value):
            raise bad_value(f"value of {row.claim} {row.quantity}", row.value, "a number")
        if row.low > row.value or row.high < row.value:
            raise bad_value(
                f"interval of {row.claim} {row.quantity}", (row.low, row.value, row.high), "low <= value <= high"
            )
    repeated = table[table.duplicated(["claim", "quantity"])]
    if len(repeated):
        raise bad_value(
            "rows", f"{repeated.iloc[0].claim} {repeated.iloc[0].quantity} twice", "one row per claim and quantity"
        )


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "driver": driver[0],
            "cuda": torch.version.cuda,
        }
        for gpu in properties
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m corey.results", description="Copy live rows to the committed ones."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("publish", help="copy build/results/NAME to data/results")
    command.add_argument("names", nargs="+", metavar="NAME")
    command.add_argument("--from", dest="folder", type=Path, help="where they lie, build/results by default")
    options = parser.parse_args(arguments)
    for name in options.names:
        path = publish(name, options.folder)
        code = read_provenance(name, "committed")["code"]
        print(f"{path}: commit {code['commit'][:12]}, dirty {code['dirty']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
