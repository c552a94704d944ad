"""Codes of a few bits in bytes and in 32-bit words: of each word the first code is the lowest."""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor


def from_words(
    words: Int32[Tensor, "rows words"], bits: int, width: int
) -> UInt8[Tensor, "rows width"]:
    """Return the codes of rows of words; each holds 32 // bits, and what is left of it nothing."""
    shifts = torch.arange(0, 32 - bits + 1, bits, dtype=torch.int32)
    codes = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)[:, :width].to(torch.uint8)


def to_words(codes: UInt8[Tensor, "rows width"], bits: int) -> Int32[Tensor, "rows words"]:
    """Return rows of words that hold the codes."""
    each = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    shifts = torch.arange(0, each * bits, bits, dtype=torch.int32)
    fields = padded.to(torch.int32).reshape(codes.shape[0], -1, each) << shifts
    return fields.sum(dim=2, dtype=torch.int32)


def from_bytes(packed: UInt8[Tensor, "rows bytes"]) -> UInt8[Tensor, "rows width"]:
    """Return the codes of four bits in rows of bytes."""
    return torch.stack([packed & 15, packed >> 4], dim=2).reshape(packed.shape[0], -1)


def to_bytes(codes: UInt8[Tensor, "rows width"]) -> UInt8[Tensor, "rows bytes"]:
    """Return rows of bytes that hold the codes of four bits, of which there is an even number."""
    pairs = codes.reshape(codes.shape[0], -1, 2)
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)
