r"""Exact match of the final number of an answer, as a local `evaluate` metric: the score of GSM8K.

    metric = evaluate.load("scripts/metrics/final_number")

The final number of a text is the first of these that it has:

1. the number right after its first `####`, as GSM8K's own answers end; not those of headings (`#### 1. First` where a
   `#### 2. Then` follows, or the answer is said below)
2. the first number in its last `\boxed{}`
3. of the sentence after its last "answer is" (or "answer:", "answer ="): the number right after it, else the last one
4. the last number of all

Of a calculation the result counts, the number after its last `=`. Numbers are compared by value: 1,234.50 and 1 234.5
are one, 1/2 is 0.5. A minus sign counts when it touches the number (or its currency sign), or is all that stands
between the mark and the number, and nothing stands before it that it could subtract from. Currency and percent signs,
units and markup are passed over, so 20% is 20. Not read: numbers in words, exponents, and a `million` after a number.
"""

import re
from fractions import Fraction

import datasets
import evaluate

VERSION = 2  # goes into the results: 1 read `#### 18. She makes 18 dollars.` as 1

_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|(?<![0-9.,])[1-9][0-9]{0,2}(?:[ \u00a0\u2009\u202f][0-9]{3})+(?![0-9/])"
NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]}%])-)?(?:[$€£]\s?(?P<inner_minus>-)?)?"
    # What is read is not given back (?>): the 1 of 18 is no number.
    rf"(?:(?P<mixed>[0-9]+) (?=[0-9]+/[0-9]))?(?P<number>(?>{_GROUPED}|[0-9]+)(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?:\s?/\s?(?P<denominator>[0-9]++)(?!/[0-9]))?"
)
MARK = re.compile(r"####[\s*]*(?:-\s+(?=[$€£]?\s?[0-9.]))?")
HEADING = re.compile(r"[ \t]*[.):][ \t*]*[^\s*]")  # what follows the number of one
CALCULATION = re.compile(r"[ \t]?[-+*/x\u00d7\u00f7][ \t]?[($€£]?[0-9]")
PHRASE = re.compile(r"\banswer\b[^\n.0-9]{0,60}?(?:\bis\b|[:=])", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
LATEX = (
    (r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2"),
    (r"\{,\}", ","),
    (r"\\(?:cdot|times)\b", "*"),
    (r"\\([$%])", r"\1"),
    (r"\\[!,;]", ""),
)
MOST_DIGITS = 100  # a model that repeats a digit for ever writes no number


def final_number(text: str) -> Fraction | None:
    """The final number of a text, None where it has none."""
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    text = text.replace("\N{MINUS SIGN}", "-").replace("**", "")
    if (mark := _answer_mark(text)) is not None:
        found = _stated(_closed_up(text[mark:].split("\n")[0]))
        return found[0] if found else None
    boxed = _last_boxed(text)
    phrases = list(PHRASE.finditer(text))
    if boxed and (found := _stated(boxed)):
        return found[0]
    if phrases:
        sentence = _closed_up(text[phrases[-1].end() :].lstrip(" \t\n:=*"))
        sentence = SENTENCE_END.split(sentence, maxsplit=1)[0]
        if found := _stated(sentence):
            return found[0 if NUMBER.match(sentence) or "=" in sentence else -1]
    found = numbers(text)
    return found[-1] if found else None


def _answer_mark(text: str) -> int | None:
    """Where the number after the first `####` begins that is no heading's; None where there is none."""
    marks = [(mark, number) for mark in MARK.finditer(text) if (number := NUMBER.match(text, mark.end()))]
    count = 0  # of those that are headings: 1. 2. 3.
    for _, number in marks:
        if number[0] != str(count + 1) or not HEADING.match(text, number.end()):
            break
        count += 1
    if count == len(marks) == 1:  # a heading where the answer is said below, else the answer
        below = text[marks[0][1].end() :].partition("\n")[2]
        count = int(bool(PHRASE.search(below) or _last_boxed(below)))
    if count == len(marks):
        return None
    mark = marks[count][0]
    return mark.end() - len(mark[0]) + len("####")


def _closed_up(text: str) -> str:
    """Without what stands between a mark and its number; a minus that stands there alone is the number's."""
    return re.sub(r"^-\s+(?=[$€£]?\s?[0-9.])", "-", text.lstrip(" \t*"))


def _last_boxed(text: str) -> str | None:
    r"""What is in the last \boxed{}, whose braces may hold others."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for place in range(start, len(text) if start >= len("\\boxed{") else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _stated(text: str) -> list[Fraction]:
    """The numbers of a text that states one; of a calculation, those after its last `=`."""
    first = NUMBER.match(text)
    result = text.rpartition("=")[2]
    if "=" in text and (not first or CALCULATION.match(text, first.end())) and (found := numbers(result)):
        return found
    return numbers(text)


def numbers(text: str) -> list[Fraction]:
    """The values of all numbers of a text, in order."""
    found = []
    for match in NUMBER.finditer(text):
        if len(match[0]) > MOST_DIGITS or (match["denominator"] and not int(match["denominator"])):
            continue
        digits = re.sub(r"[,\s]", "", match["number"])
        value = Fraction(digits) / int(match["denominator"] or 1) + int(match["mixed"] or 0)
        found.append(-value if match["minus"] or match["inner_minus"] else value)
    return found


class FinalNumber(evaluate.Metric):
    """`compute` returns exact_match and no_number (the shares of answers that are right, and that have no number), and
    for each answer `correct` (bool) and `numbers` (as text, None without one)."""

    version = VERSION

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
