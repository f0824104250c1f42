"""Numbers printed in the paper or written by its code, kept as small tables beside the rows measured here."""

import pandas as pd

from corey import paths
from corey._check import bad_value

FOLDER = paths.ROOT / "data" / "published"


def read_published(name: str) -> pd.DataFrame:
    """The table data/published/<name>.csv; its column `source` says which table of the paper each row is from."""
    known = sorted(path.stem for path in FOLDER.glob("*.csv"))
    if name not in known:
        raise bad_value("name", repr(name), f"one of {', '.join(known)}")
    return pd.read_csv(FOLDER / f"{name}.csv")
