"""Overlap with benchmarks and between splits: each rule by hand, planted n-grams, the real data where it is."""

# ruff: noqa: RUF001 (other scripts have characters that look like Latin ones)

import gzip
import json
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import SHARED, SHARED_DATA
from hypothesis import given
from hypothesis import strategies as st

from data.mix import Split
from data.reading import TRAIN, VALIDATION, Reading
from training import contamination
from training.contamination import contaminated_rows, duplicated_rows, load_benchmark, normalized

MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
ITEM = (  # 20 words
    "Anna's 3 hens lay 12 eggs each week; how many boxes of six does she fill in a whole month?"
)
WORDS = ITEM.split()


def split_of(*datasets: list[list[str]]) -> Split:
    """Conversations are lists of contents, user first; each is said to have 10 tokens."""
    tables = []
    for conversations in datasets:
        rows = [
            [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]
            for contents in conversations
        ]
        tables.append(pa.table({"messages": pa.array(rows, MESSAGES)}))
    dataset = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    position = np.concatenate([np.arange(len(table)) for table in tables])
    return Split(dataset, position, np.full(len(dataset), 10), np.full(len(dataset), 5), tables)


def kind(text: str, *questions: str) -> str | None:
    """How a message of this text overlaps with the questions."""
    found = contaminated_rows(split_of([["Hello", text]]), list(questions))
    return ("exact" if found.exact[0] else "13-gram") if len(found) else None


def words(text: str) -> list[str]:
    return normalized(pa.array([text], pa.string()))[0].as_py().split()


# ---- Normalization ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  It's 3.5 %,\n\n\"isn't\" IT?\0 ", "it s 3 5 isn t it"),
        ("", ""),
        ("?!…  —", ""),
        ("snake_case <|endoftext|>", "snake case endoftext"),
        ("Straße ﬁn ΣΊΣΥΦΟΣ ", "strasse fin σίσυφοσ"),  # full case folding, ligature, final sigma, no-break space
        ("Cafe\u0301 \uff21\uff11 x\u00b2", "café a1 x2"),  # composed, full width, superscript
        ("हिन्दी भाषा।", "हिन्दी भाषा"),  # vowel signs are marks and stay within their words
        ("good ❤\ufe0f day", "good day"),
        ("我有3个苹果。", "我 有 3 个 苹 果"),
        ("リンゴ、りんご", "リ ン ゴ り ん ご"),
        ("Мама  МЫЛА раму", "мама мыла раму"),
    ],
)
def test_normalized(text, expected):
    assert words(text) == expected.split()
    assert normalized(pa.array([text, "A b"], pa.string())).to_pylist() == [" ".join(words(text)), "a b"]


@given(st.text())
def test_normalizing_twice_changes_nothing(text):
    once = normalized(pa.array([text], pa.string()))
    assert normalized(once).to_pylist() == once.to_pylist()


# ---- Benchmark items ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ITEM, "exact"),
        (ITEM.upper().replace(" ", "\n"), "exact"),
        (ITEM.replace("'", "’").replace("?", ""), "exact"),
        (f"Solve this, please: {ITEM} Think first.", "exact"),
        (f"pre{ITEM}", "13-gram"),  # whole words only
        (" ".join(WORDS[:13]), "13-gram"),
        (f"x {' '.join(WORDS[4:17])} y", "13-gram"),
        (" ".join(WORDS[-12:]), None),
        (" ".join([*WORDS[:11], "other", *WORDS[12:]]), None),  # "Anna's" is two words: 12 of the 13 needed
        (" ".join([*WORDS[:12], "other", *WORDS[13:]]), "13-gram"),
        (" ".join(reversed(WORDS)), None),
    ],
)
def test_long_question(text, expected):
    assert kind(text, "What else is there to ask in a question of more than thirteen words?", ITEM) == expected


@pytest.mark.parametrize("count", range(8, 14))
def test_question_of_8_words_or_more_is_found_within_a_message(count):
    question = " ".join(WORDS[1 : count + 1])
    assert kind(f"Well, {question}! Yes", question) == "exact"
    assert kind(f"Well, {question}s", question) is None
    assert kind(" ".join(WORDS[2 : count + 1]), question) is None


