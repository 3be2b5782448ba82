"""Caption metrics: the official program's numbers, cases small enough to compute by hand, and laws."""

import functools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import metrics
from captioner.metrics import BleuCounts, References, ptb_tokenize, sum_counts

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "metrics"
DROPPED = {"''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

CANDIDATES = {
    "beach": "A man rides a wave on a surfboard.",
    "kitchen": "A kitchen with a stove and a sink.",
    "street": "A red bus drives down the street.",
}
REFERENCES = {
    "beach": ["A surfer riding a large wave.", "A man rides a wave on his surfboard in the ocean."],
    "kitchen": ["A small kitchen with a stove, a sink and a fridge.", "The kitchen has a white stove."],
    "street": ["A red double-decker bus on the street.", "A bus drives down a busy road."],
}

WORDS = st.sampled_from(["a", "man", "rides", "the", "red", "wave", "."])
captions = st.lists(WORDS, max_size=9).map(" ".join)
corpora = st.dictionaries(st.integers(), st.tuples(captions, st.lists(captions, max_size=4)), min_size=1, max_size=5)


def bleu(candidates, references):
    """BLEU-1 to BLEU-4."""
    scores = References(references).scores(candidates)
    return [scores[f"bleu{n}"] for n in (1, 2, 3, 4)]


def bleu_counts(candidates, references):
    """What BLEU is made of, summed over the corpus."""
    return sum_counts(image.bleu_counts for image in References(references).image_scores(candidates).values())


def rouge_l(candidate, references):
    """ROUGE-L of one image."""
    return References({1: references}).scores({1: candidate})["rouge_l"]


def split_corpus(corpus):
    """The candidates and the references of a drawn corpus."""
    candidates = {key: candidate for key, (candidate, _) in corpus.items()}
    return candidates, {key: references for key, (_, references) in corpus.items()}


# ---------------------------------------------------------------- the official program


@pytest.fixture(scope="module")
def official():
    """What the official program says of its COCO predictions, with these predictions and references."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"{OFFICIAL} is absent: the official program's output is not part of the repository")
    predictions, references, scores = (
        json.loads((OFFICIAL / name).read_text(encoding="utf-8"))
        for name in ("predictions.json", "references.json", "official.json")
    )
    grouped = {row["image_id"]: [] for row in predictions}
    for row in references["annotations"]:
        grouped[row["image_id"]].append(row["caption"])
    return {row["image_id"]: row["caption"] for row in predictions}, grouped, scores


def test_lengths_and_ngram_counts_are_the_official_ones(official):
    candidates, references, scores = official
    expected = BleuCounts(scores["testlen"], scores["reflen"], scores["guess"], scores["correct"])
    assert bleu_counts(candidates, references) == expected


def test_scores_are_the_official_ones(official):
    candidates, references, scores = official
    names = {"rouge_l": "ROUGE_L", "cider": "CIDEr"} | {f"bleu{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)}
    expected = {ours: scores[theirs] for ours, theirs in names.items()}
    # Three references of 12,459 are tokenized differently; on them CIDEr differs by 4.4e-7, the others by 0.
    assert References(references).scores(candidates) == pytest.approx(expected, abs=1e-6, rel=0)


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog, a cat; and - no: bird...", "a dog a cat and no bird"),
        ("A man (on the left) [of] {it}", "a man -lrb- on the left -rrb- -lsb- of -rsb- -lcb- it -rcb-"),
        ("I cannot see, he's gonna", "i can not see he 's gon na"),
        ("It doesn't, can't and shouldn't.", "it does n't ca n't and should n't"),
        ("the dogs' bowl and the dog's toys", "the dogs bowl and the dog 's toys"),
        ("they're sure we'll say I'm he'd you've", "they 're sure we 'll say i 'm he 'd you 've"),
        ("12:45 or 1:00. with 10,000 and 5.5", "12:45 or 1:00 with 10,000 and 5.5"),
        ("T.V. on Main St. in the U.S. and a t.v", "t.v. on main st. in the u.s. and a t.v"),
        ("mr. Smith sat on no. and saw no. 5", "mr. smith sat on no and saw no. 5"),
        ("a t-shirt, black/white with his/her mp3", "a t-shirt black/white with his/her mp3"),
        ("beach--kite hot-dog- and -veh", "beach kite hot-dog and veh"),
        ("doughnuts,cake on a fork.a plate..", "doughnuts cake on a fork.a plate"),
        ("Look! Really?! Wow!!", "look really ?! wow !!"),
        ("the \"stop\" sign and 'go' sign", "the stop sign and go sign"),
        ("caf\u00e9\u2019s \u201ccurly\u201d a\u2013b \u2026", "caf\u00e9 's curly a b"),
        ("five o'clock, '60s and 60's rock 'n' roll", "five o'clock '60s and 60 's rock 'n' roll"),
        ("salt &amp; pepper #1 at 5% of $5", "salt & pepper # 1 at 5 % of $ 5"),
        (" \n", ""),
    ],
)
def test_tokens_are_those_of_the_java_tokenizer(caption, expected):
    """Each expectation is what Stanford's Java tokenizer printed, less the dropped punctuation."""
    assert " ".join(ptb_tokenize(caption)) == expected


@settings(deadline=None)  # a loaded machine is no failure
@given(st.text() | st.text(alphabet="ab .'n-t!(/5:&"))
def test_no_token_is_dropped_punctuation_blank_or_upper_case(text):
    for token in ptb_tokenize(text):
        assert token not in DROPPED
        assert token.split() == [token]
        assert token == token.lower()


# ---------------------------------------------------------------- BLEU


def test_bleu_clips_an_ngram_to_its_count_in_the_reference_that_has_it_most():
    """Papineni's own example: seven times "the" matches twice."""
    candidates = {1: "the the the the the the the"}
    references = {1: ["The cat is on the mat.", "There is a cat on the mat."]}
    assert bleu_counts(candidates, references) == BleuCounts(7, 7, [7, 6, 5, 4], [2, 0, 0, 0])
    assert bleu(candidates, references)[0] == pytest.approx(2 / 7)


def test_bleu_of_two_equally_near_lengths_takes_the_shorter():
    """Taking the five tokens would cost exp(1 - 5/4)."""
    references = {1: ["the cat sat down there", "the cat sat"]}
    assert bleu_counts({1: "the cat sat down"}, references).reference_tokens == 3
    assert bleu({1: "the cat sat down"}, references)[0] == pytest.approx(1)


def test_bleu_brevity_penalty_is_over_the_corpus_not_the_image():
    """Both precisions are 1; five tokens against seven, though the second candidate is long enough."""
    candidates = {1: "a dog", 2: "the red bus"}
    references = {1: ["a dog runs fast"], 2: ["the red bus"]}
    assert bleu(candidates, references)[:2] == pytest.approx([math.exp(1 - 7 / 5)] * 2)


def test_bleu_is_the_geometric_mean_of_the_precisions():
    """3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no quadruple."""
    scores = bleu({1: "one two three six"}, {1: ["one two three four"]})
    expected = [3 / 4, (3 / 4 * 2 / 3) ** (1 / 2), (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3), 0]
    assert scores == pytest.approx(expected, abs=2e-4)
    assert scores[3] > 0  # smoothed as the official program does


# ---------------------------------------------------------------- ROUGE-L


def test_rouge_l_counts_the_longest_common_subsequence():
    """Lin's own example: "police the gunman" has three words of four, "the gunman" two."""
    candidates = {"kill": "police kill the gunman", "order": "the gunman kill police"}
    references = {key: ["police killed the gunman"] for key in candidates}
    assert rouge_l(candidates["kill"], references["kill"]) == pytest.approx(0.75)
    assert rouge_l(candidates["order"], references["order"]) == pytest.approx(0.5)
    assert References(references).scores(candidates)["rouge_l"] == pytest.approx(0.625)


def test_rouge_l_takes_best_precision_and_best_recall_from_different_references():
    """The first reference gives precision 2/4 and recall 1, the second 3/4 and 3/6."""
    references = ["one two", "one two three x y z"]
    beta_squared = 1.2**2
    expected = (1 + beta_squared) * 0.75 / (1 + beta_squared * 0.75)
    assert rouge_l("one two three four", references) == pytest.approx(expected)


@settings(deadline=None)
@given(captions, captions)
def test_rouge_l_agrees_with_the_plain_recursion(candidate, reference):
    left, right = tuple(candidate.replace(".", "").split()), tuple(reference.replace(".", "").split())

    @functools.cache
    def common(i, j):
        if not (i and j):
            return 0
        if left[i - 1] == right[j - 1]:
            return common(i - 1, j - 1) + 1
        return max(common(i - 1, j), common(i, j - 1))

    length = common(len(left), len(right))
    # F = (1 + b²) PR / (R + b² P) with P = length / |left| and R = length / |right|
    expected = 2.44 * length / (len(left) + 1.44 * len(right)) if length else 0
    assert rouge_l(candidate, [reference]) == pytest.approx(expected)


# ---------------------------------------------------------------- CIDEr


def test_cider_clips_weights_and_punishes_length():
    """Every n-gram stands in one of the two images, "red red" in none: all weigh log 2, which cancels.

    Words: (min(2, 1) * 1 + 1 * 1) / (sqrt 5 * sqrt 2); pairs: 1 / sqrt 2; no triple, no quadruple in the
    reference. One token more than the reference costs exp(-1 / 72).
    """
    candidates = {1: "red red cat", 2: "blue dog"}
    references = {1: ["red cat"], 2: ["blue dog"]}
    scores = References(references).cider(candidates)
    expected = 10 * (2 / math.sqrt(10) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert scores == pytest.approx({1: expected, 2: 5})
    assert References(references).scores(candidates)["cider"] == pytest.approx((expected + 5) / 2)


def test_cider_weighs_words_by_rarity_among_the_images():
    """Of three images "a" stands in all (weight 0), "red" in two (log 1.5), "cat" in one (log 3)."""
    candidates = {1: "a red", 2: "a", 3: "red"}
    references = {1: ["a cat red"], 2: ["a red", "a red"], 3: ["a dog"]}
    scores = References(references).cider(candidates)
    red, cat = math.log(3 / 2), math.log(3)
    words = red / math.hypot(red, cat)
    assert scores == pytest.approx({1: 10 / 4 * words * math.exp(-1 / 72), 2: 0, 3: 0})


def test_cider_of_the_references_themselves_is_ten_and_of_other_images_captions_lower():
    own = {key: references[0] for key, references in REFERENCES.items()}
    single = {key: [caption] for key, caption in own.items()}
    assert References(single).cider(own) == pytest.approx(dict.fromkeys(own, 10))
    rotated = dict(zip(CANDIDATES, [*list(CANDIDATES.values())[1:], CANDIDATES["beach"]], strict=True))
    references = References(REFERENCES)
    assert references.scores(rotated)["cider"] < references.scores(CANDIDATES)["cider"] / 5


# ---------------------------------------------------------------- all scores


def test_a_caption_equal_to_its_reference_scores_full():
    references = {key: [caption.upper()] for key, caption in CANDIDATES.items()}
    expected = {"bleu1": 1, "bleu2": 1, "bleu3": 1, "bleu4": 1, "rouge_l": 1, "cider": 10}
    assert References(references).scores(CANDIDATES) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(corpora, st.data())
def test_candidates_scored_before_leave_no_trace(corpus, data):
    candidates, references = split_corpus(corpus)
    counted = References(references)
    counted.scores({key: data.draw(captions) for key in corpus})
    assert counted.scores(candidates) == References(references).scores(candidates)


def test_references_are_tokenized_once(monkeypatch):
    tokenized = []
    monkeypatch.setattr(metrics, "ptb_tokenize", lambda text: tokenized.append(text) or ptb_tokenize(text))
    counted = References(REFERENCES)
    assert sorted(tokenized) == sorted(caption for captions in REFERENCES.values() for caption in captions)
    tokenized.clear()
    assert counted.scores(CANDIDATES) == References(REFERENCES).scores(CANDIDATES)
    assert tokenized[: len(CANDIDATES)] == list(CANDIDATES.values())
    tokenized.clear()
    counted.scores(CANDIDATES)
    assert tokenized == list(CANDIDATES.values())


@settings(deadline=None)
@given(corpora, st.randoms())
def test_order_of_images_and_of_references_changes_nothing(corpus, random):
    candidates, references = split_corpus(corpus)
    keys = random.sample(list(corpus), len(corpus))
    shuffled = {key: random.sample(references[key], len(references[key])) for key in keys}
    assert References(shuffled).scores({key: candidates[key] for key in keys}) == References(references).scores(
        candidates
    )


@settings(deadline=None)
@given(corpora)
def test_scores_stay_in_their_ranges(corpus):
    """Empty candidates, empty references and images without references among them."""
    candidates, references = split_corpus(corpus)
    scores = References(references).scores(candidates)
    highest = dict.fromkeys(scores, 1.0) | {"cider": 10.0}
    for name, score in scores.items():
        assert 0 <= score <= highest[name] + 1e-9


@pytest.mark.parametrize(("candidate", "references"), [("", ["a dog runs"]), ("a dog", [""]), ("a dog", [])])
def test_empty_captions_score_nothing(candidate, references):
    """A second, perfect image keeps CIDEr's weights from being zero anyway."""
    candidates = {1: candidate, 2: "the red bus stops here"}
    references = {1: references, 2: ["the red bus stops here"]}
    counted = References(references)
    assert counted.scores(candidates)["rouge_l"] == pytest.approx(0.5)
    assert counted.cider(candidates) == pytest.approx({1: 0, 2: 10})
    assert bleu_counts(candidates, references).correct == [5, 4, 3, 2]


def test_different_images_are_refused_by_name():
    with pytest.raises(ValueError, match=r"3 images, such as 7, are not in both"):
        References({1: ["a dog"], 8: ["a cat"], 9: ["a cow"]}).scores({1: "a dog", 7: "a cat"})


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="no captions to score"):
        References({})


def test_references_given_as_one_string_are_refused():
    with pytest.raises(TypeError, match="references of image 'beach' are one string"):
        References(REFERENCES | {"beach": "A surfer riding a wave."})
