"""Pure functions of tidy rows, one file per notebook theme: `plot_x(rows, ax=None) -> ax`. Nothing here measures."""
