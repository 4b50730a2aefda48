"""Overlap of conversations: a benchmark's test items inside the training mix, validation conversations inside training.

Texts are compared as words: Unicode NFKC and case folding, then everything but letters, marks and digits is a space.
Where a script is written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word.

Of a benchmark item, the question counts. A conversation is contaminated by it when one of its messages
- "exact": holds the question, word for word (is it, for one of less than `SHORT` words: many hold "what is love");
- "13-gram": shares 13 consecutive words with it, the rule of the GPT-3 paper (Brown et al. 2020, arXiv:2005.14165,
  appendix C) and of the decontamination in lm-evaluation-harness.

A validation conversation also stands in training when
- "exact": its messages have the words of those of a training conversation, or
- "13-gram": at least `DUPLICATE_SHARE` of its 13-grams, prompts and replies read as one text, stand in one training
  conversation. A share, as one 13-gram may be a licence, a row of `#include`s or a popular prompt. Those of more than
  `COMMON` validation conversations are left out, as a system prompt that all have in common makes none a duplicate.

13-grams are looked up by hash and then compared word by word: no match is an accident of hashing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.files import find_data_file
from data.mix import Mix, Split
from data.records import read_records
from recipe.keys import Recipe
from sources.source import HubSource, Record
from utils.errors import UserError
from utils.launch import say

GRAM, SHORT = 13, 8  # words
# A changed word breaks 13 of the 13-grams, so a copy with one in 38 words changed is still found. The highest share of
# what is no copy, on 460 real validation conversations, was 0.44: the same code in reply to two prompts.
DUPLICATE_SHARE, COMMON = 0.5, 10  # of its 13-grams; conversations
CHUNK_ROWS, CHUNK_BYTES = 1000, 1 << 23  # conversations in work at once
VALIDATION_TOKENS = 10_000_000  # indexed at once, in about 1 GB; so many more cost another pass over training
NOT_A_WORD = r"(?:[^\p{L}\p{M}\p{N}]+\p{M}*)+"  # with the marks that follow no letter, as an emoji's variation selector
SPACELESS = r"([\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*)"

# By the local file's name (cache_dir/gsm8k_test.jsonl, .jsonl.gz, ...): where the hub has it, and the question's field.
BENCHMARKS = {"gsm8k_test": (HubSource("openai/gsm8k", ("main/test-*.parquet",)), "question")}


def load_benchmark(name: str, cache_dir: Path, download: bool = True) -> list[str] | str:
    """A benchmark's questions, or one line that says why they are not to be had (missing, unreachable, damaged)."""
    hub, field = BENCHMARKS[name]
    try:
        paths = find_data_file(name, None, cache_dir, None, hub, download)
    except UserError:
        return f"{name} is not on this machine and could not be fetched ({hub.repo}): give {cache_dir}/{name}.jsonl"
    questions = []
    try:
        for path in paths or []:
            records = read_records(path, fields={field})
            questions += [Record(values, path, number, number).get(field) for number, values in records]
    except UserError as error:
        return str(error)
    return questions or f"{name} is not on this machine"


@dataclass(frozen=True)
class Overlaps:
    """The conversations of one split that were found, each once, with the best match.

    `split.select(np.delete(np.arange(len(split)), overlaps.rows))` is the split without them.
    """

    rows: np.ndarray  # int64 [n], rows of the split, ascending
    others: np.ndarray  # int64 [n], the benchmark item (from 0) or the training row that it overlaps most with
    exact: np.ndarray  # bool [n], "exact", else "13-gram"
    words: list[str]  # for each, normalized: the whole question or 13 of the shared words; the start of a duplicate
    counts: np.ndarray  # int64 [data sets], how many of each data set of the mix

    def __len__(self) -> int:
        return len(self.rows)

    def samples(self, count: int = 3) -> list[str]:
        """A line each for some, those first that are not exact, as these are worth a look."""
        kinds = np.where(self.exact, "exact", f"{GRAM}-gram")
        chosen = np.argsort(self.exact, kind="stable")[:count]
        return [f"row {self.rows[n]} and {self.others[n]}, {kinds[n]}: {self.words[n]}" for n in chosen]


def without_contamination(mix: Mix, recipe: Recipe) -> Mix:
    """The mix, under `drop_contaminated` without the training conversations that hold questions of the benchmarks;
    UserError when a benchmark is not to be had, so that nothing could be promised."""
    train = mix.train
    for name in BENCHMARKS if recipe.drop_contaminated else ():
        questions = load_benchmark(name, recipe.cache_dir)
        if isinstance(questions, str):
            raise UserError(f"drop_contaminated: {questions}")
        found = contaminated_rows(train, questions)
        train = train.select(np.delete(np.arange(len(train)), found.rows))
        say(f"drop_contaminated: {len(found):,} training conversations with questions of {name} left out")
    return replace(mix, train=train)


