"""Menus and sliders above a figure that follows them."""

from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

_LAYOUT = {"style": {"description_width": "90px"}, "layout": {"width": "330px"}}


def slider(what: str, stops: Sequence[int], value: int) -> ipywidgets.SelectionSlider:
    """A slider over these numbers and `value`, where it starts. It reports when it is let go."""
    stops = sorted({*stops, value})
    return ipywidgets.SelectionSlider(options=stops, value=value, description=what, continuous_update=False, **_LAYOUT)


def menu(what: str, options: Sequence[str], value: str) -> ipywidgets.Dropdown:
    """A menu of these names. Raises ipywidgets' TraitError where `value` is none of them."""
    return ipywidgets.Dropdown(options=options, value=value, description=what, **_LAYOUT)


def follow(draw: Callable[..., Figure], controls: Mapping[str, ipywidgets.ValueWidget]) -> None:
    """Show the controls and, below, the figure of draw(name=value, ...), drawn again whenever a value changes.

    Where nobody can move anything, as under papermill, the figure of the first values stays as an ordinary output.
    """

    def figure() -> Figure:
        drawn = draw(**{name: control.value for name, control in controls.items()})
        plt.close(drawn)  # else the cell's end shows it a second time
        return drawn

    display(ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}))
    shown = display(figure(), display_id=True)
    for control in controls.values():
        control.observe(lambda change: shown.update(figure()), names="value")
