"""The search for the best text, over a decoder whose probabilities are written down here."""

import itertools

import numpy as np
import pytest

from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.engines import search, token_rules
from pipelines.whisper.engines.search import Prompt
from pipelines.whisper.engines.token_rules import TokenRules

END, N_TEXT = 5, 5
NO_SPEECH, NO_TIMES, FIRST_TIME = 6, 7, 8
VOCABULARY = 8 + 1501
LIMIT = 5


class Markov:
    """A decoder whose next token depends on the last one, and on the window."""

    def __init__(self, tables: np.ndarray):
        self.tables = tables
        self.windows = np.arange(len(tables))
        self.steps = []

    def step(self, tokens):
        assert len(tokens) == len(self.windows)
        self.steps.append(len(tokens))
        logits = np.full((len(tokens), VOCABULARY), -30.0, dtype=np.float32)
        logits[:, : N_TEXT + 1] = self.tables[self.windows, np.minimum(tokens[:, -1], N_TEXT)]
        return logits

    def select(self, rows):
        assert (np.diff(self.windows[rows]) >= 0).all()
        self.windows = self.windows[rows]


@pytest.fixture
def tables():
    """Log-probabilities [window, last token, next token]; the last row is that of the start."""
    logits = np.random.default_rng(3).standard_normal((3, N_TEXT + 1, N_TEXT + 1)) * 2
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)


@pytest.fixture
def whole_search(monkeypatch):
    """No text of a beam is given up."""
    monkeypatch.setattr(search, "_MAX_BEHIND", np.inf)
    monkeypatch.setattr(search, "_SAME_TOKENS", 1_000)


def rules(timestamps=False, hotwords=(), suppressed=()):
    return TokenRules(
        END, FIRST_TIME, timestamps, np.array(suppressed, dtype=np.int64), np.array([], dtype=np.int64),
        token_rules._trie(hotwords),
    )  # fmt: skip


def find(tables, allowed=None, **options):
    options = DecodingOptions(timestamps=False, **options)
    decoder = Markov(tables)
    return search.search(decoder, Prompt([7], [7]), len(tables), allowed or rules(), options, 0.0, LIMIT), decoder


def every_text(table):
    """Yield each text of at most LIMIT tokens, the end token included, with its log-probability."""
    for n in range(LIMIT):
        for ids in itertools.product(range(N_TEXT), repeat=n):
            path = [N_TEXT, *ids, END]
            yield list(ids), float(sum(table[a, b] for a, b in itertools.pairwise(path)))


@pytest.mark.usefixtures("whole_search")
def test_wide_beam_finds_the_most_probable_text(tables):
    texts, _ = find(tables, beam_size=32, patience=10.0, length_penalty=1.0)
    for text, table in zip(texts, tables, strict=True):
        finished = [(ids, score / max(len(ids), 1)) for ids, score in every_text(table)]
        best_ids, best = max(finished, key=lambda one: one[1])
        found = sum(text.logprobs) / max(len(text.ids), 1)
        if len(text.ids) < LIMIT:  # texts that are cut have no end token
            assert (text.ids, found) == (best_ids, pytest.approx(best, abs=1e-4))


def test_beam_of_one_is_greedy(tables):
    texts, _ = find(tables)
    for text, table in zip(texts, tables, strict=True):
        last, ids = N_TEXT, []
        while len(ids) < LIMIT and (token := int(table[last].argmax())) != END:
            ids.append(token)
            last = token
        assert text.ids == ids[:LIMIT]


def test_windows_do_not_depend_on_each_other(tables):
    together, _ = find(tables, beam_size=3)
    alone = [find(tables[n : n + 1], beam_size=3)[0][0] for n in range(len(tables))]
    assert [text.ids for text in together] == [text.ids for text in alone]


@pytest.mark.usefixtures("whole_search")
def test_finished_windows_leave_the_batch(tables):
    tables[0, :, END] = 5.0
    _, decoder = find(tables, beam_size=2)
    assert decoder.steps[2] == 2 * len(tables)
    assert decoder.steps[-1] < 2 * len(tables)


