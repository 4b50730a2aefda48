"""Chat data of one's own: every form it comes in, what is learnt of it, and its place in a recipe."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import ROOT
from transformers import AutoTokenizer

from data.dialogue import prepare_tokenizer
from data.mix import prepare_mix
from data.reading import Reading
from recipe.keys import Recipe
from recipe.load import load_recipe
from sources.messages import MessagesOptions, read_messages
from sources.messages_columns import Columns
from sources.registry import find_source
from sources.source import Record, Remarks
from training.plan import training_rows
from utils.errors import UserError

OPTIONS = MessagesOptions(source="messages", input_file_path="rows.jsonl", val_split=0)


FIXTURES = ROOT / "tests" / "fixtures"
CASES = [json.loads(line) for line in (FIXTURES / "chat_forms.jsonl").read_text().splitlines()]
# A record in the form of each of 165 well-known data sets: what it is, or why not, with the `columns` that read it.
PUBLIC = [json.loads(line) for line in (FIXTURES / "public_forms.jsonl").read_text().splitlines()]


def read(tmp_path, *rows, options=OPTIONS):
    """The conversations of these rows as (role, content) pairs, and what was dropped."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading("mine", options, [path], 1)
    return [[(m.role, m.content) for m in conversation.messages] for conversation in reading], dict(reading.dropped)


def chat(*texts, roles=("user", "assistant")):
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


