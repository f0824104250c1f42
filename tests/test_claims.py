"""Verdicts follow from evidence rows and from nothing else."""

import ast

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml
from matplotlib.colors import same_color

from corey import claims, paths, results
from corey.plots.ledger import COLOURS, plot_ledger

CPU, GPU = "AMD EPYC, 2 threads", "NVIDIA H200"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "LIVE_RESULTS", tmp_path / "live")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "committed")


def evidence(claim="C01", device=CPU, **quantities):
    rows = [{"claim": claim, "quantity": name, "value": value} for name, value in quantities.items()]
    return pd.DataFrame(rows).assign(low=None, high=None, device=device, source="live")


def made(**fields):
    return {"id": "C01", "reproduced": [], "reason": []} | fields


def above(quantity, bound=1.0, **more):
    return {"quantity": quantity, "op": ">", "bound": bound} | more


BOTH = made(reproduced=[above("loop")], reason=[above("kernel")])


@pytest.mark.parametrize(
    ("claim", "rows", "verdict"),
    [
        (BOTH, evidence(loop=4.4, kernel=2.0), claims.HOLDS),
        (BOTH, evidence(loop=4.4, kernel=1.0), claims.OTHER_REASON),
        (BOTH, evidence(loop=0.9, kernel=2.0), claims.FAILS),
        (BOTH, evidence(loop=0.9), claims.FAILS),
        (BOTH, evidence(loop=4.4), claims.NOT_MEASURED),
        (BOTH, evidence(kernel=2.0), claims.NOT_MEASURED),
        (BOTH, evidence("C02", loop=4.4, kernel=2.0), claims.NOT_MEASURED),
        (made(reproduced=[above("loop")]), evidence(loop=4.4), claims.HOLDS),
        (made(reproduced=[above("loop"), above("more")]), evidence(loop=4.4, more=0.5), claims.FAILS),
        (made(reproduced=[above("loop"), above("more")]), evidence(loop=4.4), claims.NOT_MEASURED),
        (made(), evidence(loop=4.4), claims.NOT_MEASURED),
        (made(untestable="why"), evidence(loop=4.4), claims.UNTESTABLE),
        (made(reproduced=[above("loop")], gpu=True), evidence(loop=4.4), claims.NOT_MEASURED),
        (made(reproduced=[above("loop")], gpu=True), evidence(loop=4.4, device=GPU), claims.HOLDS),
    ],
)
def test_the_verdict_follows_the_evidence(claim, rows, verdict):
    assert claims.judge(claim, rows) == verdict


@pytest.mark.parametrize(
    ("op", "bound", "true", "false"),
    [("<", 1, 0.9, 1), ("<=", 1, 1, 1.1), (">", 1, 1.1, 1), (">=", 1, 1, 0.9), ("within", [1, 2], 2, 2.1)],
)
def test_each_comparison_is_what_it_says(op, bound, true, false):
    claim = made(reproduced=[{"quantity": "x", "op": op, "bound": bound}])
    assert claims.judge(claim, evidence(x=true)) == claims.HOLDS
    assert claims.judge(claim, evidence(x=false)) == claims.FAILS


def test_a_condition_can_read_the_end_of_the_interval():
    rows = evidence(x=2.0).assign(low=0.5, high=3.0)
    assert claims.judge(made(reproduced=[above("x", of="low")]), rows) == claims.FAILS
    assert claims.judge(made(reproduced=[above("x")]), rows) == claims.HOLDS
    with pytest.raises(ValueError, match="no interval"):
        claims.judge(made(reproduced=[above("x", of="low")]), evidence(x=2.0))


def intervals(**quantities):
    """Evidence rows with (value, low, high), or exact ones."""
    given = pd.DataFrame([each if isinstance(each, tuple) else (each, None, None) for each in quantities.values()])
    return evidence(**dict.fromkeys(quantities, 0.0)).assign(value=given[0], low=given[1], high=given[2])


def below(quantity, bound):
    return above(quantity, bound, op="<")


def all_of(*conditions):
    return made(reproduced=list(conditions))


IN_DOUBT, NEARLY, NO, YES = (2, 0.5, 3), (0.9, 0.5, 1.2), (0.9, 0.5, 1.0), (2, 1.5, 3)  # for a value above 1
BAND = {"quantity": "x", "op": "within", "bound": [1, 1.01]}
INSIDE_1_PER_CENT = [
    {"quantity": "x", "op": ">=", "bound": 0.99, "of": "low"},
    {"quantity": "x", "op": "<=", "bound": 1.01, "of": "high"},
]


