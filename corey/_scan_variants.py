"""Variants of the scan's kernels: what they are compiled with, and which ones must compile without spills."""

import torch

from corey._operands import CPP_TYPES
from corey._scan_blocks import IN_PARTS, PAIRS, plain_block
from corey._scan_layout import CHANNELS_A_THREAD, LAYOUTS, TOKENS_A_THREAD, VECTORS_OF_STATES, VECTORS_OF_TOKENS

SOURCE, CARRY = "selective_scan.cu", "scan_carry.cu"


def macros(
    *,
    dtypes,
    states,
    block=None,
    split=False,
    whole=True,
    order,
    vectors=(True,) * 4,
    projections,
    z=True,
    D=True,
    bias=True,
    softplus=True,
):
    """The variant's macros. dtypes: of u, delta, z, B, C; vectors: of u, delta, z, y; projections: of B, C.

    whole: whether every block has all its channels, and all tokens whenever it takes some.
    """
    block = block or plain_block(states)
    named = zip(("T_U", "T_DELTA", "T_Z", "T_B", "T_C"), (CPP_TYPES[dtype] for dtype in dtypes))
    wide = zip(("VECTOR_U", "VECTOR_DELTA", "VECTOR_Z", "VECTOR_Y"), (int(vector) for vector in vectors))
    flags = (("HAS_Z", int(z)), ("HAS_D", int(D)), ("HAS_BIAS", int(bias)), ("SOFTPLUS", int(softplus)))
    lie = (("MAP", order), ("LAYOUT_B", projections[0]), ("LAYOUT_C", projections[1]))
    sizes = (("LANES", block.lanes), ("WALKERS", block.walkers), ("TOKENS", block.tokens), ("PARTS", block.parts))
    return (*named, *wide, *flags, *lie, ("N", states), *sizes, ("SPLIT", int(split)), ("WHOLE", int(whole)))


def _tuned(layout, name, block=None, dtypes=(torch.bfloat16, torch.float16, torch.float32)):
    token_major = layout == "token_major"
    lie = {
        "order": CHANNELS_A_THREAD if token_major else TOKENS_A_THREAD,
        "projections": (VECTORS_OF_STATES if token_major else VECTORS_OF_TOKENS,) * 2,
    }
    split = name != "scan_both"
    return [
        (SOURCE, name, macros(dtypes=(dtype,) * 5, states=16, block=block, split=split, whole=whole, **lie))
        for dtype in dtypes
        for whole in (True, False)
    ]


def _of_blocks(blocks):
    halves = (torch.bfloat16, torch.float16)  # float32 in pairs spills a word off sm_90
    of = [(layout, block) for layout in LAYOUTS for block in blocks]
    return [variant for layout, block in of for variant in _tuned(layout, "scan_both", block, halves)]


TUNED = [
    *(
        variant
        for layout in LAYOUTS
        for name in ("scan_both", "scan_states", "scan_outputs")
        for variant in _tuned(layout, name)
    ),
    *_of_blocks([block for block in PAIRS if block.roomy]),
    (CARRY, "scan_carry", (("N", 16),)),
]
TUNED_ON_HOPPER = _of_blocks([block for block in PAIRS if not block.roomy])  # whose registers do there
TUNED_FROM_HOPPER = _of_blocks([IN_PARTS])  # clusters of blocks are new there