PAIR = [("user", "q"), ("assistant", "a")]
SECOND = [("user", "r"), ("assistant", "b")]
JOINED = [("user", "q r"), ("assistant", "ab")]
SYSTEM = {"role": "system", "content": "s"}
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": chat("q", "a"), "prompt": "of ultrachat, beside them"}, PAIR),
        (
            {"messages": [SYSTEM, *chat("q", "a", "r", "b")]},
            [("system", "s"), *PAIR, ("user", "r"), ("assistant", "b")],
        ),
        ({"messages": chat("q", "a"), "system": "s"}, [("system", "s"), *PAIR]),
        ({"messages": [SYSTEM, *chat("q", "a")], "system": "another"}, [("system", "s"), *PAIR]),
        ({"messages": chat("q", "a"), "system_prompt": " "}, PAIR),
        ({"messages": chat("q", "a", "unanswered")}, PAIR),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
        ({"conversations": chat("q", "a", roles=("prompter", "Assistant"))}, PAIR),
        ({"conversation": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}]}, PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "p", "output": "a"}, [("user", "q\n\np"), ("assistant", "a")]),
        ({"INSTRUCTION": "q", "RESPONSE": "a", "SOURCE": "x"}, PAIR),
        ({"instruction": "q", "context": None, "response": "a"}, PAIR),
        ({"prompt": "q", "completion": "a"}, PAIR),
        ({"question": "q", "answer": "a", "system": "s"}, [("system", "s"), *PAIR]),
        # The ways of a list.
        ({"messages": ["q", "a"]}, PAIR),
        ({"dialog": [["q", "a"]]}, PAIR),
        ({"messages": [["user", "q"], ["assistant", "a"]]}, PAIR),
        ({"conversation": [{"human": "q", "assistant": "a"}, {"assistant": "b", "human": "r"}]}, [*PAIR, *SECOND]),
        ({"dialogue": [{"query": "q", "response": "a"}]}, PAIR),
        ({"conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}, [*PAIR, *SECOND]),
        ({"conversation": [{"instruction": "", "input": "q", "output": "a"}]}, PAIR),
        ({"Messages": [{"Role": "User", "Content": "q"}, {"ROLE": "Assistant", "CONTENT": "a"}]}, PAIR),
        ({"chosen": HH, "rejected": HH}, [*PAIR, *SECOND]),
        ({"conversation": "### Human: q### Assistant: a ### Human: r\n### Assistant: b"}, [*PAIR, *SECOND]),
        ({"history": "\n\nHuman: q\n\nAssistant: a", "prompt": "r", "response": "b"}, [*PAIR, *SECOND]),
        # As Arrow gives them: every object with every field, null where it was none.
        ({"messages": [{"user": "q", "assistant": None}, {"user": None, "assistant": "a"}]}, PAIR),
        ({"messages": [{"user": "q", "assistant": "a"}, {"user": None, "assistant": None}]}, PAIR),
        ({"messages": [{"human": "q", "gpt": "a", "assistant": None, "user": None, "system": None}]}, PAIR),
        ({"messages": [{"role": None, "content": None, "user": "q", "assistant": "a"}]}, PAIR),
        ({"messages": [{"user": "q", "model": "gpt-4", "assistant": "a", "bot": "another"}]}, PAIR),
        ({"messages": [{"user": "q", "assistant": "a", "image": None, "tool_calls": [], "thinking": " "}]}, PAIR),
        ({"chat": {"role": ["user", "assistant"], "content": ["q", "a"]}}, PAIR),
        ({"conversations": str(chat("q", "a"))}, PAIR),  # Python's own notation, as pandas writes it into CSV
        ({"messages": json.dumps(json.dumps(chat("q", "a")))}, PAIR),
        ({"messages": [{"speaker": "User ", "text": "q"}, {"speaker": "BOT", "text": "a"}]}, PAIR),
        ({"messages": [{"role": None, "from": "human", "content": None, "value": "q"}, *chat("q", "a")[1:]]}, PAIR),
        ({"messages": [{"role": "system", "content": None}, *chat("q", "a")]}, PAIR),
        ({"messages": [*chat("q", "a"), {"role": "system", "content": " "}, *chat("r", "b")]}, [*PAIR, *SECOND]),
        ({"messages": [{"role": "developer", "content": "s"}, *chat("q", "a")]}, [("system", "s"), *PAIR]),
        ({"messages": [], "conversations": "", "instruction": "q", "output": "a"}, PAIR),
        ({"conversations": None, "messages": chat("q", "a"), "images": []}, PAIR),
        # The parts of a content.
        ({"messages": chat([{"type": "text", "text": "q"}, {"type": "input_text", "text": " r"}], ["a", "b"])}, JOINED),
        ({"messages": chat([{"text": "q r", "type": "text", "image": None}], {"type": "text", "text": "ab"})}, JOINED),
        ({"messages": chat("q r", [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "ab"}])}, JOINED),
        ({"messages": [message | {"tool_calls": "[]", "images": "null"} for message in chat("q", "a")]}, PAIR),
        ({"messages": chat("q", "a"), "system": [{"text": "s"}]}, [("system", "s"), *PAIR]),
        ({"messages": [message | {"images": [], "tools": [None]} for message in chat("q", "a")]}, PAIR),
        ({"messages": chat("q", "a"), "system": {"type": "text", "text": "s"}}, [("system", "s"), *PAIR]),
        # A prompt and a reply.
        ({"prompt": HH.removesuffix(" b"), "response": "b"}, [*PAIR, *SECOND]),
        (
            {"prompt": "Human: or Assistant: what am I?", "response": "a"},
            [("user", "Human: or Assistant: what am I?"), PAIR[1]],
        ),
        ({"prompt": json.dumps(chat("q")), "completion": str(chat("a", roles=("assistant",)))}, PAIR),
        ({"prompt": '[{"a": 1}] is what?', "completion": "a"}, [("user", '[{"a": 1}] is what?'), PAIR[1]]),
        ({"prompt": '[{"a": 1}]', "completion": "a"}, [("user", '[{"a": 1}]'), PAIR[1]]),
        ({"query": "r", "response": "b", "history": [["q", "a"]]}, [*PAIR, *SECOND]),
        ({"prompt": "r", "response": "b", "history": json.dumps(chat("q", "a"))}, [*PAIR, *SECOND]),
        ({"instruction": "q", "output": "a", "history": None, "system": ""}, PAIR),
        ({"instruction": "q", "output": "a", "history": []}, PAIR),
        ({"instruction": "q", "input": float("nan"), "output": "a", "system": float("nan")}, PAIR),
        ({"input": "q", "output": "a"}, PAIR),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ({"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")}, PAIR),
        ({"prompt": "q", "chosen": {"role": "assistant", "content": "a"}}, PAIR),
        ({"chosen": chat("q", "a"), "rejected": chat("q", "b")}, PAIR),
        ({"messages": chat("q", [{"type": "text", "text": None}, {"type": "text", "text": "a"}, None])}, PAIR),
        ({"prompt": chat("q"), "chosen": [{"role": "assistant", "content": "a"}]}, PAIR),
        ({"prompt": [SYSTEM, *chat("q")], "completion": "a"}, [("system", "s"), *PAIR]),
        ({"prompt": "q", "completion": ["a"]}, PAIR),
        ({"problem": "q", "solution": "a"}, PAIR),
        ({"inputs": "q", "targets": "a"}, PAIR),
        ({"Human": "q", "Bot": "a"}, PAIR),
        ({"user": "q", "assistant": "a", "system_message": "s"}, [("system", "s"), *PAIR]),
        ({"definition": "q", "input": "p", "output": "a"}, [("user", "q\n\np"), PAIR[1]]),
        ({"instruction": "q", "passage": "p", "output": "a"}, [("user", "q\n\np"), PAIR[1]]),
        # A list of messages that waits for its reply.
        ({"messages": [SYSTEM, *chat("q")], "answer": "a"}, [("system", "s"), *PAIR]),
        ({"messages": chat("q", "a", "r"), "completion": "b"}, [*PAIR, *SECOND]),
        ({"conversations": chat("q"), "chosen": {"role": "assistant", "content": "a"}}, PAIR),
        ({"messages": chat("q", "a", "r"), "chosen": chat("q", "a", "r", "b")}, [*PAIR, *SECOND]),
        ({"messages": chat("q", "a", "r"), "target": 3}, PAIR),
    ],
)
def test_forms(tmp_path, row, expected):
    assert read(tmp_path, row) == ([expected], {})


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"question": "q", "answer": "a", "contents": ["passage 1", "passage 2"]}, {"contents"}),
        ({"question": "q", "answer": "a", "contents": "passage"}, {"contents"}),
        ({"messages": chat("q", "a", "r"), "gpt": "gpt-4"}, {"gpt"}),
    ],
)
def test_a_name_of_a_list_or_a_reply_that_holds_none(row, unused):
    remarks = Remarks()
    ((conversation),) = read_messages(Record(row, Path("x"), 1, 1), OPTIONS, remarks, 1)
    assert ([(one.role, one.content) for one in conversation.messages], remarks.unused) == (PAIR, unused)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_forms_of_the_fixture(case):
    """A record, and its messages with whether each is learnt; or that it is dropped."""
    remarks = Remarks()
    found = read_messages(Record(case["record"], Path("x"), 1, 1), OPTIONS, remarks, 1)
    if "drop" in case["expect"]:
        assert (found, sum(remarks.values())) == (None, 1)
        return
    ((conversation),) = found
    learnt = [(message.role == "assistant" and message.train) for message in conversation.messages]
    texts = [(message.role, message.content) for message in conversation.messages]
    assert [[*text, train] for text, train in zip(texts, learnt, strict=True)] == case["expect"]["keep"]
    assert remarks.unused == ({"reasoning_content"} if "thinking" in case["name"] else set())


