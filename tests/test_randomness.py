"""The counter-based generator against the statistics of ideal uniform numbers, and against its own past."""

import numpy as np
import torch
from scipy import stats

from emssl_hf.randomness import sample_keys, step_seed, uniform

#: What the generator gave when the first runs were recorded: a change would break every resume.
KEYS = [4618857875736427910, 1729233307704022544]
NUMBERS = [
    [0.648756742477417, 0.38560765981674194, 0.6737470030784607],
    [0.4300285577774048, 0.36205345392227173, 0.39330530166625977],
]
STEP_SEEDS = [4618857875736427910, 2871514730620370382, 1729233307704022544]


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1])


def test_numbers_are_uniform_on_the_unit_interval() -> None:
    draws = uniform(sample_keys(0, 0, torch.arange(1000)), 1000, "noise").flatten().double().numpy()
    assert draws.min() >= 0 and draws.max() < 1
    # Standard errors at 10^6 numbers: mean 2.9e-4, variance 7.5e-5. Five of them.
    assert abs(draws.mean() - 1 / 2) < 1.5e-3
    assert abs(draws.var() - 1 / 12) < 4e-4
    counts = np.histogram(draws, bins=1024, range=(0, 1))[0]
    assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4  # not too even either


def test_consecutive_numbers_fill_the_square_evenly() -> None:
    draws = uniform(sample_keys(3, 1, torch.arange(500)), 1000, "noise").numpy()
    counts = np.histogram2d(draws[:, :-1].ravel(), draws[:, 1:].ravel(), bins=32, range=[[0, 1], [0, 1]])[0]
    assert 1e-4 < stats.chisquare(counts.ravel()).pvalue < 1 - 1e-4


def test_streams_counters_and_neighbouring_keys_are_independent() -> None:
    count, limit = 1000, 5 / np.sqrt(2e5)  # five standard errors of a correlation of 2e5 pairs
    indices = torch.arange(200)

    def draws(seed: int = 0, epoch: int = 0, shift: int = 0, stream: str = "noise") -> torch.Tensor:
        return uniform(sample_keys(seed, epoch, indices + shift), count, stream)

    own = draws()
    for other in (draws(seed=1), draws(epoch=1), draws(shift=1), draws(stream="view0.crop"), own.roll(1, 1)):
        assert not torch.equal(other, own)
        assert abs(correlation(own, other)) < limit


def test_seed_epoch_and_index_cannot_be_traded_for_each_other() -> None:
    keys = {int(sample_keys(s, e, torch.tensor([i]))[0]) for s in range(12) for e in range(12) for i in range(12)}
    assert len(keys) == 12**3


def test_one_bit_of_the_index_changes_half_of_the_bits_of_the_key() -> None:
    indices = torch.arange(4096)
    first, second = (sample_keys(7, 2, values).numpy().view(np.uint64) for values in (indices, indices ^ 1))
    changed = np.bitwise_count(first ^ second).mean()
    assert abs(changed - 32) < 5 * 4 / np.sqrt(4096)


def test_a_sample_gets_the_same_numbers_in_any_batch_and_order() -> None:
    whole = uniform(sample_keys(5, 2, torch.arange(64)), 9, "noise")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(sample_keys(5, 2, order), 9, "noise"), whole[order])
    assert torch.equal(uniform(sample_keys(5, 2, torch.tensor([17])), 9, "noise")[0], whole[17])
    assert torch.equal(uniform(sample_keys(5, 2, torch.arange(64)), 4, "noise"), whole[:, :4])


def test_numbers_equal_an_implementation_in_python_integers() -> None:
    import zlib

    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, epoch, index in ((0, 0, 0), (1, 2, 3), (123, 45, 678_901)):
        key = mix((mix((seed * golden + epoch + 1) & mask) * golden + index + 1) & mask)
        keys = sample_keys(seed, epoch, torch.tensor([index]))
        assert int(keys[0]) & mask == key
        offset = zlib.crc32(b"noise") * 0x1000193
        expected = [(mix((mix(key) + c * golden + offset) & mask) >> 40) / 2**24 for c in range(1, 6)]
        assert uniform(keys, 5, "noise")[0].tolist() == expected


def test_numbers_stay_what_they_were_when_runs_were_first_recorded() -> None:
    keys = sample_keys(0, 0, torch.arange(2))
    assert keys.tolist() == KEYS
    assert uniform(keys, 3, "noise").tolist() == NUMBERS
    assert [step_seed(0, 0, 0), step_seed(0, 1, 0), step_seed(0, 0, 1)] == STEP_SEEDS


def test_step_seeds_are_distinct_and_fit_torch() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(4)}
    assert len(seeds) == 800 and min(seeds) >= 0
    torch.Generator().manual_seed(max(seeds))
