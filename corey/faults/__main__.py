"""`python -m corey.faults [PART ...]`: rows into build/results; exits with 1 where something was not as wanted."""

import argparse
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed

from corey import results
from corey.faults.hostile import try_all
from corey.faults.injected import FAULTS
from corey.faults.kills import side_by_side

SEED = 7
AT_ONCE = 4  # projects under way, each with two fake devices of its own; they mostly wait


def injected(times: int) -> bool:
    found: dict[str, list[dict]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        names = {pool.submit(_inject, name, times): name for name in FAULTS}
        for future in as_completed(names):
            found[names[future]] = future.result()
            for row in future.result():
                print(f"{row['fault']}: {row['as_wanted']} of {row['times']} as wanted", flush=True)
            rows = [{**row, "device": "cpu"} for name in FAULTS if name in found for row in found[name]]
            results.write_rows(rows, "faults", parameters={"times": times})  # what is known so far
    return all(row["as_wanted"] == row["times"] for row in rows)


def _inject(name: str, times: int) -> list[dict]:
    try:
        return FAULTS[name](times)
    except Exception:  # one that this check did not foresee: counted as not as wanted, beside what the others find
        traceback.print_exc()
        unknown = {"injected": "", "reported": "not what the check could read", "kept": ""}
        return [{"fault": name, "times": times, "as_wanted": 0, **unknown}]


def kills(wanted: int) -> bool:
    table = side_by_side(wanted, SEED, AT_ONCE)
    results.write_rows(table.assign(device="cpu"), "faults_kills", parameters={"kills": wanted, "seed": SEED})
    print(table.to_string(index=False))
    return not table[["torn", "lost", "run_twice", "beyond"]].sum().any()


def hostile() -> bool:
    table = try_all()
    results.write_rows(table.assign(device="cpu"), "faults_hostile", parameters={})
    print(f"{len(table)} hostile inputs, {table.succeeded.sum()} succeeded")
    return not table.succeeded.any()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corey.faults", description="Inject faults into the batch runner.")
    parts = ("hostile", "injected", "kills")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all by default")
    parser.add_argument("--times", type=int, default=5, help="of each fault")
    parser.add_argument("--kills", type=int, default=200, help="random kill points")
    options = parser.parse_args(arguments)
    if set(options.parts) - set(parts):
        parser.error(f"PART: got {' '.join(options.parts)}, want some of {', '.join(parts)}")
    chosen = options.parts or parts
    good = []
    if "hostile" in chosen:
        good.append(hostile())
    if "injected" in chosen:
        good.append(injected(options.times))
    if "kills" in chosen:
        good.append(kills(options.kills))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