def test_short_question_must_be_the_whole_message():
    assert kind("what is, LOVE", "What is love?") == "exact"
    assert kind("So what is love?", "What is love?") is None
    assert kind("So what is love?", "2", "?", "") is None
    assert kind("...", "?", "") is None


def test_other_scripts():
    chinese = "小明有五个苹果，他给了小红两个，还剩下几个苹果？"
    assert kind(f"请回答：{chinese}谢谢", chinese) == "exact"
    assert kind("小明有五个苹果，他给了小红两只", chinese) == "13-gram"
    assert kind("小明有五个苹果，他给了小", chinese) is None
    russian = "У Маши было пять яблок, она отдала Пете два; сколько яблок осталось у неё теперь?"
    assert kind(russian.upper(), russian) == "exact"


def test_a_question_does_not_run_over_the_end_of_a_message():
    halves = [" ".join(WORDS[:10]), " ".join(WORDS[10:])]
    benchmark = [ITEM]
    assert len(contaminated_rows(split_of([halves]), benchmark)) == 0
    assert len(contaminated_rows(split_of([[" ".join(halves)]]), benchmark)) == 1


def test_rows_items_counts_and_samples():
    other = "How many of the 7 blue whales that Tom saw in May were seen by Ann in the June after?"
    split = split_of(
        [["Hi", "Hello"], [ITEM, "8"]],
        [],
        [[other, "7"], ["x", "y"], ["What is love?", ITEM, " ".join(WORDS[:14])], [other[:-7], ITEM[:-7]]],
    )
    benchmark = ["What is love?", other, ITEM, ITEM]
    found = contaminated_rows(split, benchmark)
    assert found.rows.tolist() == [1, 2, 4, 5]
    assert found.others.tolist() == [2, 1, 2, 2]  # the exact one with most words, the first of equals
    assert found.exact.tolist() == [True, True, True, False]
    assert found.counts.tolist() == [1, 0, 3]
    assert found.words[0] == " ".join(words(ITEM))
    assert len(found.words[3].split()) == 13
    assert found.words[3] in " ".join(words(ITEM))
    assert found.samples(2) == [f"row 5 and 2, 13-gram: {found.words[3]}", f"row 1 and 2, exact: {found.words[0]}"]
    # Of a selected split, rows are its own; without the rows that were found, nothing is found.
    assert contaminated_rows(split.select(np.array([0, 2, 5])), benchmark).rows.tolist() == [1, 2]
    assert len(contaminated_rows(split.select(np.delete(np.arange(6), found.rows)), benchmark)) == 0


def test_chunks(monkeypatch):
    """What is found does not depend on how the rows are cut into chunks, nor on their order in a table."""
    contents = [[f"{place} {ITEM}" if place % 3 == 0 else f"{place} nothing"] for place in range(20)]
    split, benchmark = split_of(contents, contents[::-1]), [ITEM]
    expected = [row for row in range(40) if min(row, 39 - row) % 3 == 0]
    for rows, size in [(1000, 1 << 24), (7, 1 << 24), (1000, 300), (1000, 1)]:
        monkeypatch.setattr(contamination, "CHUNK_ROWS", rows)
        monkeypatch.setattr(contamination, "CHUNK_BYTES", size)
        monkeypatch.setattr(contamination, "VALIDATION_TOKENS", rows)
        assert contaminated_rows(split, benchmark).rows.tolist() == expected
        reversed_split = split.select(np.arange(40)[::-1])
        assert contaminated_rows(reversed_split, benchmark).rows.tolist() == expected
        found = duplicated_rows(split.select(np.arange(20)), split.select(np.arange(20, 40)))
        assert found.rows.tolist() == list(range(20))
        assert found.exact.all()
        assert found.others.tolist() == list(range(20))[::-1]


def test_equal_hashes_are_no_match(monkeypatch):
    reversed_item = " ".join(reversed(WORDS))
    assert kind(reversed_item, ITEM) is None
    zeros = SimpleNamespace(integers=lambda *_, size, dtype: np.zeros(size, dtype))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: zeros)
    assert kind(reversed_item, ITEM) is None
    assert found_in([[reversed_item, "x"]], [[ITEM, "x"]]) == []
    assert kind(" ".join(WORDS[:12]), " ".join(WORDS[:12])) == "exact"  # the only n-gram of its hash


vocabulary = st.sampled_from(["the", "a", "of", "hens", "eggs", "3", "12", "she", "Öl", "我", "raz,", "два", "..."])
filler = st.lists(vocabulary, max_size=40)


