"""The paper's "fused-kernel" sweep: launches counted on made chains by the same greedy rule. No kernel is run."""

from corey._check import bad_value
from corey.cost_model.chain import Limits, Operator
from corey.cost_model.groups import fixed_groups, greedy_groups

PUBLISHED_CHAINS = (
    *((num_operators, regime) for num_operators in (4, 8, 16) for regime in ("low", "mixed", "high")),
    (32, "mixed"),
    (64, "mixed"),
)
PUBLISHED_TAU = 0.5
PUBLISHED_LAUNCH_MS = 0.413  # 3.30 ms of the Static-64 row divided by 8 calls; that row made 64

# (first, step) of entropy, of arithmetic and of memory along the chain; then registers, shared memory and occupancy
_REGIMES = {
    "low": ((1.5, 0.05), (0.8, 0.10), (0.6, 0.04), 14, 28, 0.75),
    "mixed": ((2.0, 0.10), (1.0, 0.20), (0.5, 0.05), 16, 32, 0.80),
    "high": ((3.5, 0.15), (1.8, 0.25), (0.4, 0.03), 18, 36, 0.82),
}
_LIMITS = Limits(registers=256, shared_memory=512, occupancy=0.5)


def made_chain(num_operators: int, regime: str) -> tuple[Operator, ...]:
    """A chain of operators whose entropy, arithmetic and memory grow linearly along it."""
    if num_operators < 1:
        raise bad_value("num_operators", num_operators, "at least 1")
    if regime not in _REGIMES:
        raise bad_value("regime", repr(regime), f"one of {', '.join(_REGIMES)}")
    *lines, registers, shared_memory, occupancy = _REGIMES[regime]
    return tuple(
        Operator(f"op{i}", *(first + i * step for first, step in lines), registers, shared_memory, occupancy)
        for i in range(num_operators)
    )


def launch_counts(num_operators: int, regime: str, tau: float = PUBLISHED_TAU) -> dict:
    """Groups, and so launches, of one made chain under each rule."""
    chain = made_chain(num_operators, regime)
    return {
        "num_operators": num_operators,
        "regime": regime,
        "launches_none": len(chain),
        "launches_static": len(fixed_groups(chain, _LIMITS)),
        "launches_ours": len(greedy_groups(chain, _LIMITS, tau)),
    }
