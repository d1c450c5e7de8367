"""Growth is distinguished from plateaus, saw teeth, noise and counts that fall."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closewait_guard._judge.growth import Series

WINDOW = 30
quick = settings(max_examples=40, deadline=None)


def growths(counts, interval=60.0, window=WINDOW):
    """The growth that the series shows, by the number of the report."""
    series, found = Series(window), {}
    for number, count in enumerate(counts):
        series = series.with_count(number * interval, count)
        if series.growth is not None:
            found[number] = series.growth
    return found


def noisy(level, length, seed, spread=None):
    chance = random.Random(seed)
    spread = max(1.0, level**0.5) if spread is None else spread
    return [max(0, round(chance.gauss(level, spread))) for _ in range(length)]


# Growth.


@quick
@given(start=st.integers(0, 1000), rate=st.integers(1, 50), interval=st.sampled_from([1, 60, 3600]))
def test_a_steady_leak_is_seen_when_its_window_is_full_and_ever_after(start, rate, interval):
    found = growths([start + rate * number for number in range(80)], interval)
    assert list(found) == list(range(WINDOW, 80))
    for growth in found.values():
        assert growth.per_minute == pytest.approx(60 * rate / interval)
        assert growth.risen == rate * (WINDOW - 1)
        assert growth.seconds == pytest.approx(interval * (WINDOW - 1))


@pytest.mark.parametrize("window", [10, 30, 100, 1000])
def test_a_steady_leak_is_seen_with_any_window(window):
    assert min(growths(range(window + 2), window=window)) == window


def test_a_slow_drip_is_seen_with_a_report_a_minute():
    found = growths([number // 10 for number in range(600)])
    assert min(found) < 90, "within an hour and a half"
    assert set(found) >= set(range(120, 600)), "and from then on"
    for growth in found.values():
        assert growth.per_minute == pytest.approx(0.1, rel=0.5)


def test_a_slow_drip_is_seen_with_a_report_a_second():
    found = growths([number // 600 for number in range(12_000)], interval=1.0)
    assert min(found) < 3600, "within an hour"
    last = list(found.values())[-1]
    assert last.per_minute == pytest.approx(0.1, rel=0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 3])
def test_a_leak_after_a_quiet_day_is_seen(rate):
    found = growths([0] * 1440 + [int(number * rate) for number in range(120)])
    assert 1440 < min(found) < 1440 + 90


@pytest.mark.parametrize("seed", range(3))
def test_a_leak_after_a_noisy_day_is_seen_and_not_before(seed):
    day = noisy(10, 1440, seed)
    leak = [count + number // 2 for number, count in enumerate(noisy(10, 200, seed + 100))]
    assert 1440 < min(growths(day + leak)) < 1440 + 100


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_beneath_noise_is_seen(seed):
    noise = noisy(20, 200, seed)
    assert min(growths([count + number for number, count in enumerate(noise)])) < 80


def test_one_report_that_is_far_off_decides_nothing():
    counts = list(range(100))
    counts[40] = counts[41] = 0
    found = growths(counts)
    assert 35 in found
    assert found[99].per_minute == pytest.approx(1.0)
    assert not growths([3] * 50 + [90] + [3] * 100)


@pytest.mark.parametrize(("length", "interval"), [(300, 60.0), (6000, 1.0)])
def test_a_drip_ends_at_once_when_its_sockets_are_closed(length, interval):
    drip = [int(number * interval / 600) for number in range(length)]
    found = growths([*drip, *[0] * 30], interval)
    assert max(found) == length - 1


# No growth.


@quick
@given(level=st.integers(0, 10**6), before=st.integers(0, 10**6), steps=st.integers(1, 29))
def test_a_plateau_is_no_growth_however_it_was_reached(level, before, steps):
    climb = [before + (level - before) * number // steps for number in range(steps)]
    assert not {number for number in growths([*climb, *[level] * 200]) if number > 2 * WINDOW}
    assert not growths([level] * 200)


@settings(max_examples=150, deadline=None)
@given(
    period=st.integers(2, WINDOW),
    height=st.integers(1, 1000),
    base=st.integers(0, 1000),
    phase=st.integers(0, WINDOW),
)
def test_saw_teeth_of_any_period_up_to_the_window_are_no_growth(period, height, base, phase):
    counts = [base + height * ((number + phase) % period) for number in range(200)]
    assert not growths(counts)


@quick
@given(period=st.integers(2, WINDOW), height=st.integers(1, 50))
def test_saw_teeth_that_fall_slowly_and_rise_at_once_are_no_growth(period, height):
    counts = [height * (period - number % period) for number in range(200)]
    assert not growths(counts)


@pytest.mark.parametrize("level", [0, 1, 3, 10, 50, 100, 1000, 10_000])
def test_noise_around_a_constant_is_no_growth(level):
    for seed in range(8):
        assert not growths(noisy(level, 1000, 1000 * level + seed))


def test_noise_is_no_growth_with_the_shortest_window_too():
    alarms = sum(bool(growths(noisy(50, 500, seed), window=10)) for seed in range(40))
    assert alarms <= 1


@quick
@given(counts=st.lists(st.integers(0, 1000), min_size=40, max_size=120))
def test_counts_that_fall_are_no_growth(counts):
    assert not growths(sorted(counts, reverse=True))


def test_growth_that_has_stopped_is_no_growth_any_more():
    found = growths([*range(60), *[60] * 100])
    assert 59 in found
    assert max(found) < 70


def test_growth_that_fell_back_is_no_growth_any_more():
    found = growths([*range(60), *[0] * 60])
    assert max(found) == 59


@pytest.mark.parametrize("periods", [(3, 15), (10, 20), (20, 28)])
def test_saw_teeth_of_unequal_length_are_hardly_ever_growth(periods):
    """Such as those of a pool that shrinks whenever the garbage collector runs."""
    alarms = 0
    for seed in range(30):
        chance, counts = random.Random(seed), []
        while len(counts) < 600:
            counts += [number + chance.randint(0, 2) for number in range(chance.randint(*periods))]
        alarms += bool(growths(counts))
    assert alarms <= 1


# Memory.


@quick
@given(counts=st.lists(st.integers(0, 1000), max_size=200), window=st.integers(10, 40))
def test_the_history_is_bounded_by_the_window_times_the_number_of_tiers(counts, window):
    series = Series(window)
    for number, count in enumerate(counts):
        series = series.with_count(float(number), count)
    assert all(len(tier.points) <= window for tier in series.tiers)
    assert len(series.tiers) <= max(1, len(counts)).bit_length()


def test_a_month_of_seconds_is_some_hundred_points():
    series = Series(WINDOW)
    for number in range(40_000):
        series = series.with_count(float(number), 5)
    points = sum(len(tier.points) for tier in series.tiers)
    assert points <= WINDOW * 16
    oldest = min(tier.points[0].at for tier in series.tiers)
    assert oldest < 40_000 / 2
    # The last tier passes nothing on.
    assert len(series.tiers) <= 20


def test_reports_at_the_same_time_are_no_division_by_zero():
    series = Series(WINDOW)
    for number in range(2 * WINDOW):
        series = series.with_count(7.0, number)
    assert series.growth.risen == WINDOW - 1
