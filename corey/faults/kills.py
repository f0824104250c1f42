"""Random kill points: SIGKILL, at random times, of whatever a grid consists of, until every run is done.

After every kill the folders on disk are compared with the journal of what really began and ended.
"""

import math
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from corey.faults.project import Project, kill, project
from corey.run_folder import RunFolder

TARGETS = {"kernel": 8, "run": 8, "worker": 2, "runner": 1}  # what is killed, and how often in proportion
RUNS = 16  # of a grid


class KillPoints:
    """Kills over as many grids as they take, and what was found torn, lost or run twice.

    torn: a status that cannot be read, or a done run whose files do not match it; lost: a run that was done and is not
    any more; run_twice: a run that began again after it was done, or while another ran on its device; begun_again:
    beginnings of runs that had begun before; beyond: those of them that no kill during the run accounts for.
    """

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        self.kills, self.in_flight, self.found = Counter(), Counter(), Counter()

    def make(self, wanted: int) -> pd.DataFrame:
        """At least `wanted` kills; one row a target, and one for all of them, with zeros where nothing was found."""
        while self.kills.total() < wanted:
            with project() as tiny:
                tiny.set_grid(["none"], RUNS)
                self._one_grid(tiny, wanted)
            self.found["grids"] += 1
        rows = [{"target": each, "kills": self.kills[each], "in_flight": self.in_flight[each]} for each in TARGETS]
        totals = {"kills": self.kills.total(), "in_flight": self.in_flight.total()}
        problems = {each: self.found[each] for each in ("grids", "torn", "lost", "run_twice", "begun_again", "beyond")}
        return pd.DataFrame([*rows, {"target": "all", **totals, **problems}]).set_index("target")

    def _one_grid(self, tiny: Project, wanted: int) -> None:
        done: dict[int, int] = {}  # runs that are done, with how often they had begun by then
        hit: Counter = Counter()  # kills while a run was under way
        runner = tiny.start()
        while len(done) < RUNS:
            time.sleep(self._pause_s())
            if runner.poll() is not None:
                runner = tiny.start()
            elif self.kills.total() < wanted:
                hit.update(self._kill_one(tiny, runner))
            done = self._look(tiny, done)
        if runner.wait(120) != 0:
            assert tiny.run() == 0, "a grid whose runs are all done must say so"
        self._look(tiny, done)
        begun = Counter(event["repeat"] for event in tiny.events() if event["event"] == "begin")
        self.found["begun_again"] += sum(times - 1 for times in begun.values())
        self.found["beyond"] += sum(max(0, times - 1 - hit[repeat]) for repeat, times in begun.items())
        self.found["run_twice"] += overlaps(tiny.events())

    def _pause_s(self) -> float:
        """Mostly short, to hit every moment of a run; at times long, so that runs are done in between."""
        return self.chance.uniform(0.05, 2) if self.chance.random() < 0.85 else self.chance.uniform(4, 15)

    def _kill_one(self, tiny: Project, runner) -> set[int]:
        """While runs are at work, kill one process of a kind drawn by chance; the runs that were under way."""
        found = {part: tiny.processes(part) for part in ("kernel", "run", "worker")} | {"runner": [runner]}
        present = [part for part in TARGETS if found[part]]
        target = self.chance.choices(present, [TARGETS[part] for part in present])[0]
        begun = {event["repeat"] for event in tiny.events()}
        under_way = {
            each["parameters"]["repeat"]
            for each in self._statuses(tiny)  # a run that is hit just before its notebook begins may still begin
            if each["state"] == "running" or (each["state"] == "queued" and each["parameters"]["repeat"] in begun)
        }
        if not found["run"] or not kill(self.chance.choice(found[target])):
            return set()
        self.kills[target] += 1
        if self.kills.total() % 10 == 0:
            print(f"{dict(self.kills)}: {dict(self.found)}", flush=True)
        self.in_flight[target] += len(under_way)
        return under_way

    def _look(self, tiny: Project, before: dict[int, int]) -> dict[int, int]:
        """Compare what is done now with what was done before."""
        now = {}
        for status in self._statuses(tiny):
            repeat = status["parameters"]["repeat"]
            if status["state"] == "done":
                now[repeat] = before.get(repeat, tiny.begun(repeat))
                self.found["torn"] += not RunFolder(tiny.root(), status["run"], status["parameters"], {}).done()
        self.found["lost"] += sum(repeat not in now for repeat in before)
        self.found["run_twice"] += sum(tiny.begun(repeat) > times for repeat, times in before.items())
        return now

    def _statuses(self, tiny: Project) -> list[dict]:
        try:
            return tiny.statuses()
        except ValueError:
            self.found["torn"] += 1
            return []


def side_by_side(wanted: int, seed: int, at_once: int) -> pd.DataFrame:
    """The kills shared out over several projects at a time, and their rows added up."""
    share = math.ceil(wanted / at_once)
    with ThreadPoolExecutor(at_once) as pool:
        tables = list(pool.map(lambda number: KillPoints(seed + number).make(share), range(at_once)))
    return sum(tables).reset_index()


def overlaps(events: list[dict]) -> int:
    """Beginnings and ends on a device that come from a process after a later one had begun there."""
    holder: dict[str, int] = {}
    wrong = 0
    for event in events:
        if event["event"] == "begin":
            holder[event["device"]] = event["pid"]
        else:
            wrong += holder.get(event["device"]) != event["pid"]
    return wrong