@pytest.mark.parametrize("case", PUBLIC, ids=[case["name"] for case in PUBLIC])
def test_the_forms_of_public_data_sets(case):
    """Whatever is neither learnt nor dropped with a reason is said: unused, or refused in one line."""
    record, remarks, expect = Record(case["record"], Path("x"), 1, 1), Remarks(), case["expect"]
    if "refused" in expect:
        with pytest.raises(UserError) as error:
            read_messages(record, OPTIONS, remarks, 1)
        columns = re.findall(r": `columns: (.*)` reads it\Z", str(error.value))
        assert columns == [expect["refused"]] * bool(expect["refused"])
        if columns:
            named = OPTIONS.model_copy(update={"columns": Columns(**yaml.safe_load(columns[0]))})
            assert read_messages(record, named, remarks, 1)
    elif "drop" in expect:
        assert read_messages(record, OPTIONS, remarks, 1) is None
        assert [*remarks] == [expect["drop"]]
    else:
        (conversation,) = read_messages(record, OPTIONS, remarks, 1)
        learnt = [[m.role, m.content, m.role == "assistant" and m.train] for m in conversation.messages]
        assert (learnt, sorted(remarks.unused)) == (expect["keep"], expect.get("unused", []))


@pytest.mark.parametrize(
    ("row", "learnt"),
    [
        ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "weight": 1.0, "train": None}]}, [True]),
        ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "weight": 1, "train": False}]}, [False]),
        ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "weight": False}]}, [False]),
        ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "Weight": 0}]}, [False]),
        ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "TRAIN": False}]}, [False]),
        ({"prompt": chat("q", "a", "r"), "completion": chat("b", roles=("assistant",))}, [False, True]),
        ({"prompt": chat("q", "a", "r"), "chosen": chat("q", "a", "r", "b")}, [False, True]),
        ({"prompt": "q", "chosen": chat("q", "a", "r", "b")}, [True, True]),
        ({"prompt": HH.removesuffix(" b"), "response": "b"}, [False, True]),
        ({"chosen": HH}, [True, True]),
        ({"prompt": "r", "response": "b", "history": [["q", "a"]]}, [True, True]),
    ],
)
def test_what_is_learnt(row, learnt):
    (conversation,) = read_messages(Record(row, Path("x"), 1, 1), OPTIONS, Remarks(), 1)
    assert [message.train for message in conversation.messages if message.role == "assistant"] == learnt


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "does not start with a user's message"),
        ({"messages": "[]"}, "does not start with a user's message"),
        ({"prompt": " ", "response": "a"}, "an empty prompt"),
        ({"prompt": None, "response": "a"}, "an empty prompt"),
        ({"prompt": "q", "response": "\n"}, "an empty reply"),
        ({"prompt": "q", "response": float("nan")}, "an empty reply"),
        ({"messages": chat("q", "a", " ", "b")}, "an empty prompt"),
        ({"messages": chat([{"type": "image_url", "image_url": {"url": "x"}}], "a")}, "what is not text (image_url)"),
        ({"messages": chat([{"type": None, "text": None, "audio": "x"}], "a")}, "what is not text (audio)"),
        ({"messages": chat([{"type": "refusal", "refusal": "no"}], "a")}, "what is not text (refusal)"),
        ({"messages": chat("<image> q", "a"), "images": ["x.png"]}, "what is not text (images)"),
        (
            {"messages": [{"role": "user", "content": "q", "images": ["x"]}, *chat("q", "a")[1:]]},
            "what is not text (images)",
        ),
        (
            {"messages": [*chat("q"), {"role": "assistant", "tool_calls": [{}]}, *chat("a", roles=("tool",))]},
            "a tool's turn",
        ),
        (
            {"messages": [*chat("q"), {"role": "assistant", "content": "a", "function_call": {"name": "f"}}]},
            "a tool's turn",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]},
            "a tool's turn",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "{}"}]}, "a tool's turn"),
        ({"messages": chat("q", [{"type": "tool_use", "name": "f"}])}, "a tool's turn"),
        ({"messages": [{"role": None, "content": "q"}, *chat("q", "a")[1:]]}, "a speaker other than"),
        ({"messages": [{"role": "critic", "content": "q"}, *chat("q", "a")[1:]]}, "user and assistant (critic)"),
        (
            {"messages": [{"role": "the\n" * 99, "content": "q"}]},
            "assistant (the the the the the the the the the the )",
        ),
        ({"messages": chat([{"type": "\ud83d", "x": 1}], "a")}, "what is not text (?)"),
        ({"messages": [SYSTEM, SYSTEM, *chat("q", "a")]}, "a system message that is not the first"),
        ({"dialog": [["q", None]]}, "an empty reply"),
        ({"messages": chat("q", [{"type": "text", "text": None}])}, "an empty reply"),
        ({"messages": chat([{"type": None, "text": None}], "a")}, "what is not text (nothing)"),
    ],
)
def test_what_is_none_is_dropped_with_a_reason(row, reason):
    remarks = Remarks()
    assert read_messages(Record(row, Path("x"), 1, 1), OPTIONS, remarks, 1) is None
    ((said, count),) = remarks.items()
    assert (reason in said, count) == (True, 1)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"image": "x.png"}, "what is not text (image)"),
        ({"Images": ["x.png"]}, "what is not text (images)"),
        ({"tool_calls": [{"name": "f"}]}, "a tool's turn"),
        ({"tool": "42"}, "a tool's turn"),
        ({"function_call": {"name": "f"}}, "a tool's turn"),
    ],
)
def test_what_stands_beside_texts_under_their_speakers_names(beside, reason):
    remarks = Remarks()
    row = {"messages": [{"user": "q", "assistant": "a"} | beside]}
    assert read_messages(Record(row, Path("x"), 1, 1), OPTIONS, remarks, 1) is None
    assert reason in next(iter(remarks))


