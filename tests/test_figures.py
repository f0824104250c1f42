"""Figures are the paper's width, readable and the same bytes every time."""

from itertools import pairwise

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from corey import figures, paths
from corey.plots import decisions, shapes, sweep


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    with plt.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def draw(width=figures.WIDTH_FULL):
    fig, ax = plt.subplots(figsize=(width, 2.2))
    for index, scale in enumerate((1.0, 1.01, 2.0)):
        figures.interval(ax, [1, 2, 3], [scale] * 3, [0.9 * scale] * 3, [1.1 * scale] * 3, color=figures.PALETTE[index])
    figures.label_lines(ax, 3, [1.0, 1.01, 2.0], ["one", "two", "three"], colors=figures.PALETTE[:3])
    figures.device_note(ax, "NVIDIA H200")
    return fig, ax


def test_two_drawings_give_identical_bytes():
    first = [path.read_bytes() for path in figures.save(draw()[0], "03_try")]
    assert first == [path.read_bytes() for path in figures.save(draw()[0], "03_try")]
    assert b"/CreationDate" not in first[0] and b"Software" not in first[1]


def test_a_figure_is_a_pdf_and_a_png_of_the_width_that_was_asked_for():
    pdf, png = figures.save(draw()[0], "03_try")
    assert (pdf.name, png.name) == ("03_try.pdf", "03_try.png")
    assert plt.imread(png).shape[1] == round(figures.WIDTH_FULL * 300)
    assert f"/MediaBox [ 0 0 {figures.WIDTH_FULL * 72:.0f} ".encode() in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
    assert sorted(path.name for path in paths.FIGURES.iterdir()) == ["03_try.pdf", "03_try.png"]


@pytest.mark.parametrize("stem", ["../x", "03 try", "Fig", "x.png", "", None])
def test_a_stem_that_is_no_plain_name_is_refused(stem):
    with pytest.raises(ValueError, match="stem"):
        figures.save(draw()[0], stem)


def test_a_figure_wider_than_the_text_is_refused():
    with pytest.raises(ValueError, match="in wide"):
        figures.save(draw(width=6)[0], "03_try")


def test_a_png_that_is_too_heavy_is_refused_and_nothing_is_written():
    fig, ax = plt.subplots(figsize=(5.5, 5))
    ax.imshow(np.random.default_rng(0).random((2000, 2000)), interpolation="nearest")
    with pytest.raises(ValueError, match="PNG"):
        figures.save(fig, "03_try")
    assert not list(paths.FIGURES.iterdir())


def test_labels_of_close_lines_do_not_overlap():
    fig, ax = draw()
    fig.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


def test_an_interval_spans_low_to_high():
    ax = plt.subplots()[1]
    bars = figures.interval(ax, [1], [2.0], [1.5], [4.0]).lines[2][0]
    assert bars.get_segments()[0][:, 1].tolist() == [1.5, 4.0]
    with pytest.raises(ValueError, match="one length"):
        figures.interval(ax, [1, 2], [2.0], [1.5], [4.0])


def test_the_device_is_named_once_a_figure():
    fig, ax = draw()
    figures.device_note(ax, "NVIDIA H200")
    figures.device_note(ax, "AMD EPYC, 2 threads")
    assert fig.get_supxlabel() == "NVIDIA H200; AMD EPYC, 2 threads"


def sweep_summary(forms):
    rows = [(form, size, 1e3 * 4096 / size) for form in forms for size in (64, 512, 4096)]
    table = pd.DataFrame(rows, columns=["form", "chunk_size", "median_us"])
    return table.assign(low_us=0.9 * table.median_us, high_us=1.1 * table.median_us)


FIT = {"intercept_us": 100.0, "slope_us": 30.0, "r_squared": 0.999}


def test_machines_of_a_sweep_share_one_legend():
    fig, axes = plt.subplots(1, 2, figsize=(figures.WIDTH_FULL, 2.5))
    sweep.plot_chunk_sweep(sweep_summary(["reset", "carried", "one_launch"]), FIT, axes[0])
    sweep.plot_chunk_sweep(sweep_summary(["reset", "reset_graph", "default_graph"]), FIT, axes[1])
    sweep.shared_legend(fig, axes, ncols=2)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        sweep.FORM_STYLES[form][3] for form in ("reset", "carried", "reset_graph", "one_launch")
    ]
    assert "30 µs a call" in axes[0].texts[0].get_text() and axes[0].get_yscale() == "log"


def test_a_part_of_the_loop_that_reaches_zero_is_left_out():
    parts = pd.DataFrame(
        {"part": part, "n_launches": n, "latency_us": n * 10.0, "low_us": low, "high_us": n * 12.0}
        for part, low in (("host", 1.0), ("cut", -1.0), ("scan", 2.0))
        for n in (1, 2, 8)
    )
    ax = sweep.plot_launch_cost(parts, plt.subplots()[1])
    drawn = {bars.get_label(): len(bars.lines[0].get_xdata()) for bars in ax.containers}
    assert drawn == {"host": 3, "cutting, on the device": 0, "the scan, uncut": 3}


def test_a_cell_of_the_map_names_one_chunk_or_a_range():
    best = pd.DataFrame(
        {"batch": [1, 8], "d_inner": [64, 64], "seqlen": [512, 512], "first_tied": [128, 256], "last_tied": [128, 2048],
         "spread": [1.1, 3.9]}
    )  # fmt: skip
    ax = shapes.plot_best_chunks(best, plt.subplots()[1])
    assert [text.get_text() for text in ax.texts] == ["128", "256–2k"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1 × 64", "8 × 64"]
    shapes.colour_scale(ax)
    assert len(ax.get_figure().axes) == 2


def test_policies_keep_their_line_where_a_machine_did_not_measure_them():
    costs = pd.DataFrame(
        {"scheduler": name, "step": "decision", "median_us": 5.0, "low_us": 4.0, "high_us": 6.0}
        for name in ("static", "hist")
    )
    ax = decisions.plot_decision_costs(costs, 30.0, ["static", "device-hist", "hist"], plt.subplots()[1])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["hist", "device-hist", "static"]
    heights = next(bars for bars in ax.containers if bars.get_label().startswith("decision,")).lines[0].get_ydata()
    assert [round(height) for height in heights] == [2, 0]