@pytest.mark.parametrize(
    ("claim", "rows", "resolved"),
    [
        (all_of(above("x")), intervals(x=YES), True),
        (all_of(above("x")), intervals(x=IN_DOUBT), False),
        (all_of(above("x")), intervals(x=NEARLY), False),
        (all_of(above("x")), intervals(x=NO), True),
        (all_of(above("x")), intervals(x=0.9), True),
        (all_of(above("x")), intervals(x=(0.9, 1.1, 1.2)), False),
        (all_of(above("x", of="low")), intervals(x=YES), True),
        (all_of(above("x", of="low")), intervals(x=IN_DOUBT), False),
        (all_of(above("x", of="value")), intervals(x=IN_DOUBT), True),
        (all_of(above("x", of="value"), above("x")), intervals(x=IN_DOUBT), False),
        (all_of(*INSIDE_1_PER_CENT), intervals(x=(1.03, 0.78, 1.12)), False),
        (all_of(*INSIDE_1_PER_CENT), intervals(x=(1.0, 0.995, 1.005)), True),
        (all_of(*INSIDE_1_PER_CENT), intervals(x=(1.1, 1.02, 1.12)), True),
        (all_of(above("x"), above("y")), intervals(x=NEARLY, y=NEARLY), False),
        (all_of(above("x"), above("y")), intervals(x=NEARLY, y=NO), True),
        (all_of(above("x"), above("y")), intervals(x=YES, y=IN_DOUBT), False),
        (all_of(above("x", 2), below("x", 1)), intervals(x=(1.5, 0.5, 3)), True),
        (all_of(above("x", 1), below("x", 2)), intervals(x=(0.5, 0, 3)), False),
        (all_of(above("x"), below("y", 1)), intervals(x=NEARLY, y=(1.1, 0.8, 1.5)), False),
        (all_of(BAND), intervals(x=NEARLY), False),
        (made(reproduced=[above("loop", 0)], reason=[BAND]), intervals(loop=YES, x=NEARLY), False),
        (BOTH, intervals(loop=YES, kernel=IN_DOUBT), False),
        (BOTH, intervals(loop=YES, kernel=NEARLY), False),
        (BOTH, intervals(loop=YES, kernel=NO), True),
        (BOTH, intervals(loop=NO, kernel=IN_DOUBT), True),
        (BOTH, intervals(loop=NEARLY, kernel=NO), False),
        (BOTH, intervals(loop=IN_DOUBT), True),
        (BOTH, intervals(loop=NEARLY), False),
        (made(untestable="why"), intervals(loop=IN_DOUBT), True),
        (made(reproduced=[above("loop")], gpu=True), intervals(loop=IN_DOUBT), True),
    ],
    ids=[
        "holds all over", "holds at one end", "fails at one end", "fails at the bound too", "exact", "value outside",
        "end holds", "end fails", "what was run", "what was run, and more",
        "both ends fail", "both ends hold", "beyond both ends",
        "two in reach", "one out of reach", "one of two in doubt", "never both", "between two bounds", "opposite ends",
        "a band inside", "a band inside the reason",
        "reason in doubt", "reason in reach", "reason fails", "reason does not matter", "another reason in reach",
        "reason not measured", "fails or not measured", "untestable", "no row counts",
    ],
)  # fmt: skip
def test_a_verdict_is_resolved_unless_its_intervals_allow_another(claim, rows, resolved):
    assert claims.is_resolved(claim, rows) == resolved


def test_the_ledger_has_fifty_claims_and_no_verdict():
    text = paths.CLAIMS.read_text().lower()
    assert len(claims.load()) == 50
    assert "verdict:" not in text


def broken(change):
    ledger = yaml.safe_load(paths.CLAIMS.read_text())
    change(ledger)
    return ledger


@pytest.mark.parametrize(
    "change",
    [
        lambda ledger: ledger.pop(),
        lambda ledger: ledger.append(ledger[0]),
        lambda ledger: ledger[0].update(verdict="holds"),
        lambda ledger: ledger[0].update(tier="other"),
        lambda ledger: ledger[0].pop("published"),
        lambda ledger: ledger[0].update(untestable="why", reproduced=above("x")),
        lambda ledger: ledger[0].update(reproduced={"quantity": "x", "op": "!=", "bound": 1}),
        lambda ledger: ledger[0].update(reproduced={"quantity": "x", "op": ">"}),
        lambda ledger: ledger[0].update(reproduced={"quantity": "x", "op": ">", "bound": "1"}),
        lambda ledger: (ledger[0].pop("reproduced", None), ledger[0].update(reason=above("x"))),
    ],
    ids=["missing", "twice", "verdict", "tier", "field", "both", "op", "no bound", "text bound", "reason alone"],
)
def test_a_malformed_ledger_is_refused(change, tmp_path, monkeypatch):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(broken(change), sort_keys=False))
    monkeypatch.setattr(paths, "CLAIMS", path)
    with pytest.raises(ValueError, match="want"):
        claims.load()