def test_reasons_that_quote_are_not_as_many_as_what_they_quote(tmp_path):
    rows = [{"messages": [{"role": f"agent {number}", "content": "q"}]} for number in range(100)]
    _, dropped = read(tmp_path, *rows, rows[3])
    assert len(dropped) == 21
    assert sum(dropped.values()) == 101
    reason = "conversation with a speaker other than system, user and assistant"
    assert (dropped[reason], dropped[f"{reason} (agent 3)"]) == (80, 2)


def test_tool_calls_that_are_null_are_none():
    row = {
        "messages": [
            message | {"tool_calls": None, "function_call": None, "images": None} for message in chat("q", "a")
        ]
    }
    (conversation,) = read_messages(Record(row, Path("x"), 1, 1), OPTIONS, Remarks(), 1)
    assert [message.content for message in conversation.messages] == ["q", "a"]


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"messages": chat("q", "a"), "thinking": "x", "tools": [{"name": "f"}]}, {"thinking", "tools"}),
        ({"messages": chat("q", "a"), "thinking": None, "tools": [], "rejected": " "}, set()),
        ({"messages": chat("q", "a"), "tools": "[]", "functions": "None", "label": False}, {"label"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"rejected"}),
        ({"prompt": "q", "completion": "a", "label": False}, {"label"}),
        ({"question": "q", "solution": "a", "answer": "4", "cot": "x"}, {"answer", "cot"}),
        ({"instruction": "q", "question": "r", "response": "a"}, {"question"}),
        ({"messages": chat("q", "a"), "prompt": "q ", "response": "another", "context": "p"}, {"response", "context"}),
        ({"messages": chat("q", "a"), "chosen": chat("q", "a"), "conversation": chat("q", "b")}, {"conversation"}),
        ({"messages": [SYSTEM, *chat("q", "a")], "system": "another"}, {"system"}),
        (
            {"messages": [*chat("q"), {"role": "assistant", "content": "a", "reasoning": "x", "loss": True}]},
            {"reasoning", "loss"},
        ),
        ({"messages": chat("q", [{"type": "reasoning", "summary": []}, "a"])}, {"reasoning"}),
        ({"messages": [{"user": "q", "assistant": "a", "thinking": "x", "cot": None}]}, {"thinking"}),
        ({"messages": [{"user": "q", "assistant": "a", "bot": "b"}]}, {"bot"}),
        ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "Reasoning": "x"}]}, {"reasoning"}),
        ({"messages": [{"instruction": "q", "input": "p", "output": "a"}]}, {"input"}),
        ({"messages": [{"instruction": "q", "input": " ", "output": "a"}]}, set()),
        ({"messages": chat("q", "a"), "train": False}, {"train"}),
        ({"messages": [*chat("q"), {"role": "assistant", "content": "a", "train_detail": [{}]}]}, {"train_detail"}),
        ({"prompt": chat("q"), "context": "p", "response": "a"}, {"context"}),
    ],
)
def test_what_could_matter_and_is_not_used(row, unused):
    remarks = Remarks()
    assert read_messages(Record(row, Path("x"), 1, 1), OPTIONS, remarks, 1)
    assert remarks.unused == unused


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"messages": "dialog_turns"}, {"dialog_turns": chat("q", "a"), "messages": chat("x", "y")}, PAIR),
        (
            {"prompt": "query", "response": "best"},
            {"query": "q", "best": "a", "answer": "x", "messages": ["x", "y"]},
            PAIR,
        ),
        (
            {"prompt": "QUERY", "system": "persona"},
            {"query": "q", "answer": "a", "persona": "s"},
            [("system", "s"), *PAIR],
        ),
        (
            {"input": "passage"},
            {"instruction": "q", "passage": "p", "output": "a"},
            [("user", "q\n\np"), ("assistant", "a")],
        ),
        ({"history": "before"}, {"prompt": "r", "output": "b", "before": [["q", "a"]]}, [*PAIR, *SECOND]),
        # What is named for one thing is no other, whatever it is by its name.
        ({"system": "instruction"}, {"instruction": "s", "input": "q", "output": "a"}, [("system", "s"), *PAIR]),
        ({"system": "context"}, {"question": "q", "context": "s", "answer": "a"}, [("system", "s"), *PAIR]),
        ({"prompt": "context"}, {"context": "q", "answer": "a"}, PAIR),
        ({"history": "context"}, {"question": "r", "context": [["q", "a"]], "answer": "b"}, [*PAIR, *SECOND]),
        ({"response": "question", "prompt": "answer"}, {"question": "a", "answer": "q"}, PAIR),
        (
            {"messages": "log", "role": "who", "content": "said"},
            {"log": [{"who": "user", "said": "q", "role": "x"}, {"who": "assistant", "said": "a"}]},
            PAIR,
        ),
    ],
)
def test_columns(tmp_path, columns, row, expected):
    options = OPTIONS.model_copy(update={"columns": Columns(**columns)})
    assert read(tmp_path, row, options=options) == ([expected], {})
    (tmp_path / "x.parquet").unlink(missing_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    (conversation,) = Reading("mine", options, [tmp_path / "x.parquet"], 1)
    assert [(message.role, message.content) for message in conversation.messages] == expected


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"messages": "dialgo"},
            "record 1: no field 'dialgo', which `columns` names: did you mean dialog? (fields there: ",
        ),
        ({"prompt": "quory"}, "no field 'quory', which `columns` names: did you mean query?"),
        (
            {"prompt": "query", "response": "x"},
            "no field 'x', which `columns` names (fields there: dialog, query, answer",
        ),
        (
            {"prompt": "query", "system": "persna"},
            "no record has the field 'persna', which `columns` names: did you mean persona?",
        ),
        ({"messages": "dialog", "role": "wo", "content": "said"}, "no field 'dialog.wo'; fields there: who, said"),
    ],
)
def test_misspelt_columns(tmp_path, columns, said):
    row = {"dialog": [{"who": "user", "said": "q"}], "query": "q", "answer": "a", "persona": "s"}
    with pytest.raises(UserError) as error:
        read(tmp_path, row, row, options=OPTIONS.model_copy(update={"columns": Columns(**columns)}))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_that_is_used_is_not_said_to_be_unused(tmp_path):
    rows = [{"prompt": "q", "rejected": "a", "thinking": "s", "solution": "x", "label": "y"}]
    options = OPTIONS.model_copy(update={"columns": Columns(response="rejected", system="thinking")})
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0]))
    reading = Reading("mine", options, [tmp_path / "x.jsonl"], 1)
    assert [m.content for conversation in reading for m in conversation.messages] == ["s", "q", "a"]
    assert sorted(reading.unused) == ["label", "solution"]


