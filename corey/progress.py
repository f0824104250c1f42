"""One bar for whatever takes long, in a notebook and in a terminal."""

from collections.abc import Iterable

from tqdm.auto import tqdm


def progress(items: Iterable, what: str, *, total: int | None = None) -> tqdm:
    """The items, with a bar beside `what` once they have taken two seconds; it goes when they are done.

    It is redrawn between items and at most twice a second, so that it is never inside what an item times.
    """
    return tqdm(items, desc=what, total=total, leave=False, delay=2, mininterval=0.5)
