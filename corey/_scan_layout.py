"""How the tensors of a scan lie in memory, and so how a kernel's threads read them."""

TOKENS_A_THREAD, CHANNELS_A_THREAD, THREADS_ON_TOKENS, THREADS_ON_CHANNELS = range(4)  # MAP in the kernel
VECTORS_OF_TOKENS, VECTORS_OF_STATES, STRIDED, CONSTANT = range(4)  # LAYOUT_B, LAYOUT_C
LAYOUTS = "channel_major", "token_major"


def token_major(x):
    return 0 < x.stride(1) < x.stride(2)


def layout_of(u):
    return LAYOUTS[token_major(u)]


def order_of(u, groups):
    """How the elements of a piece of u lie among the threads."""
    for wide in (TOKENS_A_THREAD, CHANNELS_A_THREAD):
        if is_wide(wide, u.shape, groups, u.stride(), u.data_ptr(), u.dtype.itemsize):
            return wide
    return THREADS_ON_CHANNELS if token_major(u) else THREADS_ON_TOKENS


def is_wide(order, shape, groups, strides, address, itemsize):
    """Whether 8 neighbouring elements of a (B, D, L) tensor are 16-byte vectors, in the given order."""
    across = {TOKENS_A_THREAD: 2, CHANNELS_A_THREAD: 1}.get(order)
    if across is None or strides[across] != 1 or address % 16:
        return False
    if across == 1 and groups > 1 and shape[1] // groups * itemsize % 16:
        return False
    return all(strides[axis] * itemsize % 16 == 0 for axis in {0, 1, 2} - {across} if shape[axis] > 1)


def projection(x, states):
    """How B or C lies: (B, N, L), (B, G, N, L), or constant (D, N)."""
    if x.dim() == 2:
        return CONSTANT
    token, state = x.dim() - 1, x.dim() - 2

    def wide(across, elements):
        size = min(16, elements * x.dtype.itemsize)
        others = [axis for axis in range(x.dim()) if axis != across and x.shape[axis] > 1]
        aligned = all(x.stride(axis) * x.dtype.itemsize % size == 0 for axis in others)
        return x.stride(across) == 1 and x.data_ptr() % size == 0 and aligned

    if wide(token, 2):
        return VECTORS_OF_TOKENS
    return VECTORS_OF_STATES if states % 8 == 0 and wide(state, 8) else STRIDED


def projection_strides(x):
    """batch, group, state, token; where constant, the channel's stride stands for the token's."""
    if x.dim() == 2:
        return 0, 0, x.stride(1), x.stride(0)
    if x.dim() == 3:
        return x.stride(0), 0, x.stride(1), x.stride(2)
    return x.stride()
