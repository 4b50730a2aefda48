"""Each source's rules on hand-written records, the splits, and bad records."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from data.reading import TRAIN, VALIDATION, Reading
from sources.registry import SOURCES
from sources.source import filter_phrases
from sources.vicuna import FILLERS
from utils.errors import UserError

DEFAULTS = {"val_split": 0, "max_val_set": None, "lang": "en", "top_k": None, "on_bad_records": "error"}


def load(tmp_path, name, rows, seed=1, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_files(name, [path], seed, **options)


def load_files(name, paths, seed=1, **options):
    """Both splits as lists, and what the pass counted."""
    reading = Reading(name, SimpleNamespace(**(DEFAULTS | {"context": "drop"} | options)), paths, seed)
    conversations = list(reading)
    codes = reading.split()
    train, validation = (
        [conversation for conversation, code in zip(conversations, codes, strict=True) if code == which]
        for which in (TRAIN, VALIDATION)
    )
    return SimpleNamespace(**(vars(reading) | {"train": train, "validation": validation, "losses": reading.losses()}))


def texts(conversations):
    return [[message.content for message in conversation.messages] for conversation in conversations]


def node(text, *replies, **fields):
    """A prompter message whose replies are from the assistant, theirs from the prompter, and so on."""
    message = {"text": text, "role": "prompter", "lang": "en", "review_result": True, "replies": list(replies)} | fields
    stack = list(replies)
    while stack:
        reply = stack.pop()
        reply["role"] = "assistant" if reply["role"] == "prompter" else "prompter"
        stack += reply["replies"]
    return message


def tree(*args, state="ready_for_export", **fields):
    return {"message_tree_id": "t", "tree_state": state, "prompt": node(*args, **fields)}


# ---- oasst_export ----


def test_oasst_keeps_ready_reviewed_listed_trees(tmp_path):
    trees = [
        tree("p1", node("a1")),
        tree("p2", node("a2"), state="growing"),
        tree("p3", node("a3"), review_result=None),
        tree("p4", node("a4"), lang="es"),
        tree("p5", node("a5"), lang="de"),
        tree("p6"),
    ]
    split = load(tmp_path, "oasst_export", trees, lang="en, de,xx")
    assert texts(split.train) == [["p1", "a1"], ["p5", "a5"]]
    assert split.rows_read == 6
    assert split.dropped == {
        "tree not ready for export": 1,
        "tree whose prompt was not accepted in review": 1,
        "tree in another language": 1,
    }


def test_oasst_threads_are_depth_first_and_unanswered_prompts_fall_off(tmp_path):
    rows = [
        tree(
            "p",
            node("a", node("q1", node("b1"), node("b2")), node("q2 unanswered, second")),
            node("c", node("r1 unanswered, first"), node("r2 unanswered, second")),
            node("d"),
        )
    ]
    split = load(tmp_path, "oasst_export", rows)
    assert texts(split.train) == [["p", "a", "q1", "b1"], ["p", "a", "q1", "b2"], ["p", "c"], ["p", "d"]]
    assert [message.role for message in split.train[0].messages] == ["user", "assistant"] * 2


def test_oasst_drops_threads_with_deleted_or_synthetic_messages(tmp_path):
    rows = [
        tree(
            "p",
            node("a", node("q", node("b", deleted=True)), node("q2", node("b2"))),
            node("c", node("r unanswered", deleted=True)),  # the thread up to "c" is judged with this prompt in it
            node("d", synthetic=True),
        )
    ]
    split = load(tmp_path, "oasst_export", rows)
    assert texts(split.train) == [["p", "a", "q2", "b2"]]
    assert split.dropped == {"thread with a deleted or synthetic message": 3}


def test_oasst_top_k(tmp_path):
    rows = [
        tree("p", node("a0", rank=0), node("a1", rank=1), node("a2", rank=2), node("none")),
        tree("o", node("only, unranked", node("q", rank=5), rank=None)),
    ]
    assert len(load(tmp_path, "oasst_export", rows).train) == 5
    split = load(tmp_path, "oasst_export", rows, top_k=2)
    assert texts(split.train) == [["p", "a0"], ["p", "a1"], ["o", "only, unranked"]]
    assert split.dropped == {"thread with a reply of rank top_k or worse": 2}


def test_oasst_properties_of_replies(tmp_path):
    labels = {"quality": {"value": 1, "count": 3}, "humor": {"value": 0.25}, "toxicity": {"value": 0.5}}
    split = load(tmp_path, "oasst_export", [tree("p", node("a", labels=labels)), tree("p", node("b", lang=None))])
    assert split.train[0].messages[0].properties == {}
    assert split.train[0].messages[1].properties == {"lang": "en", "quality": 1.0, "humor": 0.25}
    assert isinstance(split.train[0].messages[1].properties["quality"], float)
    assert split.train[1].messages[1].properties == {}


def test_oasst_is_split_by_tree(tmp_path):
    rows = [tree(f"p{number}", node("a"), node("b"), node("c")) for number in range(40)]
    split = load(tmp_path, "oasst_export", rows, val_split=0.25)
    train, validation = ({conversation[0] for conversation in texts(part)} for part in (split.train, split.validation))
    assert len(split.validation) == 30
    assert (len(train), len(validation), train & validation) == (30, 10, set())


def test_oasst_malformed_tree(tmp_path):
    rows = [tree("p", node("a")), tree("p", node("a", {"role": "assistant", "text": 5, "replies": []}))]
    with pytest.raises(UserError, match=r"rows.jsonl, record 2: field 'message.text' is a number, not a string"):
        load(tmp_path, "oasst_export", rows)
    rows[1]["prompt"]["replies"] = ["text"]
    with pytest.raises(UserError, match=r"record 2: an entry of 'message' is not an object"):
        load(tmp_path, "oasst_export", rows)
    rows[1]["prompt"]["replies"] = [{"role": "prompter", "text": "x"}]
    with pytest.raises(UserError, match=r"record 2: message 2 of a thread is of role 'prompter'"):
        load(tmp_path, "oasst_export", rows)


# ---- vicuna ----


def share(*turns):
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_vicuna_rules(tmp_path):
    rows = [
        share(("human", " hi\\_there \\*x\\* [1] [ 12 ] [1, 2] "), ("gpt", "\nhello\n")),
        share(("gpt", "hello"), ("human", "hi")),
        share(),
        share(("human", "hi"), ("gpt", "")),
        share(("human", "hi"), ("gpt", None)),
        share(("human", "hi"), ("gpt", "a"), ("human", "q")),
        share(("human", "a "), ("human", " b"), ("gpt", "c"), ("gpt", "d")),
        share(("human", "a"), ("system", "s"), ("human", "b"), ("gpt", "c"), ("bing", None), ("gpt", "d")),
        share(("human", "x" * 40_000), ("gpt", "As an AI language model, I am kept")),
    ]
    split = load(tmp_path, "vicuna", rows)
    assert texts(split.train) == [
        ["hi_there *x*   [1, 2]", "hello"],
        ["a\nb", "c\nd"],
        ["a", "c", "b", "d"],
        ["x" * 32_768, "As an AI language model, I am kept"],
    ]
    assert split.dropped == {
        "conversation without human at its start": 2,
        "conversation with an empty gpt message": 2,
        "conversation with unequal numbers of prompts and replies": 1,
    }


def test_vicuna_filler_depends_on_seed_and_record_only(tmp_path):
    rows = [share(("human", ""), ("gpt", "a"), ("human", None), ("gpt", "b")) for _ in range(60)]
    first, again, other = (texts(load(tmp_path, "vicuna", rows, seed).train) for seed in (1, 1, 2))
    assert first == again != other
    assert {text for conversation in first for text in conversation[::2]} == set(FILLERS)
    assert texts(load(tmp_path, "vicuna", rows[:7], 1).train) == first[:7]


def test_vicuna_fields(tmp_path):
    with pytest.raises(UserError, match=r"record 1: no field 'conversations.value'; fields there: from"):
        load(tmp_path, "vicuna", [{"conversations": [{"from": "human"}]}])
    with pytest.raises(UserError, match=r"record 1: no field 'conversations'; fields there: id"):
        load(tmp_path, "vicuna", [{"id": 1}])


# ---- dolly15k, grade_school_math_instructions, code_alpaca ----


def test_dolly_both_layouts(tmp_path):
    context = "One[3] two[1, 2] three [a][citation needed] [ab]"
    rows = [
        {"instruction": "q", "context": context, "response": "a", "category": "x"},
        {"INSTRUCTION": "Q", "RESPONSE": "A", "METADATA": {"CONTEXT": context}},
        {"instruction": "q", "context": "", "response": ""},
        {"instruction": "as a MACHINE?", "context": "", "response": "a"},
        {"instruction": "q", "context": "openai", "response": "a"},  # the filter does not look at the context
    ]
    split = load(tmp_path, "dolly15k", rows)
    assert texts(split.train) == [["q", "a"], ["Q", "A"], ["q", "a"]]
    assert [conversation.messages[1].properties["context"] for conversation in split.train] == [
        "One two three  [ab]",
        "One two three  [ab]",
        "openai",
    ]
    assert split.dropped == {"row with an empty question or answer": 1, "row with a filter phrase": 1}
    with pytest.raises(UserError, match=r"record 1: no field 'METADATA.CONTEXT'; fields there: none"):
        load(tmp_path, "dolly15k", [{"INSTRUCTION": "Q", "RESPONSE": "A", "METADATA": {}}])


def test_dolly_context_in_the_prompt(tmp_path):
    rows = [
        {"instruction": "q", "context": "One[3] two [citation needed]", "response": "a"},
        {"INSTRUCTION": "Q", "RESPONSE": "A", "METADATA": {"CONTEXT": "C"}},
        {"instruction": "q", "context": " \n[3]", "response": "a"},
    ]
    split = load(tmp_path, "dolly15k", rows, context="prompt")
    assert texts(split.train) == [["q\n\nOne two ", "a"], ["Q\n\nC", "A"], ["q", "a"]]
    assert not any(message.properties for conversation in split.train for message in conversation.messages)


def test_math_is_split_as_shuffled_and_blank_rows_dropped(tmp_path):
    from sklearn.model_selection import train_test_split

    rows = [{"INSTRUCTION": f"q{number}", "RESPONSE": "a"} for number in range(30)]
    rows.insert(7, {"INSTRUCTION": " \n", "RESPONSE": "a"})
    rows.insert(2, {"INSTRUCTION": "q", "RESPONSE": None})
    rows.insert(11, {"INSTRUCTION": "q", "RESPONSE": "openAI"})
    split = load(tmp_path, "grade_school_math_instructions", rows, val_split=0.3)
    assert split.dropped == {"row with a blank question or answer": 2, "row with a filter phrase": 1}

    # As the original: the rows shuffled, then filtered, then split.
    shuffled = list(rows)
    random.Random(42).shuffle(shuffled)
    kept = [row["INSTRUCTION"] for row in shuffled if row["INSTRUCTION"].strip("q \n") and row["RESPONSE"] == "a"]
    train, validation = train_test_split(kept, test_size=0.3, random_state=666, shuffle=True)
    assert {text[0] for text in texts(split.train)} == set(train)
    assert {text[0] for text in texts(split.validation)} == set(validation)
    assert texts(split.train) == sorted(texts(split.train), key=lambda text: int(text[0][1:]))  # the file's order


def test_alpaca_is_split_before_the_filter(tmp_path):
    rows = [{"instruction": f"q{number}", "input": "", "output": "a"} for number in range(40)]
    rows[3]["input"], rows[4]["output"] = "given", ""
    validation = texts(load(tmp_path, "code_alpaca", rows, val_split=0.25).validation)
    assert len(validation) == 10
    whole = texts(load(tmp_path, "code_alpaca", rows).train)
    assert (whole[3], whole[4]) == (["q3\ngiven", "a"], ["q4", ""])
    rows[int(validation[0][0][1:].split("\n")[0])]["output"] = "OpenAI"
    split = load(tmp_path, "code_alpaca", rows, val_split=0.25)
    assert texts(split.validation) == validation[1:]
    assert (len(split.train), split.dropped) == (30, {"row with a filter phrase": 1})


def test_filter_phrases():
    phrases = filter_phrases()
    assert "as an ai " in phrases  # with the blank
    assert "openai" in phrases
    assert all(phrase == phrase.lower() and phrase for phrase in phrases)


# ---- Splits ----

ROWS = [{"instruction": f"q{number}", "context": "", "response": "a"} for number in range(200)]


def test_train_test_split_is_scikit_learns(tmp_path):
    from sklearn.model_selection import train_test_split

    split = load(tmp_path, "dolly15k", ROWS, val_split=0.1)
    train, validation = train_test_split(ROWS, test_size=0.1, random_state=666, shuffle=True)
    assert sorted(row["instruction"] for row in train) == sorted(text[0] for text in texts(split.train))
    assert sorted(row["instruction"] for row in validation) == sorted(text[0] for text in texts(split.validation))


def test_max_val_set_is_drawn_once_in_the_order_of_the_file(tmp_path):
    whole = texts(load(tmp_path, "dolly15k", ROWS, val_split=0.3).validation)
    drawn, again, other = (
        texts(load(tmp_path, "dolly15k", ROWS, seed, val_split=0.3, max_val_set=20).validation) for seed in (1, 1, 2)
    )
    assert drawn == again != other
    assert drawn == [row for row in whole if row in drawn]
    assert len(drawn) == 20
    assert texts(load(tmp_path, "dolly15k", ROWS, val_split=0.3, max_val_set=1000).validation) == whole
    assert load(tmp_path, "dolly15k", ROWS, val_split=0.3, max_val_set=0).validation == []


@pytest.mark.parametrize(("name", "val_split"), [("dolly15k", 0), ("code_alpaca", 0), ("dolly15k", 0.5)])
def test_no_validation(tmp_path, name, val_split):
    rows = [row | {"input": "", "output": "a"} for row in (ROWS if val_split == 0 else ROWS[:1])]
    split = load(tmp_path, name, rows, val_split=val_split)
    assert (len(split.train), split.validation) == (len(rows), [])


def test_nothing_left(tmp_path):
    with pytest.raises(UserError, match=r"oasst_export: no conversation left .* dropped: 1 tree in another language"):
        load(tmp_path, "oasst_export", [tree("p", node("a"))], lang="fr")


def test_records_of_several_files_are_numbered_through(tmp_path):
    paths = []
    for part in range(2):
        paths.append(tmp_path / f"{part}.jsonl")
        paths[-1].write_text(json.dumps(ROWS[part]) + "\n")
    split = load_files("dolly15k", paths)
    assert (texts(split.train), split.rows_read) == ([["q0", "a"], ["q1", "a"]], 2)


def test_conversations_without_a_scored_token_leave_the_others_where_they_were(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    reading = Reading("dolly15k", SimpleNamespace(**DEFAULTS | {"val_split": 0.3, "context": "drop"}), [path], 1)
    kept = np.arange(len(list(reading))) % 3 > 0
    whole = reading.split()
    assert reading.split(kept).tolist() == whole[kept].tolist()
    assert reading.dropped == {"conversation with no scored token": 67}
    with pytest.raises(UserError, match=r"no conversation left .* 267 conversations with no scored token"):
        reading.split(np.zeros(len(whole), dtype=bool))


# ---- Bad records ----

BAD = {
    "oasst_export": [tree("p") | {"prompt": node("p") | {"replies": 5}}, {"tree_state": "x"}],
    "vicuna": [share(("human", 5)), {"id": 1}],
    "dolly15k": [{"instruction": "q"}, {"instruction": "q", "context": "\ud83d", "response": "a"}],
    "grade_school_math_instructions": [{"INSTRUCTION": "q"}, {"INSTRUCTION": [], "RESPONSE": "a"}],
    "code_alpaca": [{"instruction": "q", "input": ""}, {"instruction": "\udc00", "input": "", "output": "a"}],
    "messages": [{"text": "q"}, {"messages": [{"role": "user"}]}],
}
GOOD = {
    "oasst_export": tree("p", node("a")),
    "vicuna": share(("human", "q"), ("gpt", "a")),
    "dolly15k": {"instruction": "q", "context": "", "response": "a"},
    "grade_school_math_instructions": {"INSTRUCTION": "q", "RESPONSE": "a"},
    "code_alpaca": {"instruction": "q", "input": "", "output": "a"},
    "messages": {"prompt": "q", "completion": "a"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_an_error_or_skipped_and_counted(tmp_path, name):
    rows = [GOOD[name], *BAD[name], GOOD[name]]
    options = dict.fromkeys(("hub_name", "config", "split", "data_files", "columns"))
    with pytest.raises(UserError, match=r"\A[^\n]*rows.jsonl, record 2: [^\n]*\Z"):
        load(tmp_path, name, rows, **options)
    split = load(tmp_path, name, rows, on_bad_records="skip", **options)
    assert (len(split.train), split.rows_read, split.bad_records) == (2, 4, 2)
    assert "record 2" in split.first_bad_record
    assert split.losses.startswith("dropped: nothing; skipped: 2 bad, the first: ")
    assert not split.dropped
    with pytest.raises(UserError, match=r"no conversation left .*skipped: 2 bad"):
        load(tmp_path, name, BAD[name], on_bad_records="skip", **options)


def test_a_file_cut_off_is_skipped_where_it_ends(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD["code_alpaca"]] * 50)[:-30])
    split = load_files("code_alpaca", [path], on_bad_records="skip")
    assert (len(split.train), split.rows_read, split.bad_records) == (49, 50, 1)
    assert "cut off" in split.first_bad_record


def test_deep_trees_and_odd_labels(tmp_path):
    deep = node("a")
    for _ in range(400):
        deep = {"text": "x", "role": "assistant", "replies": [deep]}
    with pytest.raises(UserError, match=r"record 1: (message 3 of a thread is of role|nested too deeply)"):
        load(tmp_path, "oasst_export", [{"tree_state": "ready_for_export", "prompt": node("p") | {"replies": [deep]}}])
    with pytest.raises(UserError, match=r"record 1: field 'message.labels' has no number as the value of 'quality'"):
        load(tmp_path, "oasst_export", [tree("p", node("a", labels={"quality": {"value": "high"}}))])


def test_registry():
    assert list(SOURCES) == [*GOOD]