def strings(path):
    """Every string constant in the code cells of a notebook, those inside f-strings too."""
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return {
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    } | {
        node.arg
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.keyword) and node.arg
    }


@pytest.mark.parametrize(
    "claim", [claim for claim in claims.load() if claim["reproduced"]], ids=lambda claim: claim["id"]
)
def test_every_condition_names_a_quantity_that_its_notebook_writes(claim):
    written = strings(paths.NOTEBOOKS / f"{claim['notebook']}.ipynb")
    assert {each["quantity"] for each in claim["reproduced"] + claim["reason"]} <= written
    assert claim["id"] in written
    assert claim.get("figure") is None or claim["figure"] in written


@pytest.fixture
def one_condition(monkeypatch):
    """The ledger with a single condition, on C01."""
    ledger = [
        {key: value for key, value in claim.items() if key not in ("reproduced", "reason", "gpu")}
        for claim in yaml.safe_load(paths.CLAIMS.read_text())
    ]
    ledger[0]["reproduced"] = above("loop")
    monkeypatch.setattr(claims.yaml, "safe_load", lambda _: ledger)


def write(value, name="03_evidence", device=CPU, quantity="loop", claim="C01", low=None, high=None):
    row = {"claim": claim, "quantity": quantity, "value": value, "low": low, "high": high, "n": 9, "device": device}
    results.write_rows([row], name, parameters={})


def test_live_rows_decide_before_committed_ones_and_the_device_is_named(one_condition):
    write(0.5, device=GPU)
    results.publish("03_evidence")
    row = claims.table("all").iloc[0]
    write(4.4)
    assert (row.verdict, row.device) == (claims.FAILS, GPU)
    row = claims.table("all").iloc[0]
    assert (row.verdict, row.device, row.source, row.measured) == (claims.HOLDS, CPU, "live", "loop: 4.4")
    assert claims.table("committed").iloc[0].verdict == claims.FAILS


def test_committed_rows_decide_where_live_ones_do_not(one_condition):
    write(4.4, device=GPU)
    results.publish("03_evidence")
    write(1.0, quantity="other")
    row = claims.table("all").iloc[0]
    assert (row.verdict, row.source) == (claims.HOLDS, "committed")


def test_a_verdict_in_doubt_is_shown_as_such_and_no_other(one_condition, capsys):
    write(4.4, low=0.5, high=5.0)
    rows = claims.table("live")
    assert rows["id"][~rows["resolved"]].tolist() == ["C01"]
    assert rows.verdict[0] == claims.HOLDS
    assert [line[:5] for line in claims.markdown(rows).splitlines() if "**, not resolved |" in line] == ["| C01"]
    assert claims.main(["--source", "live"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("holds, not") == 1 and claims.MEANING in printed and "\n1 holds, 44" in printed


def test_evidence_for_an_unknown_claim_or_given_twice_is_refused(one_condition):
    write(4.4, claim="C51")
    with pytest.raises(ValueError, match="C51"):
        claims.table("live")
    write(4.4)
    write(4.5, name="04_evidence")
    with pytest.raises(ValueError, match="each quantity once"):
        claims.table("live")


def test_without_evidence_every_claim_says_what_it_needs():
    rows = claims.table("live")
    assert set(rows["verdict"]) == {claims.NOT_MEASURED, claims.UNTESTABLE}
    assert (rows["note"].str.len() > 10).all() and (rows["measured"] == "").all()


@pytest.mark.parametrize(
    "arguments", [[], ["--markdown"], ["--source", "committed"]], ids=["text", "markdown", "committed"]
)
def test_the_command_prints_all_fifty(arguments, capsys):
    assert claims.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"C{number:02d}" in printed for number in range(1, 51))


def test_the_figure_has_a_square_for_every_claim():
    ax = plot_ledger(claims.table("live"), plt.subplots()[1])
    assert sorted(text.get_text() for text in ax.texts) == [f"{number:02d}" for number in range(1, 51)]
    *verdicts, opened = (text.get_text() for text in ax.get_legend().get_texts())
    assert sum(int(text.split()[0]) for text in verdicts) == 50 and "not resolved" in opened
    plt.close("all")


def test_the_square_of_a_verdict_in_doubt_is_open():
    rows = claims.table("live").assign(verdict=claims.FAILS)
    ax = plot_ledger(rows.assign(resolved=rows["id"] != "C18"), plt.subplots()[1])
    filled = [same_color(square.get_facecolor(), COLOURS[claims.FAILS]) for square in ax.patches]
    assert [text.get_text() for text, full in zip(ax.texts, filled) if not full] == ["18"]
    assert [text.get_color() for text, full in zip(ax.texts, filled) if not full] == ["black"]
    plt.close("all")
