"""Verdicts follow from evidence rows and from nothing else."""

import ast

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml

from corey import claims, paths, results
from corey.plots.ledger import plot_ledger

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


def write(value, name="03_evidence", device=CPU, quantity="loop", claim="C01"):
    row = {"claim": claim, "quantity": quantity, "value": value, "low": None, "high": None, "n": 9, "device": device}
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
    assert sum(int(text.get_text().split()[0]) for text in ax.get_legend().get_texts()) == 50
    plt.close("all")