def test_a_named_column_that_some_records_lack(tmp_path):
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a", "persona": "s"}]
    options = OPTIONS.model_copy(update={"columns": Columns(system="persona")})
    assert read(tmp_path, *rows, options=options)[0] == [PAIR, [("system", "s"), *PAIR]]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "does not start with a user's message"),
        ([SYSTEM], "does not start with a user's message"),
        (chat("a", "q", roles=("assistant", "user")), "does not start with a user's message"),
        ([*chat("q", "a"), SYSTEM], "system message that is not the first"),
        ([*chat("q"), *chat("q", "a")], "do not take turns"),
        ([*chat("q", "a"), *chat("b", roles=("assistant",))], "do not take turns"),
        (chat("q"), "without a reply"),
        (chat("q", " \n"), "an empty reply"),
        (chat("q", None), "an empty reply"),
        (chat("", "a"), "an empty prompt"),
        ([*chat("q"), {"role": "tool", "content": "x"}], "a tool's turn"),
        ([*chat("q"), {"role": "narrator", "content": "x"}], "a speaker other than system, user and assistant"),
    ],
)
def test_dropped_with_a_reason(tmp_path, messages, reason):
    conversations, dropped = read(tmp_path, {"messages": messages}, {"messages": chat("q", "a")})
    assert conversations == [PAIR]
    ((said, count),) = dropped.items()
    assert (reason in said, count) == (True, 1)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": "x"}, "no field 'messages', 'conversations', or 'instruction' with 'output' .* fields there: text"),
        ({"prompt": "q"}, "no field 'messages'"),
        ({"messages": "q"}, "field 'messages' is a string, not a list"),
        ({"messages": ["q", 3]}, "an entry of 'messages' is not an object"),
        ({"messages": [{"role": "user"}]}, "no field 'messages.content'; fields there: role"),
        ({"messages": [{"content": "q"}]}, "no field 'messages.role'; fields there: content"),
        ({"messages": [{"role": "user", "content": 3}]}, "'messages.content' is a number, not a string"),
        ({"messages": [{"role": "user", "content": [3]}]}, "'messages.content' has a part that is a number"),
        ({"messages": [{"role": "user", "content": "q", "weight": 0.5}]}, "'messages.weight' is '0.5', not 0 or 1"),
        ({"prompt": ["q", "r"], "response": "a"}, "'prompt' is a list of texts, of which one would have to be chosen"),
        (
            {"prompt": "q", "response": ["a", "b"]},
            "'response' is a list of texts, of which one would have to be chosen",
        ),
        ({"messages": [{"role": "user", "content": "q", "train": "no"}]}, "'messages.train' is a string"),
        ({"prompt": "q", "output": "\udc80"}, "'output' holds half of a surrogate pair"),
        ({"prompt": 3, "output": "a"}, "'prompt' is a number, not a string"),
        ({"prompt": "q", "output": 3}, "'output' is a number, not a string"),
        ({"prompt": "q", "output": ["\udc80"]}, "'output' holds half of a surrogate pair"),
        ({"messages": [{"Role": "user", "Content": "q", "CONTENT": "r"}]}, "the key 'content' twice"),
        ({"Prompt": "p", "prompt": "q", "output": "a"}, "fields 'Prompt' and 'prompt' have one name: rename one"),
        (
            {"question": "q", "answers": "a"},
            "fields there: question, answers: `columns: {prompt: question, response: answers}` reads it",
        ),
        (
            {"messages": '[{"role": "user", "role": "assistant", "content": "q"}]'},
            "field 'messages': the key 'role' is given twice",
        ),
        ({"messages": json.dumps('{"user": "q", "assistant": "a", "user": "r"}')}, "the key 'user' is given twice"),
        ({"prompt": "r", "response": "b", "history": '[{"user": "q", "user": "q"}]'}, "'history': the key 'user' is"),
        (
            {"prompt": '[{"role": "user", "content": "q", "content": "r"}]', "output": "a"},
            "'prompt': the key 'content'",
        ),
        ({"a, b prompt": "q", "reply: x": "a"}, r"`columns: {prompt: 'a, b prompt', response: 'reply: x'}` reads it"),
        ({"question": "q", "answer": "a", "chat_history": "p"}, "{prompt: question, input: chat_history, response: a"),
        ({"source": "github", "text": "x"}, "fields there: source, text\\Z"),
        ({"source": "q", "target": "a", "src": "x"}, r"`columns: {prompt: source, response: target}` reads it"),
        ({"context": "p", "question_text": "q", "answer_text": "a"}, "{prompt: question_text, response: answer_text}"),
        ({"prompt_name": "x", "prompt_text": "q", "reply_time": "1 s", "output_text": "a"}, "{prompt: prompt_text,"),
        ({"mesages": chat("q", "a")}, "fields there: mesages: `columns: {messages: mesages}` reads it"),
        ({"instructon": "q", "output": "a"}, "instructon, output: `columns: {prompt: instructon, response: output}` r"),
        ({"messages": chat("q"), "output": ["a", "b"]}, "'output' is a list of texts, of which one would have"),
        ({"chosen": "a", "rejected": "b"}, "field 'chosen' is a string, not a list"),
    ],
)
def test_bad_records(tmp_path, row, part):
    with pytest.raises(UserError, match=rf"\A[^\n]*rows.jsonl, record 2: [^\n]*{part}[^\n]*\Z"):
        read(tmp_path, {"prompt": "q", "output": "a"}, row)


