r"""Exact match of the final number of an answer, as a local `evaluate` metric: the score of GSM8K.

    metric = evaluate.load("scripts/metrics/final_number")

The final number of a text is the first of these that it has:

1. the number right after its first `####`, as GSM8K's own answers end (not the number of a heading: `#### 1. First`)
2. the number in its last `\boxed{}`
3. of the sentence after its last "answer is" (or "answer:", "answer ="): the number right after it, else the last one;
   after the last `=` where there is one
4. the last number of all

Numbers are compared by value: 1,234.50 is 1234.5 and 1/2 is 0.5. A minus sign counts when it touches the number (or
its currency sign) and nothing stands before it that it could subtract from. Currency and percent signs, units and
markup are passed over, so 20% is 20. Not read: numbers in words, exponents, and a `million` after a number.
"""

import re
from fractions import Fraction

import datasets
import evaluate

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]}%])-)?(?:[$€£]\s?(?P<inner_minus>-)?)?"
    rf"(?:(?P<mixed>[0-9]+) (?=[0-9]+/[0-9]))?(?P<number>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:\s?/\s?(?P<denominator>[0-9]+)(?!/?[0-9]))?"
)
MARKED = re.compile(rf"####[\s*]*(?P<found>{NUMBER.pattern})(?!\s*[.):]\s*\S)")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
PHRASE = re.compile(r"\banswer\b[^\n.0-9]{0,60}?(?:\bis\b|[:=])", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
LATEX = ((r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2"), (r"\{,\}", ","), (r"\\([$%])", r"\1"), (r"\\[!,;]", ""))
MOST_DIGITS = 100  # a model that repeats a digit for ever writes no number


def final_number(text: str) -> Fraction | None:
    """The final number of a text, None where it has none."""
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    text = text.replace("\N{MINUS SIGN}", "-").replace("**", "")
    if marked := MARKED.search(text):
        return numbers(marked["found"])[0]
    if (boxed := BOXED.findall(text)) and (inside := numbers(boxed[-1])):
        return inside[-1]
    if phrases := list(PHRASE.finditer(text)):
        sentence = text[phrases[-1].end() :].lstrip(" \t\n:=*")
        sentence = SENTENCE_END.split(sentence, maxsplit=1)[0]
        right_after = NUMBER.match(sentence)
        result = sentence.rpartition("=")[2]
        if "=" in sentence and numbers(result):
            return numbers(result)[0]
        if found := numbers(sentence):
            return found[0 if right_after else -1]
    found = numbers(text)
    return found[-1] if found else None


def numbers(text: str) -> list[Fraction]:
    """The values of all numbers of a text, in order."""
    found = []
    for match in NUMBER.finditer(text):
        if len(match[0]) > MOST_DIGITS or (match["denominator"] and not int(match["denominator"])):
            continue
        value = Fraction(match["number"].replace(",", "")) / int(match["denominator"] or 1) + int(match["mixed"] or 0)
        found.append(-value if match["minus"] or match["inner_minus"] else value)
    return found


class FinalNumber(evaluate.Metric):
    """`compute` returns exact_match and no_number (the shares of answers that are right, and that have no number), and
    for each answer `correct` (bool) and `numbers` (as text, None without one)."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of the answers whose final number is that of the reference.",
            citation="",
            inputs_description="predictions and references: answers as text.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        found = [final_number(text) for text in predictions]
        correct = [
            number is not None and number == final_number(reference)
            for number, reference in zip(found, references, strict=True)
        ]
        return {
            "exact_match": sum(correct) / len(correct),
            "no_number": sum(number is None for number in found) / len(found),
            "correct": correct,
            "numbers": [None if number is None else str(number) for number in found],
        }