def chain(first, following, other=-9.0):
    """Return the table of one window: log-probabilities of first tokens, and the token that almost always follows."""
    table = np.full((1, N_TEXT + 1, N_TEXT + 1), other, dtype=np.float32)
    for token, logprob in first.items():
        table[0, N_TEXT, token] = logprob
    for token, following_token in following.items():
        table[0, token, following_token] = 0.0
    return table


def rows_of(table, **options):
    """Return the number of rows in each step after the prompt, and the text."""
    (text,), decoder = find(table, beam_size=3, **options)
    return decoder.steps[2:], text.ids


def test_text_far_behind_the_best_one_is_not_extended():
    near, far = -0.2 - search._MAX_BEHIND + 0.1, -0.2 - search._MAX_BEHIND - 0.1
    following = {0: 2, 1: 3, 2: 2, 3: 3}
    assert rows_of(chain({0: -0.2, 1: near}, following))[0][0] == 2
    assert rows_of(chain({0: -0.2, 1: far}, following))[0][0] == 1


def test_window_ends_when_all_texts_are_far_behind_a_finished_one():
    lengths = []
    for second in (-2.4, -2.6):  # after two tokens -3.1 and -3.3; -3.2 is needed. The first is written to its end
        table = chain({0: np.log(1 - np.exp(second)), 1: second}, {0: END, 2: 3, 3: 2})
        table[0, 1, 2:4] = -np.log(2)
        lengths.append(len(rows_of(table, patience=10.0)[0]))
    assert lengths == [LIMIT - 1, 1]


@pytest.mark.parametrize(("length_penalty", "length"), [(1.0, LIMIT), (0.0, 1), (-1.0, 1)])
def test_early_end_does_not_cut_a_text_that_is_ranked_higher(length_penalty, length):
    """One token ends with -0.97; five are cut with -4.64, which is more per token."""
    table = chain({0: 0.0}, {})
    table[0, 0, END], table[0, 0, 1] = np.log(0.38), np.log(0.62)
    table[0, 1:5, 1:5] = -np.log(4)
    assert len(rows_of(table, length_penalty=length_penalty)[1]) == length


def test_of_texts_with_equal_endings_only_the_better_is_extended(monkeypatch):
    monkeypatch.setattr(search, "_SAME_TOKENS", 2)
    steps, ids = rows_of(chain({0: -0.7, 1: -0.9}, {0: 2, 1: 2, 2: 3, 3: 4, 4: 2}))
    assert steps == [2, 2, 1, 1]
    assert ids == [0, 2, 3, 4, 2]


def test_of_texts_with_equal_endings_one_may_be_a_token_ahead(monkeypatch):
    monkeypatch.setattr(search, "_SAME_TOKENS", 2)
    for first in ({0: -0.7, 1: -0.9}, {0: -0.9, 1: -0.7}):
        steps, ids = rows_of(chain(first, {0: 1, 1: 2, 2: 3, 3: 4, 4: 2}))  # 0 1 2 3 4 and 1 2 3 4 2
        assert steps[-1] == 1
        assert ids[0] == max(first, key=first.get)


def test_no_text_is_given_up_for_a_hotword_that_is_being_spelled():
    """The best text would be given up for the start of a hotword, whose boost is taken back."""
    table = chain({0: -0.1, 1: -0.5}, {0: 3, 1: 0, 3: END})
    (text,), decoder = find(table, rules(hotwords=[[1, 2]]), beam_size=2)
    assert text.ids == [0, 3]
    assert set(decoder.steps[2:]) == {2}


def test_suppressed_token_is_never_written(tables):
    texts, _ = find(tables, rules(suppressed=[1, 2]), beam_size=3)
    assert not {1, 2} & {token for text in texts for token in text.ids}


def test_all_tokens_suppressed_gives_an_empty_text(tables):
    texts, _ = find(tables, rules(suppressed=range(VOCABULARY)), beam_size=3)
    assert [text.ids for text in texts] == [[], [], []]


def allowed(text, likely=()):
    """Return the tokens that may follow `text`."""
    logits = np.zeros((1, VOCABULARY), dtype=np.float32)
    logits[0, list(likely)] = 20.0
    rules(timestamps=True).suppress(logits, [text])
    return set(np.flatnonzero(logits[0] > -np.inf).tolist())


def test_text_begins_with_a_timestamp_of_the_first_second():
    assert allowed([]) == set(range(FIRST_TIME, FIRST_TIME + 51))


