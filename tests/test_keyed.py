"""Randomness as a function: repeatable, independent between keys, and uniform by outside statistics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfsight import keyed


def splitmix64(state: int, count: int) -> list[int]:
    """Steele, Lea and Flood's generator, from the paper, in plain integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_mix_is_splitmix64s() -> None:
    # The first outputs of SplitMix64 from the seed 1234567, as published with xoshiro's reference code.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, 5) == known
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(1, 6)], np.uint64)
    assert keyed.mix(states).tolist() == known


@given(
    st.integers(0, 2**40),
    st.text(max_size=8),
    st.lists(st.integers(0, 2**60), min_size=1, max_size=20),
    st.integers(1, 9),
)
def test_a_draw_depends_on_its_own_position_only(seed: int, purpose: str, positions: list[int], count: int) -> None:
    together = keyed.uniform(seed, purpose, positions, count)
    assert together.shape == (len(positions), count)
    assert ((together >= 0) & (together < 1)).all()
    for row, position in zip(together, positions, strict=True):
        assert (row == keyed.uniform(seed, purpose, [position], count)[0]).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"purpose": "flip"}])
def test_other_seeds_and_purposes_are_unrelated(other: dict[str, object]) -> None:
    key = {"seed": 0, "purpose": "crop"}
    a = keyed.uniform(**key, positions=range(20_000), count=1)[:, 0]  # type: ignore[arg-type]
    b = keyed.uniform(**(key | other), positions=range(20_000), count=1)[:, 0]  # type: ignore[arg-type]
    assert abs(stats.pearsonr(a, b).statistic) < 0.03


def test_draws_are_uniform_and_neighbours_independent() -> None:
    draws = keyed.uniform(0, "view", range(50_000), 4)
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    for a, b in ((draws[:-1, 0], draws[1:, 0]), (draws[:, 0], draws[:, 1])):
        table, _, _ = np.histogram2d(a, b, bins=10, range=[[0, 1], [0, 1]])
        assert stats.chisquare(table.ravel()).pvalue > 1e-3