CHAT_TEXT = '[{"role":"user","content":"hi"},{"role":"assistant","content":"ho"}]'
HH_OPEN, HH_LINES = "\n\nHuman: q\n\nAssistant:", "Human:q\nAssistant:a\nHuman:r\nAssistant:"


@pytest.mark.parametrize(
    "text",
    [
        CHAT_TEXT,
        '[{"author":"Tolkien","title":"Hobbit"}]',
        '[{"role":"user","name":"Bob"}]',
        '[{"role":"engineer","text":"x"}]',
        '[{"from":"Paris","value":3}]',
        '[{"a":1,"a":2}]',
        '[{"role":"assistant","content":"ho"}, 3]',
        '[{"a": ' * 5000,
        "\n\nHuman: another\n\nAssistant: b",
        "Human: Hello\nAssistant: Hi",
    ],
    ids=lambda text: text[:40],
)
def test_a_reply_that_looks_like_messages_stays_text(tmp_path, text):
    assert read(tmp_path, {"prompt": "q", "completion": text}) == ([[PAIR[0], ("assistant", text)]], {})
    if not text.startswith('[{"role":"assistant'):
        listed = {"prompt": chat("q"), "completion": text}
        assert read(tmp_path, listed) == ([[PAIR[0], ("assistant", text)]], {})


@pytest.mark.parametrize("text", ['[{"author":"Tolkien","content":"Hobbit"}]', '[{"role":"user","name":"Bob"}]'])
def test_a_prompt_that_looks_like_messages_stays_text(tmp_path, text):
    assert read(tmp_path, {"prompt": text, "completion": "a"}) == ([[("user", text), PAIR[1]]], {})


