import math

import pytest

from moejet.engine_counters import Histogram, Rate


@pytest.mark.parametrize("seconds", [1.0, 50.0])
def test_a_steady_rate_is_found_at_any_time(seconds):
    """10 events a second: a short window has forgotten its start, a long one has not filled yet."""
    rate = Rate(seconds)
    assert rate.per_s(0.0) == 0.0
    for i in range(200):
        rate.add(1, now=100 + i / 10)
        if i > 50:
            assert rate.per_s(100 + (i + 1) / 10) == pytest.approx(10, rel=0.06)


def test_a_rate_decays_when_nothing_happens():
    rate = Rate(2.0)
    rate.add(100, now=5.0)
    assert rate.per_s(25.0) < 0.01


def test_histogram_counts_up_to_each_bound():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 3.0):
        histogram.observe(value)
    assert histogram.as_dict() == {
        "buckets": [[0.1, 2], [1.0, 3], [math.inf, 4]],
        "count": 4,
        "sum": pytest.approx(3.65),
    }
