"""The metric of GSM8K: which number of an answer counts."""

import gzip
import json
from fractions import Fraction

import evaluate
import pytest
from conftest import ROOT, SHARED
from hypothesis import given
from hypothesis import strategies as st
from metrics.final_number.final_number import final_number, numbers

GSM8K = SHARED / "data" / "gsm8k_test.jsonl.gz"

CASES = {
    # GSM8K's own form
    "She has 3 left.\n#### 18": 18,
    "#### 1,234": 1234,
    "####18": 18,
    "#### $1,234.50": Fraction(2469, 2),
    "#### -3": -3,
    "#### 1/2": Fraction(1, 2),
    "#### 18 dollars": 18,
    "#### **18**": 18,
    "#### 5.": 5,
    "#### 18\n<|prompter|>And of 20?": 18,  # it goes on after its answer
    "#### Step 1\nAdd 2 and 3.\n#### Step 2\nSo it is 5": 5,  # headings
    "#### 1. First\nAdd 2 and 3.\n#### 2. Then\nIt is 7.": 7,
    # said in words
    "The answer is 42.": 42,
    "the final answer is: $1,234.50.": Fraction(2469, 2),
    "Answer: 12 apples in 3 boxes": 12,
    "Answer:\n\n17": 17,
    "The answer is 5 + 3 = 8 dollars. There are 2 of us.": 8,
    "The answer is that in 5 days he earns 40 dollars. Check: 40 / 5 = 8.": 40,
    "The answer is 3. No, the answer is 4, as 2 are gone.": 4,
    "The answer is unclear, but I would say 9": 9,
    r"Thus \boxed{42} of the 50": 42,
    r"\[\boxed{\frac{3}{4}}\] of 8": Fraction(3, 4),
    r"It is \boxed{1{,}250}": 1250,
    # the last number
    "3 + 4 = 7": 7,
    "He has 10 - 3 = 7 apples left": 7,
    "16-3-4": 4,
    "between 10-12": 12,
    "It fell to -3 degrees": -3,
    "It fell to \N{MINUS SIGN}3": -3,
    "a loss of -$3.50": Fraction(-7, 2),
    "a loss of $-3.50": Fraction(-7, 2),
    "(5)-2": 2,
    "- 3 apples": 3,  # a list
    "it is $1,234.50.": Fraction(2469, 2),
    "20%": 20,
    r"20\% or \$30": 30,
    "42km": 42,
    "it takes 1 1/2 hours": Fraction(3, 2),
    "it takes 3 / 4 of it": Fraction(3, 4),
    "half is .5": Fraction(1, 2),
    "12,34 and 1,2345": 2345,
    "1,000,000": 1000000,
    "1/0": None,
    "none": None,
    "": None,
    "forty-two": None,
    "#### ": None,
    "9" * 5000: None,
    # what was read wrong before version 2
    "#### 18. She makes 18 dollars.": 18,
    "#### 18) done": 18,
    "#### 1,234. Done": 1234,
    "#### 72: clips": 72,
    "#### 540\n.\nA": 540,
    "#### 1.5: the share": Fraction(3, 2),
    "#### 12 + 3 = 15": 15,
    "#### 10 \u00d7 2 = 20 stamps": 20,
    "#### - 7": -7,
    "#### 1. She has one left.": 1,
    "#### 1. First\n2 + 3 = 5\n#### 2. Then\n5 * 2 = 10\nThe answer is 10.": 10,
    "#### 1. First\n2 + 3 = 5\n#### 5": 5,
    "#### 1) Add\nSo the answer is 9": 9,
    "2 + 2 = 4\n#### 4\n\nQuestion: what is 3 + 3?\n#### 6": 4,
    "#### 5/0": None,
    "He has 3.\n#### 5/0": None,
    "#### " + "7" * 150: None,
    r"So it is \boxed{10 \text{ m}^2}": 10,
    r"\boxed{2 \cdot 3 = 6}": 6,
    r"\boxed{\text{about } 5}": 5,
    r"\boxed{x": None,
    "The answer is 8 hours, since 2 * 3 = 6 is too few.": 8,
    "The answer is - 3": -3,
    "The answer is: x = 4 and not 5": 4,
    "She has 1 000 000 stamps.": 1000000,
    "It costs $12 500.50": Fraction(25001, 2),
    "in 2021 100 people": 100,
}


@pytest.mark.parametrize(("text", "expected"), CASES.items(), ids=range(len(CASES)))
def test_final_number(text, expected):
    assert final_number(text) == expected


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.00", "{}/1", "${}", "{} %"]))
def test_a_number_in_any_dress_has_its_value(number, dress):
    text = dress.format(number)
    assert numbers(text) == [number]
    assert final_number(f"7 of 8, so the answer is {text}.") == number
    assert final_number(f"3 and 4\n#### {text}") == number


@given(st.text(alphabet="0123456789,./-$#=% answeri\n\\boxed{}", max_size=200))
def test_any_text_is_read(text):
    assert final_number(text) is None or numbers(text.replace("**", ""))


def test_metric_counts():
    metric = evaluate.load(str(ROOT / "scripts" / "metrics" / "final_number"), keep_in_memory=True)
    counted = metric.compute(
        predictions=["it is 1,000.0", "no idea", "#### 5"], references=["#### 1000", "#### 2", "x\n#### 6"]
    )
    assert counted == {
        "exact_match": 1 / 3,
        "no_number": 1 / 3,
        "correct": [True, False, False],
        "numbers": ["1000", None, "5"],
    }


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_references_of_gsm8k():
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert len(answers) == 1319
    for answer in answers:
        number = int(answer.split("####")[1].replace(",", ""))
        for end in (
            "",
            ".",
            ". Done.",
            ") done",
            ": so many",
            " dollars",
            "\n.\nA",
            "\n\nQuestion: what is 3 + 3?\n#### 6",
        ):
            assert final_number(answer + end) == number, end


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="the cases are not here")
def test_shared_cases():
    cases = [json.loads(line) for line in (SHARED / "cases" / "gsm8k_answers.jsonl").read_text().splitlines()]
    assert len(cases) == 19
    for case in cases:
        assert final_number(case["reply"]) == (case["number"] and Fraction(case["number"])), case
