"""Random numbers as pure functions of (seed, epoch, sample) or (seed, step, rank).

A counter-based generator (the SplitMix64 finaliser of Steele, Lea and Flood, OOPSLA 2014) in tensor arithmetic: each
sample carries a 64-bit key, and every crop, mask or flip is a hash of that key. The same sample therefore sees the
same numbers in any batch, on any device, with any number of processes and after any resume.
"""

import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own shift of int64 keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def sample_keys(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """One 64-bit key per sample, (B,) int64, from the run's seed, the epoch and the sample's index."""
    keys = torch.full_like(indices, seed, dtype=torch.int64)
    for part in (torch.full_like(keys, epoch), indices.to(torch.int64)):
        keys = _mix(keys * _GOLDEN + part + 1)
    return keys


def uniform(keys: Tensor, count: int, stream: str) -> Tensor:
    """`count` numbers from U[0, 1) per key, (B, count) float32; each named stream is independent of the others."""
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    offsets = counter * _GOLDEN + zlib.crc32(stream.encode()) * 0x1000193
    bits = _mix(_mix(keys)[:, None] + offsets)
    return _shift_right(bits, 40).to(torch.float32) / (1 << 24)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's own generator for one step of one process: drop path, dropout."""
    return int(sample_keys(seed, step, torch.tensor([rank]))[0]) & (2**63 - 1)
