"""The folder of one run: build/grid/<notebook>/<identity>/, whose status.json is written last and says what holds.

Its states are queued, running, and for good done, failed, timeout or killed. A run is done when status.json says so and
every file has the SHA-256 listed there; anything else, torn or edited, is run again.
"""

import dataclasses
import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from corey._check import bad_value
from corey._files import MAX_SETTINGS_BYTES, parse_json, read_limited, write_atomically
from corey.supervisor import Outcome, kept

STATES = ("queued", "running", "done", "failed", "timeout", "killed")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One run of a grid on disk; `crossed` are the parameters in which the runs of the grid differ."""

    root: Path
    run: str
    parameters: dict
    crossed: dict

    @property
    def path(self) -> Path:
        """Its folder, which must lie in the root itself: a link that leads out of it is refused."""
        path = self.root / self.run
        if path.resolve() != self.root.resolve() / self.run:
            raise bad_value(f"folder of run {self.run}", f"a link to {path.resolve()}", f"a folder in {self.root}")
        return path

    def status(self) -> dict:
        """What status.json says; {} where there is none that can be read."""
        path = self.path / "status.json"
        try:
            return parse_json(read_limited(path, MAX_SETTINGS_BYTES), path)
        except (FileNotFoundError, ValueError):
            return {}

    def done(self) -> bool:
        """Whether the run was finished and all that it left is still there, unchanged."""
        status = self.status()
        files = status.get("files")
        if status.get("state") != "done" or not isinstance(files, dict) or not all(kept(name) for name in files):
            return False
        return all(_digest(self.path / name) == digest for name, digest in files.items())

    def mark(self, state: str, **more) -> None:
        """Replace status.json, in one step."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"run": self.run, "state": state, "time_utc": now, **more, "parameters": self.parameters}
        write_atomically(self.path / "status.json", (json.dumps(record, indent=1) + "\n").encode())

    def keep(self, outcome: Outcome) -> Outcome:
        """Write what a run left, then its status. A run whose rows are not whole is a failed one."""
        bad = [name for name in outcome.files if not kept(name)]
        if bad:
            outcome = dataclasses.replace(
                outcome, state="failed", reason=f"a file of the run: got {bad[0]!r}", files={}
            )
        self._clear()
        for name, content in outcome.files.items():
            write_atomically(self.path / name, content)
        if outcome.state == "done" and (self.path / "results").exists():
            from corey import results  # torch comes with it, which takes seconds

            try:
                results.whole_sets(self.path / "results")
            except (ValueError, KeyError) as error:
                outcome = dataclasses.replace(outcome, state="failed", reason=f"rows: {error}")
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in outcome.files.items()}
        told = {key: getattr(outcome, key) for key in ("reason", "host", "device", "attempts", "duration_s")}
        self.mark(outcome.state, **told, files=digests)
        return outcome

    def _clear(self) -> None:
        """Remove what an earlier attempt left, the status first: it may be one of a run that was done."""
        for path in sorted(self.path.glob("*"), key=lambda path: path.name != "status.json"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _digest(path: Path) -> str | None:
    if not path.is_file() or path.is_symlink():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