@pytest.mark.parametrize(
    ("text", "likely", "expected"),
    [
        ([FIRST_TIME], [0], {0, 1, 2, 3, 4, 5, 6}),
        ([FIRST_TIME, 0], [0], {*range(7), *range(FIRST_TIME + 1, VOCABULARY)}),
        ([FIRST_TIME, 0, FIRST_TIME + 100], [END], {END, 6, *range(FIRST_TIME + 100, VOCABULARY)}),
        ([FIRST_TIME, 0, FIRST_TIME + 100, FIRST_TIME + 100], [0], set(range(7))),
        ([FIRST_TIME, 0], [], set(range(FIRST_TIME + 1, VOCABULARY))),  # all times together are likelier
    ],
)
def test_timestamps_come_in_pairs_and_in_order(text, likely, expected):
    assert allowed(text, likely) == expected


def test_hotword_is_boosted_while_it_is_spelled():
    boost = token_rules.HOTWORD_BOOST
    one = rules(hotwords=[[1, 2, 3]])
    assert one.boosts([]) == (0.0, {1: boost})
    assert one.boosts([4, 1]) == (-boost, {1: 0.0, 2: boost})
    assert one.boosts([1, 2]) == (-2 * boost, {1: -boost, 3: boost})
    assert one.boosts([1, 2, 3]) == (0.0, {1: boost})  # earned for good
    assert one.boosts([1, 4]) == (0.0, {1: boost})  # lost by the step before


def test_unfinished_hotword_gains_nothing():
    """The sum of all boosts of a text is that of its whole hotwords."""
    one, boost = rules(hotwords=[[1, 2, 3], [1, 4]]), token_rules.HOTWORD_BOOST
    for text, words in (([1, 2, 0], 0), ([1, 2, 3, 0], 3), ([1, 4, 1, 2, 3], 5), ([1, 2, 1, 4], 2)):
        total = 0.0
        for n, token in enumerate(text):
            general, tokens = one.boosts(text[:n])
            total += tokens.get(token, general)
        assert total == pytest.approx(words * boost), text


def test_largest_values_are_those_of_a_full_sort():
    values = np.random.default_rng(0).standard_normal((4, 5_321)).astype(np.float32)
    places = search._largest(values, 7)
    for row, found in zip(values, places, strict=True):
        assert sorted(row[found]) == pytest.approx(np.sort(row)[-7:])


@pytest.mark.parametrize(
    ("ids", "is_cut", "expected"),
    [
        ([FIRST_TIME + 20, 0, FIRST_TIME + 100], False, ("a", 2.0)),
        ([FIRST_TIME + 20, 0], False, ("a", None)),  # the first timestamp is a start, no end
        ([FIRST_TIME, 0, FIRST_TIME + 100, FIRST_TIME + 100, 1], False, ("a b", None)),
        ([FIRST_TIME, 0, FIRST_TIME + 100, FIRST_TIME + 100, 1], True, ("a", 2.0)),  # decoded again from 2 s
        ([FIRST_TIME, 0, 1], True, ("a b", None)),
    ],
)
def test_sentence_without_an_end_is_not_written_twice(ids, is_cut, expected):
    text = search.Text(ids, [-0.1] * (len(ids) + (not is_cut)))
    found = search.hypothesis(text, Letters(), DecodingOptions())
    assert (found.text, found.end_s) == expected


class Letters:
    """A spelling of the tokens of this file: a, b, c ..."""

    first_timestamp = FIRST_TIME

    def text(self, ids):
        return " ".join("abcde"[token] for token in ids if token < END)

    def words(self, ids, logprobs):
        return tuple((self.text([token]), value) for token, value in zip(ids, logprobs, strict=True) if token < END)


def test_suppressed_tokens_beyond_the_logits_are_ignored():
    logits = np.zeros((1, VOCABULARY), dtype=np.float32)
    rules(suppressed=[1, VOCABULARY + 9]).suppress(logits, [[]])
    assert np.flatnonzero(np.isinf(logits[0])).tolist() == [1]


def test_hotword_of_thousands_of_tokens_is_boosted():
    assert rules(hotwords=[[1] * 3_000]).boosts([])[1] == {1: token_rules.HOTWORD_BOOST}
