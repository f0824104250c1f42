"""Token ids of a byte-level vocabulary, for models that need no tokenizer."""

import torch


def byte_tokens(text, *, max_tokens=None):
    return torch.tensor([list(text.encode())[:max_tokens]])  # (1, L) int64