def contaminated_rows(split: Split, benchmark: list[str]) -> Overlaps:
    """The conversations of a split that hold questions of a benchmark; one pass over it, in flat memory."""
    questions = normalized(pa.array(benchmark, pa.string()))
    lengths = np.array([len(text.split()) for text in questions.to_pylist()], dtype=np.int64)
    short = questions.filter(pa.array((lengths > 0) & (lengths < SHORT)))
    sizes = np.where(lengths < SHORT, 0, np.minimum(lengths, GRAM))  # below 13 words, the question is the n-gram
    groups = [np.flatnonzero(sizes == size) for size in np.unique(sizes[sizes > 0])]
    indexes = [(group, _Grams(questions.take(pa.array(group)), int(sizes[group[0]]))) for group in groups]
    found: dict[int, tuple] = {}
    for rows, messages in _chunks(split):
        texts = normalized(messages.flatten())
        row_of = np.repeat(rows, messages.value_lengths())
        for text in np.flatnonzero(pc.is_in(texts, value_set=short)):
            _keep(found, row_of[text], True, 0, pc.index(questions, texts[text]).as_py(), str(texts[text]))
        for group, index in indexes:
            for text, own, count, gram in zip(*index.shared(texts), strict=True):
                question = str(questions[group[own]])
                exact = f" {question} " in f" {texts[text]} "
                _keep(found, row_of[text], exact, count, group[own], question if exact else index.words(gram))
    return _overlaps(split, found)


def duplicated_rows(validation: Split, train: Split) -> Overlaps:
    """The conversations of one split that also stand in another; `others` are rows of `train`."""
    found: dict[int, tuple] = {}
    group = np.cumsum(validation.lengths) // VALIDATION_TOKENS
    for part in np.split(np.arange(len(group)), np.flatnonzero(np.diff(group)) + 1):
        chunks = [(part[rows], _joined(messages)) for rows, messages in _chunks(validation.select(part))]
        if not chunks:  # an empty split
            break
        rows, texts = np.concatenate([rows for rows, _ in chunks]), pa.concat_arrays([texts for _, texts in chunks])
        index, equal_to = _Grams(texts, GRAM, COMMON), {}
        for train_rows, messages in _chunks(train):
            train_texts = _joined(messages)
            for n in np.flatnonzero(pc.is_in(train_texts, value_set=texts)):
                equal_to.setdefault(str(train_texts[n]), train_rows[n])
            text, own, count, _ = index.shared(train_texts)
            for n in np.flatnonzero(count >= DUPLICATE_SHARE * index.totals[own]):
                _keep(found, rows[own[n]], False, count[n], train_rows[text[n]], str(texts[own[n]])[:200])
        for row, text in zip(rows, texts.to_pylist(), strict=True):
            if text in equal_to and text.strip():  # without words, they may differ in their signs
                _keep(found, row, True, 0, equal_to[text], text[:200])
    return _overlaps(validation, found)


def _keep(found: dict[int, tuple], row: int, exact: bool, count: int, other: int, words: str) -> None:
    """The best match of a row: an exact one, then the most 13-grams, then the first."""
    match = (not exact, -int(count), int(other), " ".join(words.split()))
    found[int(row)] = min(found.get(int(row), match), match)


def _overlaps(split: Split, found: dict[int, tuple]) -> Overlaps:
    rows = np.array(sorted(found), dtype=np.int64)
    matches = [found[row] for row in rows.tolist()]
    exact = np.array([not inexact for inexact, *_ in matches], dtype=bool)
    others = np.array([other for _, _, other, _ in matches], dtype=np.int64)
    counts = np.bincount(split.dataset[rows], minlength=len(split.tables))
    return Overlaps(rows, others, exact, [words for *_, words in matches], counts)


# ---- Words and n-grams ----


def normalized(texts: pa.StringArray) -> pa.StringArray:
    """Each text as its words with one space between them."""
    other = pc.invert(pc.string_is_ascii(texts))
    texts = pc.ascii_lower(texts)
    if pc.any(other).as_py():
        # Normalized once more as folding can undo it: Unicode's NFKC_Casefold but for its ignorable characters.
        folded = [normalize("NFKC", normalize("NFKC", text).casefold()) for text in texts.filter(other).to_pylist()]
        spaced = pc.replace_substring_regex(pa.array(folded, pa.string()), SPACELESS, r" \1 ")
        texts = pc.replace_with_mask(texts, other, spaced)
    return pc.ascii_trim_whitespace(pc.replace_substring_regex(texts, NOT_A_WORD, " "))


def _joined(messages: pa.ListArray) -> pa.StringArray:
    """Conversations (list<string>) as one normalized text each, a message a line."""
    return pc.binary_join(pa.ListArray.from_arrays(messages.offsets, normalized(messages.values)), "\n")


