"""The public implementations timed beside the scan must compute the same function."""

import pytest
import torch
from scan_inputs import in_float64, make_inputs, relative_error

from corey import selective_scan_ref
from corey.baselines import scan_minimal, scan_transformers

BOTH = pytest.mark.parametrize("scan", (scan_minimal, scan_transformers))


@BOTH
@pytest.mark.parametrize("options", ((), ("D", "z", "delta_bias")), ids=("no options", "all options"))
def test_the_public_ways_match_float64(scan, options):
    inputs = make_inputs(options=options, layout="token_major")
    assert relative_error(scan(**inputs), selective_scan_ref(**in_float64(inputs))) < 1e-5


@BOTH
@pytest.mark.parametrize("name", ("B", "C"))
def test_grouped_projections_are_refused_by_name(scan, name):
    with pytest.raises(ValueError, match=rf"^{name}: got 4 dimensions"):
        scan(**make_inputs() | {name: torch.randn(2, 2, 16, 300)})
