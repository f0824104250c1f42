"""The ledger of claims and the verdicts that the evidence rows give: `python -m corey.claims`.

data/claims.yaml says what the paper claims and which conditions on evidence decide it. Verdicts are computed here and
written nowhere by hand.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from itertools import pairwise, product

import pandas as pd
import yaml
from tabulate import tabulate

from corey import paths, results
from corey._check import bad_value

HOLDS = "holds"
OTHER_REASON = "holds for another reason"
FAILS = "does not hold"
NOT_MEASURED = "not yet measured"
UNTESTABLE = "cannot be tested here"
VERDICTS = (HOLDS, OTHER_REASON, FAILS, NOT_MEASURED, UNTESTABLE)
MEANING = "not resolved: the interval of the measurement allows another verdict"
TIERS = ("entropy", "Hadamard", "cost model", "kernel timing", "end to end")

REQUIRED = {"id", "tier", "claim", "published", "where"}
OPTIONAL = {"how", "notebook", "figure", "needs", "reproduced", "reason", "untestable", "gpu"}
COMPARE = {
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
    "within": lambda value, bound: bound[0] <= value <= bound[1],
}


def load() -> list[dict]:
    """The 50 claims, checked: every field known, every condition well formed, nothing decided by hand."""
    ledger = yaml.safe_load(paths.CLAIMS.read_text())
    expected = [f"C{number:02d}" for number in range(1, 51)]
    found = [claim.get("id") for claim in ledger]
    if found != expected:
        raise bad_value("claims.yaml", f"ids {found}", "C01 to C50, in order")
    for claim in ledger:
        _check_claim(claim)
    return [claim | {part: _conditions(claim, part) for part in ("reproduced", "reason")} for claim in ledger]


def evidence(source: str) -> pd.DataFrame:
    """Every evidence row of one source ("live" or "committed"), with the result set it is from."""
    sets = [name for name in results.names(source) if re.fullmatch(r"\d\d_evidence", name)]
    tables = [results.read_rows(name, source).assign(set=name) for name in sets]
    if not tables:
        return pd.DataFrame(columns=[*results.EVIDENCE_COLUMNS, "source", "set"])
    rows = pd.concat(tables, ignore_index=True)
    unknown = set(rows["claim"]) - {claim["id"] for claim in load()}
    if unknown:
        raise bad_value("evidence", f"claims {sorted(unknown)}", "claims of the ledger")
    repeated = rows[rows.duplicated(["claim", "quantity"], keep=False)]
    if len(repeated):
        row = repeated.iloc[0]
        raise bad_value("evidence", f"{row.claim} {row.quantity} in {sorted(repeated['set'])}", "each quantity once")
    return rows


def judge(claim: dict, rows: pd.DataFrame) -> str:
    """The verdict that evidence rows (columns claim, quantity, value, low, high, device) give on one claim."""
    if "untestable" in claim:
        return UNTESTABLE
    rows = _relevant(claim, rows)
    reproduced = _all_true(claim["reproduced"], rows)
    if reproduced is None:
        return NOT_MEASURED
    if not reproduced:
        return FAILS
    if not claim["reason"]:
        return HOLDS
    reason = _all_true(claim["reason"], rows)
    if reason is None:
        return NOT_MEASURED
    return HOLDS if reason else OTHER_REASON


def is_resolved(claim: dict, rows: pd.DataFrame) -> bool:
    """Whether every choice of values from inside the intervals of its evidence gives a claim the verdict of `judge`.

    A row without an interval is exact, as is one of which every condition says `of: value`: it counts what was run, and
    not what might have been. A claim that is not yet measured has no verdict to doubt.
    """
    verdict = judge(claim, rows)
    rows = _deciding(claim, rows)
    bounds = {bound for each in _both(claim) for bound in _bounds(each)}
    in_doubt = {each["quantity"] for each in _both(claim) if each.get("of") != "value"}
    inside = [_inside(row, bounds) if row.quantity in in_doubt else [row.value] for row in rows.itertuples()]
    return verdict == NOT_MEASURED or all(
        judge(claim, rows.assign(value=values, low=values, high=values)) == verdict for values in product(*inside)
    )


def doubt(resolved: bool) -> str:
    """What follows a verdict where it is shown for one claim: nothing, or that it is not resolved."""
    return "" if resolved else ", not resolved"


def table(source: str = "all") -> pd.DataFrame:
    """One row per claim, with these columns.

    id, tier, claim, published, where, verdict, resolved, measured, device, source, notebook, figure, note.

    `source` is "live", "committed" or "all", which judges each claim by this machine's rows and turns to the committed
    ones where these decide nothing. `resolved` is told by `is_resolved`; `measured` lists each condition's evidence;
    `note` says why there is no verdict.
    """
    if source not in ("live", "committed", "all"):
        raise bad_value("source", repr(source), "'live', 'committed' or 'all'")
    pools = [evidence(each) for each in (("live", "committed") if source == "all" else (source,))]
    return pd.DataFrame([_line(claim, pools) for claim in load()])


def markdown(rows: pd.DataFrame) -> str:
    """The table of the README; a notebook is linked once it has measured, since some are still to come."""
    header = ("", "claim", "verdict", "published", "measured here", "device", "notebook", "figure")
    lines = [_cells(header), "|---" * len(header) + "|"]
    for row in rows.itertuples():
        number = row.notebook[:2]
        link = f"[{number}](notebooks/{row.notebook}.ipynb)" if row.measured else number
        figure = f"[{row.figure}](figures/{row.figure}.png)" if row.figure else ""
        measured = row.measured or row.note
        verdict = f"**{row.verdict}**{doubt(row.resolved)}"
        lines.append(_cells((row.id, row.claim, verdict, row.published, measured, row.device, link, figure)))
    return "\n".join(lines)


def _cells(texts: Iterable) -> str:
    return "| " + " | ".join(str(text).replace("|", "\\|") for text in texts) + " |"


def _line(claim: dict, pools: list[pd.DataFrame]) -> dict:
    verdicts = [judge(claim, rows) for rows in pools]
    deciding = next((index for index, verdict in enumerate(verdicts) if verdict != NOT_MEASURED), 0)
    rows = _deciding(claim, pools[deciding])
    verdict = verdicts[deciding]
    return {
        "id": claim["id"],
        "tier": claim["tier"],
        "claim": claim["claim"],
        "published": claim["published"].strip(),
        "where": claim["where"],
        "verdict": verdict,
        "resolved": is_resolved(claim, rows),
        "measured": "; ".join(_measured(row) for row in rows.itertuples()),
        "device": "; ".join(sorted(set(rows["device"]))),
        "source": ", ".join(sorted(set(rows["source"]))),
        "notebook": claim.get("notebook", ""),
        "figure": claim.get("figure", ""),
        "note": _note(claim, verdict).strip(),
    }


def _note(claim: dict, verdict: str) -> str:
    if verdict == UNTESTABLE:
        return claim["untestable"]
    if verdict != NOT_MEASURED:
        return ""
    return "needs " + claim.get("needs", f"notebook {claim['notebook']}")


def _measured(row) -> str:
    interval = "" if pd.isna(row.low) else f" [{row.low:.4g}, {row.high:.4g}]"
    return f"{row.quantity.replace('_', ' ')}: {row.value:.4g}{interval}"


def _relevant(claim: dict, rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows["claim"] == claim["id"]]
    return rows[~rows["device"].map(results.is_cpu).astype(bool)] if claim.get("gpu") else rows


def _deciding(claim: dict, rows: pd.DataFrame) -> pd.DataFrame:
    rows = _relevant(claim, rows)
    return rows[rows["quantity"].isin([each["quantity"] for each in _both(claim)])]


def _both(claim: dict) -> list[dict]:
    return claim["reproduced"] + claim["reason"]


def _inside(row, bounds: set[float]) -> list[float]:
    """Values inside the interval of a row; every other value inside is judged like one of them."""
    if pd.isna(row.low):
        return [row.value]
    places = sorted({row.low, row.high} | {bound for bound in bounds if row.low < bound < row.high})
    return [*places, *((left + right) / 2 for left, right in pairwise(places))]


def _bounds(condition: dict) -> list:
    return condition["bound"] if condition["op"] == "within" else [condition["bound"]]


def _all_true(conditions: list[dict], rows: pd.DataFrame) -> bool | None:
    """Whether every condition is true; None where there is no condition or its quantity has no row."""
    outcomes = []
    for each in conditions:
        found = rows[rows["quantity"] == each["quantity"]]
        if found.empty:
            return None
        measured = found.iloc[0][each.get("of", "value")]
        if pd.isna(measured):
            raise bad_value(
                f"{each['quantity']}, {each['of']}", "no interval", "one: a condition of the ledger reads it"
            )
        outcomes.append(COMPARE[each["op"]](measured, each["bound"]))
    return all(outcomes) if outcomes else None


def _conditions(claim: dict, part: str) -> list[dict]:
    given = claim.get(part, [])
    return given if isinstance(given, list) else [given]


def _check_claim(claim: dict) -> None:
    where = f"claim {claim['id']}"
    missing, unknown = REQUIRED - set(claim), set(claim) - REQUIRED - OPTIONAL
    if missing or unknown:
        raise bad_value(where, f"fields {sorted(claim)}", f"{sorted(REQUIRED)} and of {sorted(OPTIONAL)}")
    if claim["tier"] not in TIERS:
        raise bad_value(f"{where} tier", repr(claim["tier"]), f"one of {TIERS}")
    if "untestable" in claim:
        if {"reproduced", "reason", "needs"} & set(claim):
            raise bad_value(where, "untestable with conditions or needs", "one or the other")
        return
    if not {"how", "notebook"} <= set(claim):
        raise bad_value(where, f"fields {sorted(claim)}", "how and notebook, or untestable")
    if "reason" in claim and "reproduced" not in claim:
        raise bad_value(where, "a reason without an observation", "reproduced as well")
    for part in ("reproduced", "reason"):
        for condition in _conditions(claim, part):
            _check_condition(f"{where} {part}", condition)


def _check_condition(where: str, condition: dict) -> None:
    if not {"quantity", "op", "bound"} <= set(condition) <= {"quantity", "op", "bound", "of"}:
        raise bad_value(where, sorted(condition), "quantity, op, bound and perhaps of")
    if condition["op"] not in COMPARE or condition.get("of", "value") not in ("value", "low", "high"):
        raise bad_value(where, condition, f"op in {list(COMPARE)}, of in value, low, high")
    if not all(isinstance(bound, (int, float)) for bound in _bounds(condition)):
        raise bad_value(where, condition["bound"], "a number, or two for within")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m corey.claims", description="Print the verdict on every claim.")
    parser.add_argument("--source", choices=("all", "live", "committed"), default="all", help="rows to judge by")
    parser.add_argument("--markdown", action="store_true", help="print the table of the README")
    options = parser.parse_args(arguments)
    rows = table(options.source)
    if options.markdown:
        print(markdown(rows))
        return 0
    rows["evidence"] = [row.measured or row.note for row in rows.itertuples()]
    shown = rows[["id", "claim", "verdict", "evidence", "device"]].assign(
        verdict=rows["verdict"] + rows["resolved"].map(doubt)
    )
    print(tabulate(shown, headers="keys", tablefmt="simple_grid", showindex=False, maxcolwidths=[None, 46, 14, 46, 16]))
    print(MEANING)
    print(", ".join(f"{count} {verdict}" for verdict, count in rows["verdict"].value_counts(sort=False).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
