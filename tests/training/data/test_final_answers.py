"""Final answers and verdicts in texts, and figures from them."""

import math

import pytest

from training.data.final_answers import as_verdict, expected_answer, final_answer, same, verdict
from training.evaluation.accuracy import in_order, interval, measured, pass_at


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6+9=15\n#### 15", "15"),
        ("She has 3.\nA: $1,234.50", "$1,234.50"),
        ("so \\boxed{1} and then \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("first #### 3 in a line\n#### 4", "4"),
        ("it is 12, or rather -3.5.", "-3.5"),
        ("12 apples, 1,200 in all", "1,200"),
        ("3/4 of them", "3/4"),
        ("an open \\boxed{7", "7"),
        ("v2 of model7b", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert final_answer(text) == answer


def test_a_data_set_gives_its_answer_in_a_solution_or_by_itself():
    assert expected_answer("Natalia sold 48/2 = 24.\n#### 72") == "72"
    assert expected_answer("\\[ s=\\boxed{1.6} \\mathrm{~cm} \\]") == "1.6"
    assert expected_answer(" \\left( 3, \\frac{\\pi}{2} \\right) ") == "\\left( 3, \\frac{\\pi}{2} \\right)"


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        ("72", "72"),
        ("72", "72.0"),
        ("1200", "$1,200"),
        ("0.5", "1/2"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{3}{4}", "\\dfrac{3}{4}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
        ("p - q", "p-q"),
        ("073", "\\textbf{(073)}"),
        ("55", "\\textbf{(55) }"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\\text{Evelyn}", "\\text{Evelyn}"),
    ],
)
def test_equal_as_mathematics(expected, given):
    assert same(expected, given)


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        ("72", "73"),
        ("72", None),
        ("0.5", "0.51"),
        ("p - q", "q - p"),
        ("(3, \\pi)", "(3, 2\\pi)"),
        ("1", "no idea"),
        ("7", ""),
    ],
)
def test_not_equal(expected, given):
    assert not same(expected, given)


def test_an_answer_that_would_take_for_ever_is_wrong_in_time():
    assert not same("3", "9^{9^{9^{9^{9^{9}}}}}")


def test_verdicts():
    assert verdict("Critique: ... Conclusion: wrong [END]") == "wrong"
    assert verdict("Conclusion: right, I thought. Conclusion: Incorrect [END]") == "wrong"
    assert verdict("It is right.") is None
    assert [as_verdict(value) for value in ("Correct", True, False, "wrong ", "maybe", None)] == [
        "right", "right", "wrong", "wrong", None, None,
    ]  # fmt: skip


def test_the_interval_is_wilsons():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, expected in [
        (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718)),
    ]:  # fmt: skip
        assert interval(successes, trials) == pytest.approx(expected, abs=5e-5)
    assert interval(0, 0) == (0.0, 1.0)


def test_pass_at_k_is_the_chance_of_one_right_among_k_drawn():
    for samples, correct, k in [(5, 2, 1), (5, 2, 3), (10, 1, 10), (4, 0, 2), (4, 4, 1)]:
        expected = 1 - math.comb(samples - correct, k) / math.comb(samples, k)
        assert pass_at(k, samples, correct) == pytest.approx(expected)


def test_responses_are_measured_by_question():
    def row(number, sample, correct):
        return {"number": number, "sample": sample, "correct": correct, "ended": sample == 0, "tokens": 4}

    shares = [[row(0, 0, True), row(0, 1, False)], [row(1, 0, False), row(1, 1, False)]]
    rows = in_order(shares[::-1])
    assert [(r["number"], r["sample"]) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = measured(rows, "eval_")
    assert found["eval_accuracy"] == 0.25
    assert found["eval_pass@2"] == 0.5
    assert (found["eval_accuracy_low"], found["eval_accuracy_high"]) == interval(0.5, 2)
    assert found["eval_eos_rate"] == 0.5