@pytest.mark.parametrize(
    ("prompt", "passage", "reply"),
    [
        ("Human: Hello\nAssistant: Hi\nHuman: how are you", "Summarise the conversation above.", "They greet."),
        ("Human: What is x?\nAssistant:", "x is 3.", "3"),
        ("Human: A\nAssistant: B\nHuman: C\nQ: What did Human say last?", "", "  code\n    x"),
        ("Human: Write a script", "", "Human: Hi\nAssistant: Yo"),
        ("Human: speak Assistant:", "", "42"),
    ],
)
def test_a_text_with_speakers_that_a_question_is_about_stays_text(tmp_path, prompt, passage, reply):
    asked = f"{prompt}\n\n{passage}" if passage else prompt
    row = {"instruction": prompt, "input": passage, "output": reply}
    assert read(tmp_path, row) == ([[("user", asked), ("assistant", reply)]], {})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": str(chat("q", "a"))}, PAIR),  # UltraFeedback, in CSV
        ({"prompt": "q", "chosen": [SYSTEM, *chat("q", "a")]}, [("system", "s"), *PAIR]),
        ({"history": [["q", "a"]], "prompt": "r", "chosen": chat("r", "b")}, [*PAIR, *SECOND]),
        ({"history": [["q", "a"]], "prompt": "r", "chosen": chat("q", "a", "r", "b")}, [*PAIR, *SECOND]),
        ({"history": [["q", "a"]], "prompt": "r", "chosen": str(chat("q", "a", "r", "b"))}, [*PAIR, *SECOND]),
        ({"history": HH_OPEN + "a", "prompt": "r", "chosen": HH}, [*PAIR, *SECOND]),
        ({"prompt": str(chat("q")), "completion": json.dumps(chat("q", "a"), indent=1)}, PAIR),
        # One text with the speakers in it.
        ({"instruction": HH_LINES, "input": "", "output": "b"}, [*PAIR, *SECOND]),
        ({"instruction": HH_LINES + " \n", "output": " b\n"}, [*PAIR, *SECOND]),
        ({"prompt": HH_OPEN + " ", "response": " a"}, PAIR),
        ({"prompt": HH_OPEN, "response": [" a"]}, PAIR),
        ({"prompt": HH_OPEN, "chosen": HH_OPEN + " a"}, PAIR),
        ({"prompt": HH_OPEN, "chosen": chat("q", "a")}, PAIR),
        ({"prompt": "q", "chosen": HH_OPEN + " a"}, PAIR),
        ({"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: a"}, PAIR),
        ({"prompt": "\n\nHuman: q", "chosen": HH_OPEN + " a"}, PAIR),
        ({"prompt": HH_LINES, "chosen": HH_LINES + "b"}, [*PAIR, *SECOND]),
        ({"prompt": "### Human: q### Assistant:", "response": "a "}, PAIR),
        ({"prompt": "Human: q\nAssistant: a\n\nHuman: r\n\nAssistant:", "response": "b"}, [*PAIR, *SECOND]),
        ({"messages": "Human: q\nAssistant: a"}, PAIR),
        ({"prompt": "Human: q\nHuman: r", "response": "a"}, [("user", "Human: q\nHuman: r"), PAIR[1]]),
        # What says nothing beside the texts.
        ({"messages": chat("q", "a"), "images": [None], "image": {"bytes": None}}, PAIR),
        ({"messages": [one | {"tool_calls": "None", "images": [None]} for one in chat("q", "a")]}, PAIR),
        ({"messages": [{"User": "q", "user": None, "Assistant": "a"}]}, PAIR),
        ({"messages": [{"Role": "user", "Content": "q", "CONTENT": None}, *chat("q", "a")[1:]]}, PAIR),
    ],
)
def test_the_whole_conversation_in_a_reply_or_a_text(row, expected):
    (conversation,) = read_messages(Record(row, Path("x"), 1, 1), OPTIONS, Remarks(), 1)
    assert [(message.role, message.content) for message in conversation.messages] == expected


# ---- In a recipe ----


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(ROOT / "recipes" / "demo_data" / "model"))

    def run(*datasets):
        keys = {"model_name": "none", "output_dir": "out", "cache_dir": tmp_path / "cache", "datasets": list(datasets)}
        recipe = Recipe.model_validate(keys)
        return recipe, prepare_mix(recipe, tokenizer), tokenizer

    return run