def _chunks(split: Split) -> Iterator[tuple[np.ndarray, pa.ListArray]]:
    """Rows of a split with the contents of their messages (list<string>), some megabytes at a time."""
    for dataset, table in enumerate(split.tables):
        rows = np.flatnonzero(split.dataset == dataset)
        rows = rows[np.argsort(split.position[rows], kind="stable")]
        positions, first = split.position[rows], 0
        for batch in table.select(["messages"]).to_batches(max_chunksize=CHUNK_ROWS):
            low, high = np.searchsorted(positions, [first, first + len(batch)])
            messages = batch.column(0).take(pa.array(positions[low:high] - first))
            first += len(batch)
            step = max(1, len(messages) * CHUNK_BYTES // max(messages.nbytes, CHUNK_BYTES))
            for at in range(0, len(messages), step):
                part = messages[at : at + step]
                ends = np.cumsum(part.value_lengths(), dtype=np.int32)
                contents = part.flatten().field("content")
                yield rows[low:high][at : at + step], pa.ListArray.from_arrays(np.append(np.int32(0), ends), contents)


class _Grams:
    """The distinct n-grams of normalized texts, without those of more than `common` texts; `totals`: of each text."""

    def __init__(self, texts: pa.StringArray, size: int, common: int | None = None):
        self._size, self._vocabulary = size, pc.ascii_split_whitespace(texts).flatten().unique()
        # The last is for unknown words, whose id is -1. What is found does not depend on the seed.
        self._weights = np.random.default_rng(0).integers(2**64, size=len(self._vocabulary) + 1, dtype=np.uint64)
        self._ids, owner = self._word_ids(texts)
        starts, hashes = self._windows(self._ids, owner)
        self._keys, example, gram = np.unique(hashes, return_index=True, return_inverse=True)
        self._example = starts[example]  # of each n-gram, where it begins in _ids
        same = self._same(self._ids, starts, gram)
        gram, own = np.divmod(np.unique(gram[same] * len(texts) + owner[starts[same]]), len(texts))
        rare = np.bincount(gram)[gram] <= (common or len(texts))
        # The texts of n-gram g are _owners[_bounds[g] : _bounds[g + 1]].
        self._owners = own[rare]
        self._bounds = np.searchsorted(gram[rare], np.arange(len(self._keys) + 1))
        self.totals = np.bincount(self._owners, minlength=len(texts))

    def words(self, gram: int) -> str:
        ids = self._ids[self._example[gram] :][: self._size]
        return " ".join(self._vocabulary.take(pa.array(ids)).to_pylist())

    def shared(self, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each pair of a given and an own text that share n-grams: (given, own, distinct n-grams, one of them)."""
        if not len(self._owners):
            return (np.zeros(0, np.int64),) * 4
        ids, owner = self._word_ids(texts)
        starts, hashes = self._windows(ids, owner)
        gram = np.searchsorted(self._keys, hashes) % len(self._keys)
        alike = self._keys[gram] == hashes
        starts, gram = starts[alike], gram[alike]
        same = self._same(ids, starts, gram)
        given, gram = np.divmod(np.unique(owner[starts[same]] * len(self._keys) + gram[same]), len(self._keys))
        times = self._bounds[gram + 1] - self._bounds[gram]
        hit = np.repeat(np.arange(len(gram)), times)
        nth = np.arange(len(hit)) - np.repeat(np.cumsum(times) - times, times)
        own = self._owners[self._bounds[gram[hit]] + nth]
        pair, example, count = np.unique(given[hit] * len(self.totals) + own, return_index=True, return_counts=True)
        return *np.divmod(pair, len(self.totals)), count, gram[hit[example]]

    def _same(self, ids: np.ndarray, starts: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """Whether the n words from each start on are those of the n-gram that has their hash."""
        same = np.ones(len(starts), bool)
        for place in range(self._size):
            same &= ids[starts + place] == self._ids[self._example[gram] + place]
        return same

    def _word_ids(self, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        """The id of each word, its place in the vocabulary or -1, and its text."""
        words = pc.ascii_split_whitespace(texts)
        ids = pc.index_in(words.flatten(), value_set=self._vocabulary)
        return pc.fill_null(ids, -1).to_numpy(), np.repeat(np.arange(len(texts)), words.value_lengths())

    def _windows(self, ids: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where n known words of one text begin, and their hash."""
        last = max(0, len(ids) - self._size + 1)
        unknown = np.append(0, np.cumsum(ids < 0))
        in_one_text = owner[:last] == owner[self._size - 1 : self._size - 1 + last]
        starts = np.flatnonzero(in_one_text & (unknown[:last] == unknown[self._size : self._size + last]))
        weights, hashes = self._weights[ids], np.zeros(len(starts), np.uint64)
        for place in range(self._size):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + weights[starts + place]
        return starts, hashes
