import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.schedule import constant, cosine, linear, piecewise

values = st.floats(-100, 100)
steps = st.integers(1, 1000)


@given(values, st.integers(0, 1000))
def test_a_constant_does_not_change(value, step):
    assert constant(value)(step) == value


@pytest.mark.parametrize("curve", [linear, cosine])
@given(values, values, steps, st.integers(0, 1000))
def test_a_curve_starts_and_ends_where_it_says_and_stays_there(curve, start, end, length, later):
    schedule = curve(start, end, length)
    assert schedule(0) == pytest.approx(start)
    assert schedule(length + later) == pytest.approx(end)


@pytest.mark.parametrize("curve", [linear, cosine])
@given(steps)
def test_a_curve_never_turns_back(curve, length):
    path = [curve(0.0, 1.0, length)(step) for step in range(length + 1)]
    assert path == sorted(path)


@pytest.mark.parametrize("curve", [linear, cosine])
def test_a_curve_is_halfway_at_half_time(curve):
    assert curve(1.0, 3.0, 10)(5) == pytest.approx(2.0)


def test_a_cosine_leaves_slowly():
    assert cosine(0.0, 1.0, 10)(1) < linear(0.0, 1.0, 10)(1)


def test_a_piecewise_schedule_jumps_at_its_points():
    schedule = piecewise((0, 1e-3), (100, 1e-4), (200, 0.0))
    assert [schedule(step) for step in (0, 99, 100, 199, 200, 999)] == [1e-3, 1e-3, 1e-4, 1e-4, 0.0, 0.0]


def test_before_its_first_point_a_piecewise_schedule_has_its_value():
    assert piecewise((10, 2.0), (20, 3.0))(0) == 2.0