def reference_kind(text: str, question: str) -> str | None:
    """The rule again, in plain Python, one text and one question at a time."""
    text, question = words(text), words(question)
    if not question:
        return None
    if len(question) < 8:
        return "exact" if text == question else None
    windows = {size: {tuple(text[n : n + size]) for n in range(len(text) - size + 1)} for size in (13, len(question))}
    if tuple(question) in windows[len(question)]:
        return "exact"
    grams = {tuple(question[n : n + 13]) for n in range(len(question) - 12)}
    return "13-gram" if grams & windows[13] else None


@given(filler, st.lists(filler, min_size=1, max_size=4), filler, st.data())
def test_planted_grams_are_found_and_nothing_else(before, questions, after, data):
    questions = [" ".join(question) for question in questions]
    planted = data.draw(st.sampled_from(questions)).split()
    start = data.draw(st.integers(0, max(0, len(planted) - 13)))
    text = " ".join([*before, *planted[start : start + 13], *after])
    kinds = [reference_kind(text, question) for question in questions]
    assert kind(text, *questions) == ("exact" if "exact" in kinds else "13-gram" if "13-gram" in kinds else None)


@given(st.text(max_size=60), st.text(max_size=60), st.text(min_size=1, max_size=30).filter(words))
def test_any_text_is_found_between_others(before, after, piece):
    question = " ".join([piece] * 13)
    assert kind(f"{before}\n{question}\n{after}", question) == "exact"


# ---- Loading ----


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_load_benchmark(tmp_path, ending):
    rows = [{"question": ITEM, "answer": "#### 8"}, {"question": "Why?", "answer": "#### 1"}]
    path = tmp_path / f"gsm8k_test{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        opened = gzip.open if ending.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    assert load_benchmark("gsm8k_test", tmp_path) == [ITEM, "Why?"]


def test_load_benchmark_from_the_hub_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    folder = tmp_path / "hub" / "datasets--openai--gsm8k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name, question in [("main/test-00000-of-00001.parquet", ITEM), ("main/train-00000-of-00001.parquet", "No")]:
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.Table.from_pylist([{"question": question, "answer": "8"}]), path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for download in (True, False):
        assert load_benchmark("gsm8k_test", tmp_path, download) == [ITEM]


def test_a_benchmark_that_is_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reason = load_benchmark("gsm8k_test", tmp_path)
    assert "gsm8k_test.jsonl" in reason
    assert "openai/gsm8k" in reason
    assert "\n" not in reason
    assert load_benchmark("gsm8k_test", tmp_path, download=False) == "gsm8k_test is not on this machine"
    (tmp_path / "gsm8k_test.jsonl").write_text('{"prompt": "?"}\n')
    assert "no field 'question'" in load_benchmark("gsm8k_test", tmp_path)


# ---- Validation conversations in training ----


def found_in(train: list[list[str]], validation: list[list[str]]) -> list[tuple[int, int, bool]]:
    found = duplicated_rows(split_of(validation), split_of(train))
    return list(zip(found.rows.tolist(), found.others.tolist(), found.exact.tolist(), strict=True))


def numbered(prefix: str, count: int) -> str:
    return " ".join(f"{prefix}{number}" for number in range(count))


def test_equal_conversations():
    train = [["Hi", "Hello"], ["?!", "..."], ["Hi!", "HELLO."], ["Hi", "there"]]
    assert found_in(train, [["hi", "hello"], ["hi hello", ""], ["--", "?"], ["hi", "there you"], ["Hi", "there"]]) == [
        (0, 0, True),
        (4, 3, True),
    ]


def test_nearly_equal_conversations():
    prompt, reply = numbered("p", 20), numbered("r", 80)
    edited = reply.replace("r40", "changed")
    assert found_in([["x"], [prompt, edited]], [[prompt, reply]]) == [(0, 1, False)]
    assert found_in([["x"], ["before", "and", prompt, reply, "after"]], [[prompt, reply]]) == [(0, 1, False)]
    assert found_in([[prompt, edited], [prompt, reply + " more"]], [[prompt, reply]]) == [(0, 1, False)]  # the nearest
    assert found_in([[prompt, edited], [prompt, reply]], [[prompt, reply]]) == [(0, 1, True)]


