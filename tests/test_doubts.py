"""Classifiers that are of no use are told from their confusion of classes."""

import pytest

from metakd.pipeline.doubts import doubt, one_label


@pytest.mark.parametrize(
    ("confusions", "said"),
    [
        ([[[9, 1], [1, 9]]], ""),
        ([[[10, 0], [10, 0]]], "gives all 20 examples the same class, the right one of 50.0%"),
        ([[[5, 5], [5, 5]]], "is right in 50.0%, and always the same class would be in 50.0%"),
        ([[[14, 1], [4, 1]]], "is right in 75.0%, and always the same class would be in 75.0%"),
        ([[[80, 10], [2, 8]]], ""),  # four of five rare ones are worth ten frequent ones
        ([[[15, 0], [4, 1]]], ""),
        ([[[20, 0], [0, 0]]], ""),  # nothing else was asked for
        ([[[12, 8], [0, 0]]], ""),
        ([[[10, 0], [0, 10]], [[5, 5], [5, 5]]], ""),  # of all domains together
        ([[[0, 5, 0], [0, 5, 0], [0, 5, 0]]], "gives all 15 examples the same class"),
        ([], ""),
    ],
)
def test_a_student_of_no_use(confusions, said):
    scores = {f"confusion/{number}": rows for number, rows in enumerate(confusions)}
    found = doubt({"accuracy": 0.5, **scores})
    assert found.startswith(said) and bool(found) == bool(said)


def test_answers_that_are_all_the_same():
    assert one_label(["good"] * 20) == "the model gives all 20 texts the same label, 'good'"
    assert one_label(["good"] * 19) == one_label(["good"] * 20 + ["bad"]) == one_label([]) == ""