def write_all(folder, rows):
    """The same rows in every kind of file."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.json").write_text(json.dumps(rows))
    (folder / "d.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "e.parquet")
    return ["a.jsonl", "b.jsonl.gz", "c.json", "d.json.gz", "e.parquet"]


def test_several_in_one_mix_from_every_kind_of_file(tmp_path, prepare):
    files = write_all(tmp_path, [{"messages": chat(f"question {n}", f"reply {n}")} for n in range(20)])
    own = {f"chats-{place}": {"source": "messages", "input_file_path": file} for place, file in enumerate(files)}
    (tmp_path / "dolly15k.jsonl").write_text('{"instruction": "q", "context": "", "response": "a"}\n')
    recipe, mix, _ = prepare(
        *({name: options} for name, options in own.items()),
        {"messages": {"input_file_path": files[0], "fraction": 0.5}},
        {"dolly15k": {"input_file_path": "dolly15k.jsonl"}},
    )
    assert mix.names == ["dolly15k", "messages", *own]
    first = mix.train.select(mix.train.dataset == 1)
    assert len(first) == 16
    assert (mix.validation.dataset == 1).sum() == 4
    for index in range(2, 7):
        same = mix.train.select(mix.train.dataset == index)
        assert [same.messages(row) for row in range(16)] == [first.messages(row) for row in range(16)]
    assert (mix.train.dataset[training_rows(mix, recipe, 0)] == 1).sum() == 8


def test_what_is_said_of_a_data_set(tmp_path, prepare, capsys):
    """What its conversations were made of, what was dropped, and what could matter and was not used."""
    reply = {"role": "assistant", "content": "a", "reasoning_content": "x"}
    rows = [
        *[{"messages": [*chat("q"), reply, *chat("r"), reply]}] * 3,
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
        {"messages": [*chat("q"), reply | {"tool_calls": [{"id": 1}]}]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, mix, _ = prepare({"messages": {"input_file_path": "x.jsonl", "val_split": 0}})
    report = mix.reports["messages"]
    assert report["used"] == {"messages": 3, "prompt, chosen, system": 1}
    assert report["unused"] == {"reasoning_content": 3, "rejected": 1}
    assert report["dropped"] == {"conversation with a tool's turn": 1}
    said = "(dropped: 1 conversation with a tool's turn; not used: reasoning_content of 3, rejected of 1)"
    assert said in capsys.readouterr().out


def test_train_false_is_not_scored(tmp_path, prepare):
    messages = chat("one", "two", "three", "four", "five", "six")
    messages[1]["train"], messages[5]["train"] = False, True
    rows = [{"messages": messages}, {"messages": [*chat("q"), {"role": "assistant", "content": "a", "train": False}]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, mix, tokenizer = prepare({"messages": {"input_file_path": "x.jsonl", "val_split": 0}})
    assert len(mix.train) == 1
    ids, scored = mix.train.tokens(0)
    assert tokenizer.decode(ids[scored]) == "four<|endoftext|><|prompter|>six<|endoftext|>"
    assert mix.reports["messages"]["dropped"] == {"conversation with no scored token": 1}
    assert mix.train.messages(0) == chat("one", "two", "three", "four", "five", "six")


BASE = "model_name: m\noutput_dir: o\n"


def load(tmp_path, datasets, overrides=None):
    (tmp_path / "r.yaml").write_text(BASE + "datasets:\n" + datasets)
    return load_recipe(tmp_path / "r.yaml", overrides)


def test_names_overrides_and_round_trip(tmp_path):
    mix = "- mine: {source: messages, input_file_path: x.jsonl}\n- messages: {hub_name: org/chats, files: '*.json'}\n"
    recipe = load(tmp_path, mix + "- vicuna\n", {"datasets.mine.fraction": "0.5", "datasets.messages.size": "3"})
    chosen = recipe.datasets.chosen()
    assert list(chosen) == ["vicuna", "messages", "mine"]
    assert (chosen["mine"].fraction, chosen["messages"].size) == (0.5, 3)
    assert find_source("messages", chosen["messages"]).hub.repo == "org/chats"
    assert find_source("mine", chosen["mine"]).hub.repo is None
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("mix", "parts"),
    [
        ("- vicunna\n", ["line 4: unknown key datasets.vicunna: did you mean vicuna?", "`source: messages`"]),
        ("- vicunna: {fraction: 0.5}\n", ["line 4: unknown key datasets.vicunna: did you mean vicuna?"]),
        ("- mine: {source: mesages, input_file_path: x}\n", ["datasets.mine.source = mesages", "'messages'"]),
        ("- mine: {source: messages}\n", ["datasets.mine: give input_file_path or hub_name"]),
        ("- messages\n", ["datasets.messages: give input_file_path or hub_name"]),
        (
            "- mine: {source: messages, input_file_path: x, files: y}\n",
            ["datasets.mine: data_files are those of hub_name"],
        ),
        ("- mine: {source: messages, input_file_path: x, fractoin: 1}\n", ["datasets.mine.fractoin", "fraction?"]),
        ("- messages: {input_file_path: x, hub_nam: y}\n", ["datasets.messages.hub_nam", "hub_name?"]),
        ("- mine: {source: messages, hub_name: x/y, splitt: a}\n", ["datasets.mine.splitt", "split?"]),
        (
            "- mine: {source: messages, hub_name: x/y, split: 'a[5'}\n",
            ["datasets.mine.split = a[5: should be a split's name"],
        ),
        (
            "- mine: {source: messages, hub_name: x/y, split: 'a[:1]++b'}\n",
            ["a[:1]++b: should be a split's name"],
        ),
        ("- mine: {source: messages, hub_name: x/y, split: 'a.[:1]'}\n", ["datasets.mine.split = a.[:1]: should be a"]),
        (
            "- mine: {source: messages, hub_name: x/y, data_files: [[a]]}\n",
            ["datasets.mine.data_files: should be a name"],
        ),
        (
            "- mine: {source: messages, input_file_path: [x, [y]]}\n",
            ["mine.input_file_path: should be a path, or a list"],
        ),
        ("- mine: {source: messages, input_file_path: []}\n", ["mine.input_file_path: should be a path, or a list"]),
        (
            "- mine: {source: messages, input_file_path: x, columns: {mesages: y}}\n",
            ["unknown key datasets.mine.columns.mesages: did you mean messages?"],
        ),
        (
            "- mine: {source: messages, input_file_path: x, columns: dialog}\n",
            ["datasets.mine.columns = dialog: should be a mapping"],
        ),
        (
            "- mine: {source: messages, input_file_path: x, columns: {messages: y, prompt: z}}\n",
            ["datasets.mine.columns: name messages, or prompt and response"],
        ),
        (
            "- mine: {source: messages, input_file_path: x, columns: {prompt: y, response: Y}}\n",
            ["datasets.mine.columns: one field is named twice"],
        ),
        ("- a/b: {source: messages, input_file_path: x}\n", ["'a/b' is no name for a data set"]),
        ("- a.b: {source: messages, input_file_path: x}\n", ["'a.b' is no name for a data set"]),
        ("- vicuna: {source: messages, input_file_path: x}\n", ["unknown key datasets.vicuna.source"]),
    ],
)
def test_refused(tmp_path, mix, parts):
    with pytest.raises(UserError) as error:
        load(tmp_path, mix)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