def test_half_of_the_13_grams_in_one_conversation():
    prompt, reply = numbered("p", 20), numbered("r", 80)  # 100 words: 88 13-grams, 44 of them in the first 56 words
    assert found_in([[prompt, numbered("r", 36)]], [[prompt, reply]]) == [(0, 0, False)]
    assert found_in([[prompt, numbered("r", 35)]], [[prompt, reply]]) == []


def test_boilerplate_is_no_duplicate():
    refusal = "I am sorry, but as an AI language model I cannot do that for you."  # 15 words
    assert found_in([["Sing", refusal]], [["Dance on a table", refusal]]) == []
    # The halves of a conversation in two others.
    first, second = numbered("a", 40), numbered("b", 40)
    assert found_in([[first, "x"], ["y", second]], [["Well", f"{first} so {second}"]]) == []
    # A system prompt of all conversations, however long.
    system = numbered("s", 300)
    conversations = [[system, numbered(f"{row}q", 20), numbered(f"{row}r", 20)] for row in range(40)]
    assert found_in(conversations[:20], conversations[20:]) == []
    assert found_in(conversations[:21], conversations[20:]) == [(0, 20, True)]
    conversations[0][2] += " more"
    assert found_in(conversations[:1], [[system, numbered("0q", 20), numbered("0r", 20)], *conversations[20:]]) == [
        (0, 0, False)
    ]


def test_empty_splits():
    assert found_in([["Hi " * 20, "Hello"]], [["Hi", "Hello"]]) == []  # no 13-gram in validation
    assert found_in([], [["Hi", "Hello"]]) == []
    assert found_in([["Hi", "Hello"]], []) == []
    assert len(contaminated_rows(split_of([]), [ITEM])) == 0
    assert len(contaminated_rows(split_of([[ITEM]]), [])) == 0


# ---- Real data ----


@pytest.fixture(scope="module")
def shared_splits():
    if not (SHARED / "data").is_dir():
        pytest.skip(f"{SHARED / 'data'} is not here")
    options = SimpleNamespace(
        val_split=0.05,
        max_val_set=None,
        lang="en,es,de,fr,ru,pt,it",
        top_k=None,
        context="drop",
        on_bad_records="error",
    )
    readings = [Reading(name, options, [SHARED / "data" / file], rng_seed=1) for name, file in SHARED_DATA.items()]
    everything = split_of(*([[m.content for m in conversation.messages] for conversation in r] for r in readings))
    codes = np.concatenate([reading.split() for reading in readings])
    return everything.select(codes == TRAIN), everything.select(codes == VALIDATION)


def test_gsm8k_in_the_shared_mix(shared_splits, tmp_path):
    train, _ = shared_splits
    benchmark = load_benchmark("gsm8k_test", SHARED / "data")
    assert len(benchmark) == 1319
    characters = sum(table["messages"].nbytes for table in train.tables)
    start = time.perf_counter()
    found = contaminated_rows(train, benchmark)
    seconds = time.perf_counter() - start
    print(f"\n{len(train.dataset):,} conversations, {characters / 1e6:.1f} MB in {seconds:.2f} s: {found.counts}")
    print(*found.samples(20), sep="\n")
    # The file holds training problems only; four share a sentence with a test problem that asks something else.
    assert not found.exact.any()
    assert set(np.flatnonzero(found.counts)) <= {list(SHARED_DATA).index("grade_school_math_instructions")}
    assert len(found) <= 20

    # The hub's file has the test problems too.
    planted = split_of([["Hi", "Hello"]], [[question, "#### 1"] for question in benchmark])
    found = contaminated_rows(planted, benchmark)
    assert found.rows.tolist() == list(range(1, 1320))
    assert found.others.tolist() == list(range(1319))
    assert found.exact.all()
    assert found.counts.tolist() == [0, 1319]


def test_duplicates_in_the_shared_mix(shared_splits):
    train, validation = shared_splits
    start = time.perf_counter()
    found = duplicated_rows(validation, train)
    print(
        f"\n{len(validation.dataset)} validation conversations in {time.perf_counter() - start:.2f} s: {found.counts}"
    )
    print(*found.samples(20), sep="\n")
    assert len(found) <= 3
    everything = duplicated_rows(validation, validation)
    assert everything.exact.all()
    assert len(everything) == len(validation.dataset)
