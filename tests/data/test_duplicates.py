"""Repeated texts are found, exact or near ones, and unrelated texts are not."""

import gzip
import json
import random
import tracemalloc

import pytest

from data.audit.duplicates import RUNS_KEPT, TextIndex, normalize
from tests.helpers.places import REAL_DATA, SAMPLES, needs_real

PASSAGE = (
    "The old mill stands where the river leaves the hills. Its wheel was built of oak in 1781 and turned two pairs of "
    "stones, one for rye and one for wheat. When the railway came, the farmers of the valley sent their grain to the "
    "town, and the last miller closed the sluice for good. Today a school uses the building: pupils learn how the "
    "gears mesh, why the water is led in from above, and how much flour a family needed for a winter."
)


def match_of(first: str, second: str):
    index = TextIndex()
    assert index.add(first, "held.jsonl:1") is None
    return index.find(second)


@pytest.mark.parametrize(
    "copy",
    [PASSAGE, PASSAGE.upper(), "\n\t" + PASSAGE.replace(" ", "  "), PASSAGE.replace("o", "\uff4f")],
    ids=["same", "case", "space", "compatible characters"],
)
def test_case_space_and_form_of_characters_make_no_difference(copy):
    match = match_of(PASSAGE, copy)
    assert match is not None
    assert (match.where, match.similarity, match.exact) == ("held.jsonl:1", 1.0, True)


@pytest.mark.parametrize(
    ("copy", "least"),
    [
        (PASSAGE.replace(",", ";").replace(".", " -"), 1.0),
        (PASSAGE.replace("oak", "elm").replace("wheat", "barley").replace("pupils", "children"), 0.8),
        ("A note that was not part of it before. " + PASSAGE, 0.95),
        (PASSAGE[: len(PASSAGE) * 2 // 3], 0.95),
    ],
    ids=["punctuation", "three words", "a sentence more", "a third less"],
)
def test_near_copies_of_a_passage_are_found(copy, least):
    match = match_of(PASSAGE, copy)
    assert match is not None
    assert not match.exact
    assert least <= match.similarity <= 1


@pytest.mark.parametrize(
    ("first", "second", "exact"),
    [
        ("Sort this list", "sort  this list", True),
        ("Sort this list", "Sort that list", None),
        ("What is the capital of France?", "what is the capital of France", False),
        ("What is the capital of France?", "What is the capital of Spain?", None),
        ("What is the capital of Peru", "What is the capital of Peru and how many people live there", None),
        ("", " ", True),
        ("", "...", None),
        ("川の水は山から海へ流れ、途中で田を潤す。", "川の水は山から海へ流れ 途中で田を潤す", False),
        ("a lone surrogate \ud800", "A lone surrogate \ud800", True),
    ],
)
def test_short_texts_differ_by_a_word(first, second, exact):
    match = match_of(first, second)
    assert (match and match.exact) == exact


def test_adding_a_text_returns_the_first_place_of_an_equal_or_near_one():
    index = TextIndex()
    assert index.add(PASSAGE, "a:1") is None
    assert index.add("something else altogether, and nothing to do with a mill", "a:2") is None
    exact, near = index.add(PASSAGE, "a:3"), index.add(PASSAGE + " The end.", "a:4")
    assert exact is not None
    assert near is not None
    assert (exact.where, near.where, near.exact) == ("a:1", "a:1", False)
    assert len(index) == 3
    assert index.near_share == 1.0


def test_without_near_only_equal_texts_are_found():
    index = TextIndex(near=False)
    index.add(PASSAGE, "a:1")
    assert index.find(PASSAGE + " The end.") is None
    assert index.find(PASSAGE) is not None


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(count))


def test_copies_of_long_texts_are_found_by_a_sample_of_their_words():
    text = words(random.Random(0), 5 * RUNS_KEPT)
    cut = match_of(text, text[: len(text) * 7 // 10])
    assert cut is not None
    assert cut.similarity > 0.95
    assert match_of(text, words(random.Random(1), 5 * RUNS_KEPT)) is None


def test_too_many_texts_are_sampled_so_that_copies_stay_together():
    rng = random.Random(0)
    texts = [words(rng, 60) for _ in range(1000)]
    index = TextIndex(near_limit=300)
    for i, text in enumerate(texts):
        index.add(text, str(i))
    assert 0.1 < index.near_share <= 0.3
    matches = [index.add(f"{text} and more", "copy") for text in texts]
    assert all(m.where == str(i) for i, m in enumerate(matches) if m)
    assert sum(m is not None for m in matches) > 0.8 * 300 / 2
    assert all(m is not None and m.exact for m in map(index.find, texts))  # equal texts are always found


def test_texts_on_one_template_are_no_duplicates():
    rng = random.Random(0)
    index = TextIndex()
    template = words(rng, 30)
    assert not any(index.add(f"{template} {words(rng, 30)}", str(i)) for i in range(300))


def test_the_same_texts_give_the_same_matches():
    rng = random.Random(0)
    texts = [words(rng, 40) for _ in range(100)]
    texts += [t.replace("w1", "v1") for t in texts]
    runs = []
    for _ in range(2):
        index = TextIndex()
        runs.append([index.add(t, str(i)) for i, t in enumerate(texts)])
    assert runs[0] == runs[1]


def test_many_exact_texts_take_less_than_160_bytes_each():
    tracemalloc.start()
    index = TextIndex(near=False)
    for i in range(20_000):
        index.add(f"row {i}", f"train.jsonl:{i}")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / len(index) < 160
    assert all(index.find(f"row {i}").where == f"train.jsonl:{i}" for i in range(0, 20_000, 999))
    assert index.find("row 20000") is None


def test_normalised_text_is_lower_case_with_single_spaces():
    assert normalize("  \uff21 \u00a0 Ta\tB\n") == "a ta b"


def sample_contexts(name: str) -> list[str]:
    articles = json.loads((SAMPLES / name).read_text())["data"]
    return [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]


def test_samples_share_no_text():
    index = TextIndex()
    posts = [json.loads(line)["text"] for line in (SAMPLES / "newsgroups.jsonl").read_text().splitlines()]
    texts = sample_contexts("squad_train.json") + sample_contexts("squad_dev.json") + posts
    assert [index.add(text, str(i)) for i, text in enumerate(texts)] == [None] * len(texts)


@needs_real("squad_v2/dev.json.gz")
def test_passages_planted_among_others_are_all_found():
    with gzip.open(REAL_DATA / "squad_v2" / "dev.json.gz") as file:
        articles = json.load(file)["data"]
    held_out = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    index = TextIndex()
    for i, text in enumerate(held_out):
        index.add(text, f"dev: {i}")
    rng = random.Random(0)
    planted = rng.sample(range(len(held_out)), 50)
    for i in planted:
        match = index.find(held_out[i])
        assert match is not None
        assert match.exact
        if len(held_out[i].split()) >= 60:  # 56 runs of five words, of which two words change ten
            near = index.find(_edited(held_out[i], rng))
            assert near is not None
            assert near.where == match.where
    assert not any(map(index.find, sample_contexts("squad_train.json")))


def _edited(text: str, rng: random.Random) -> str:
    """Two words replaced, no comma after a word."""
    parts = text.replace(", ", " ").split()
    for at in rng.sample(range(len(parts)), 2):
        parts[at] = "something"
    return " ".join(parts)
