import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.tables import MISSING, Schema, Target

ROWS = [
    {"age": "30", "job": "clerk", "city": "a", "paid": "<=50K", "status": "single"},
    {"age": "50", "job": "?", "city": "b", "paid": "<=50K", "status": "married"},
    {"age": "", "job": "clerk", "city": "a", "paid": ">50K", "status": "divorced"},
    {"age": "40", "job": "cook", "city": "c", "paid": "?", "status": "single"},
]


def test_columns_are_of_numbers_or_of_categories_and_targets_are_no_inputs():
    schema = Schema.of(ROWS, ["paid", "status=single"], leave_out=["city"])
    assert list(schema.numbers) == ["age"]
    assert list(schema.categories) == ["job"]
    assert [target.name for target in schema.targets] == ["paid=>50K", "status=single"]


def test_numbers_are_standardised_and_a_missing_one_is_the_mean_and_marked():
    table = Schema.of(ROWS, ["paid"]).encode(ROWS)
    assert table.numbers[:, 0].tolist() == pytest.approx([-(1.5**0.5), 1.5**0.5, 0, 0])
    assert table.numbers[:, 1].tolist() == [0, 0, 1, 0]


def test_a_missing_category_is_one_of_its_own_and_an_unknown_one_is_0():
    schema = Schema.of(ROWS, ["paid"])
    jobs = schema.encode([*ROWS, ROWS[0] | {"job": "king", "age": "old"}]).categories[:, 0].tolist()
    assert jobs[0] == jobs[2]
    assert len(set(jobs)) == 4
    assert jobs[4] == 0
    assert schema.sizes == [4, 4, 4]


def test_a_missing_label_is_nan():
    labels = Schema.of(ROWS, ["paid", "status=single"]).encode(ROWS).labels
    assert labels[:, 0].isnan().tolist() == [False, False, False, True]
    assert labels[:3, 0].tolist() == [0, 0, 1]
    assert labels[:, 1].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("values", "positive"), [("001", "1"), ("yyn", "n"), (("No", "Yes", "Yes"), "Yes"), ((True, False, True), "True")]
)
def test_of_two_values_the_positive_one_is_1_yes_or_the_rarer(values, positive):
    assert Target.of("won", [{"won": value} for value in values]).value == positive


@pytest.mark.parametrize(
    ("targets", "leave_out", "why"),
    [
        ([], [], "no column is named to predict; name one per task, of: age, job"),
        (["pay"], [], "has no column 'pay' to predict"),
        (["status"], [], r"the column status has 3 values \(divorced, married, single\).*status=divorced"),
        (["status=gone"], [], "'status=gone' is not a task"),
        (["paid"], ["town"], "has no column 'town' to leave out"),
        (["paid"], ["age", "job", "city", "status"], "no column is left as an input"),
    ],
)
def test_what_is_no_task_is_refused(targets, leave_out, why):
    with pytest.raises(ValueError, match=why):
        Schema.of(ROWS, targets, leave_out)


values = st.one_of(st.sampled_from([*MISSING, "x", "y"]), st.floats(-9, 9).map(str), st.integers(-9, 9))


@given(st.lists(st.tuples(values, values), min_size=1))
def test_every_table_becomes_finite_inputs(pairs):
    rows = [{"a": a, "b": b, "won": str(i % 2)} for i, (a, b) in enumerate([*pairs, *pairs])]
    schema = Schema.of(rows, ["won"])
    table = schema.encode(rows)
    assert len(table) == len(rows)
    assert table.numbers.isfinite().all()
    assert (table.categories < torch.tensor(schema.sizes)).all()
    assert table.numbers.shape[1] == 2 * len(schema.numbers)
