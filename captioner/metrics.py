"""BLEU, ROUGE-L and CIDEr-D of captions, as the COCO challenge counts them.

Captions are plain strings, given as two mappings over the same images: to the references (any number), which
`References` counts once, and to the candidate (one caption).
CIDEr weighs words by how rare they are in the references *given*, so scores of two different sets of images, or of
a set and its half, cannot be compared.

For 2,491 COCO images with five references each, lengths and n-gram counts were those of the official program
(coco-caption with its Java tokenizer), and the scores differed from its own by less than 1e-6.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Generic, NamedTuple, TypeVar

ORDERS = (1, 2, 3, 4)  # tokens of an n-gram, in BLEU and in CIDEr
ROUGE_BETA = 1.2  # recall weighs beta² times as much as precision
CIDER_SIGMA_TOKENS = 6.0
CIDER_SCALE = 10.0

# The official program adds these to numerators and denominators, which only shows where a count is zero.
_TINY, _SMALL = 1e-15, 1e-9

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"") | {0x2013: " - ", 0x2014: " - ", 0x2026: "..."}

# The first alternative that fits wins. What none matches only separates: blanks and the dropped punctuation.
_TOKEN = re.compile(
    r"""
      (?:[^\W\d_]\.)+[^\W\d_]?(?!\w)                                 # t.v.  u.s.  d.c
    | (?:ave|blvd|co|corp|dept|dr|etc|ft|inc|jr|ltd|mr|mrs|ms|mt|no(?=\.\ *\d)|rd|sr|st|univ|vs)\.(?!\w)
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
    | [^\W\d_]+(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b           # does n't  it 's
    | 'n' | '(?:\d0s|cause|em|n|til)\b | (?:[cdlo]|ma)'[^\W\d_]{2,}   # '90s  'em  o'clock
    | \d+(?:[.,:]\d+)+ | \.\d+                                       # 12:45  1,000  .99
    | \w+(?:[-/.]\w+)*                                               # t-shirt  his/her
    | [!?]{2,}                                                       # one alone is dropped, "!!" is not
    | [^\s\w.,:;!?'"`-]
    """,
    re.VERBOSE,
)

K = TypeVar("K", bound=Hashable)
Ngram = tuple[str, ...]


class CountedCaption(NamedTuple):
    """One caption: its tokens, and how often each n-gram of 1 to 4 of them occurs."""

    tokens: Sequence[str]
    ngrams: Counter[Ngram]


class NgramWeights(dict[Ngram, float]):
    """The weights of n-grams in CIDEr: the log of the number of images over that of those with it in a reference.

    What no reference has weighs as if one had it.
    """

    def __init__(self, frequency: Mapping[Ngram, int], num_images: int) -> None:
        self._rarest = math.log(max(1, num_images))
        super().__init__({ngram: self._rarest - math.log(count) for ngram, count in frequency.items()})

    def __missing__(self, ngram: Ngram) -> float:
        return self._rarest


class ImageReferences(NamedTuple):
    """The R references of an image: tokens, how often each has an n-gram of any, and each one's `_norms`."""

    tokens: Sequence[Sequence[str]]
    counts: dict[Ngram, tuple[int, ...]]
    norms: list[list[float]]

    @classmethod
    def of(cls, captions: Sequence["CountedCaption"], weights: NgramWeights) -> "ImageReferences":
        """Those of an image's counted captions."""
        tokens, norms = [own.tokens for own in captions], [_norms(own, weights) for own in captions]
        return cls(tokens, _counts(captions), norms)


class Comparison(NamedTuple):
    """The candidate caption of one image, the weights of n-grams in CIDEr, and the references."""

    candidate: CountedCaption
    weights: NgramWeights
    references: ImageReferences


class BleuCounts(NamedTuple):
    """What BLEU is made of, for an image or summed over a corpus: lengths in tokens, and n-grams for n = 1..4.

    `guess` counts the candidates' n-grams, `correct` the matched ones: an n-gram matches at most as often as the one
    reference that has it most often has it. `reference_tokens` sums the reference lengths closest to the candidates',
    the shorter of two equally close ones, and 0 for an image without references.
    """

    candidate_tokens: int
    reference_tokens: int
    guess: list[int]
    correct: list[int]


class ImageScores(NamedTuple):
    """What one image adds to the corpus scores: `scores` and `cider` explain them."""

    bleu_counts: BleuCounts
    rouge_l: float
    cider: float


class References(Generic[K]):
    """The references of a corpus, tokenized and counted once; scoring then costs little more than the candidates.

    The methods raise ValueError unless the candidates are of the same images.

    Raises:
        ValueError: there is no image at all.
        TypeError: an image's references are one string instead of several.
    """

    def __init__(self, references: Mapping[K, Sequence[str]]) -> None:
        if not references:
            raise ValueError("no captions to score: there are no references")
        for key, texts in references.items():
            if isinstance(texts, str):
                raise TypeError(f"references of image {key!r} are one string; give a list of captions")
        captions = {key: list(map(_count_caption, texts)) for key, texts in references.items()}
        ngrams_of_images = ({ngram for caption in own for ngram in caption.ngrams} for own in captions.values())
        frequency = Counter(chain.from_iterable(ngrams_of_images))
        self._weights = NgramWeights(frequency, len(references))
        self._images = {key: ImageReferences.of(own, self._weights) for key, own in captions.items()}

    def scores(self, candidates: Mapping[K, str]) -> dict[str, float]:
        """The corpus' `bleu1` to `bleu4` and `rouge_l`, in 0..1, and `cider`, in 0..10.

        BLEU-n (Papineni et al., ACL 2002) is the geometric mean of the precisions of 1-grams to n-grams over the
        whole corpus, times the brevity penalty exp(1 - r/c) where the candidates' c tokens are fewer than the
        references' r. A corpus without an n-gram in common scores nearly, not exactly, 0, as in the official program.

        ROUGE-L (Lin, ACL workshop 2004) is the mean over the images of the F-measure, with beta 1.2, of longest common
        subsequence over candidate length (precision) and over reference length (recall). As in the official program,
        the best precision and the best recall may come from different references. Without references, or with an
        empty candidate, it is 0. CIDEr is the mean of `cider`.
        """
        return corpus_scores(self.image_scores(candidates).values())

    def image_scores(self, candidates: Mapping[K, str]) -> dict[K, ImageScores]:
        """Each image's scores, in the order of the references; `corpus_scores` combines them."""
        return {
            key: ImageScores(_bleu_counts(comparison), _rouge_l(comparison), _cider(comparison))
            for key, comparison in self._compare(candidates).items()
        }

    def cider(self, candidates: Mapping[K, str]) -> dict[K, float]:
        """Each image's CIDEr-D in 0..10 (Vedantam et al., CVPR 2015).

        The cosine of TF-IDF weighted n-grams, the candidate's weights clipped to the reference's, times a Gaussian
        (sigma 6) of the difference of their lengths in tokens; averaged over n = 1..4 and over the references, times
        10. The document frequency of an n-gram is the number of *these* images with it in a reference: with one image
        every weight, and so the score, is 0. As in the official program, which calls this "CIDEr", words are not
        stemmed and term frequencies are plain counts.
        """
        return {key: _cider(comparison) for key, comparison in self._compare(candidates).items()}

    def _compare(self, candidates: Mapping[K, str]) -> dict[K, Comparison]:
        if candidates.keys() != self._images.keys():
            only_one = sorted(map(repr, candidates.keys() ^ self._images.keys()))
            raise ValueError(
                f"{len(only_one):,} images, such as {only_one[0]}, are not in both candidates and references"
            )
        captions = {key: _count_caption(candidates[key]) for key in self._images}
        return {key: Comparison(own, self._weights, self._images[key]) for key, own in captions.items()}


def document_frequency(captions_of_images: Iterable[Sequence[Sequence[str]]]) -> Counter[Ngram]:
    """In how many images' captions, given as tokens, each n-gram is."""
    found: Counter[Ngram] = Counter()
    for captions in captions_of_images:
        found.update(set(chain.from_iterable(_ngrams(tokens, n) for tokens in captions for n in ORDERS)))
    return found


class CiderReward:
    """CIDEr-D, in 0..10, of captions given as tokens, with the document frequencies of a training set of `num_images`.

    Tokens count as they are: punctuation, and an end if captions have one.
    """

    def __init__(self, frequency: Mapping[Ngram, int], num_images: int) -> None:
        self._weights = NgramWeights(frequency, num_images)

    def __call__(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
        """The scores of several captions of one image against its references."""
        image = ImageReferences.of(list(map(_count_tokens, references)), self._weights)
        return [_cider(Comparison(_count_tokens(tokens), self._weights, image)) for tokens in candidates]


def corpus_scores(images: Collection[ImageScores]) -> dict[str, float]:
    """The corpus scores of these images, by name; see `References.scores`."""
    return {
        **bleu_scores(sum_counts(image.bleu_counts for image in images)),
        "rouge_l": fmean(image.rouge_l for image in images),
        "cider": fmean(image.cider for image in images),
    }


def sum_counts(counts: Iterable[BleuCounts]) -> BleuCounts:
    """The counts of several images together."""
    candidate_tokens, reference_tokens, guesses, corrects = zip(*counts, strict=True)
    return BleuCounts(sum(candidate_tokens), sum(reference_tokens), _sum_columns(guesses), _sum_columns(corrects))


def bleu_scores(counts: BleuCounts) -> dict[str, float]:
    """`bleu1` to `bleu4`, in 0..1, of a corpus with these counts."""
    ratio = (counts.candidate_tokens + _TINY) / (counts.reference_tokens + _SMALL)
    penalty = math.exp(min(0.0, 1 - 1 / ratio))
    scores, product = {}, 1.0
    for n, guess, correct in zip(ORDERS, counts.guess, counts.correct, strict=True):
        product *= (correct + _TINY) / (guess + _SMALL)
        scores[f"bleu{n}"] = penalty * product ** (1 / n)
    return scores


def ptb_tokenize(caption: str) -> list[str]:
    """Lower-cased Penn Treebank tokens without punctuation, as the official program makes them.

    Follows Stanford's PTBTokenizer 3.4.1 (Java) less coco-caption's seventeen punctuation tokens: clitics are
    split off ("it 's", "does n't", "can not"), brackets stay as "-lrb-" and "-rrb-", an abbreviation keeps
    its full stop ("st.", "t.v."), "12:45" and "t-shirt" are one token. It gave the Java program's tokens for
    14,947 of 14,950 COCO captions and 175,531 of 175,550 others, mostly Flickr's. Web addresses,
    currency signs and emoticons are not imitated.
    """
    text = caption.lower().translate(_PLAIN).replace("&amp;", "&")
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text)]


def _count_caption(text: str) -> CountedCaption:
    return _count_tokens(ptb_tokenize(text))


def _count_tokens(tokens: Sequence[str]) -> CountedCaption:
    return CountedCaption(tokens, Counter(chain.from_iterable(_ngrams(tokens, n) for n in ORDERS)))


def _ngrams(tokens: Sequence[str], n: int) -> Iterator[Ngram]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _counts(captions: Sequence[CountedCaption]) -> dict[Ngram, tuple[int, ...]]:
    """How often each caption has each n-gram that any of them has."""
    ngrams = dict.fromkeys(chain.from_iterable(caption.ngrams for caption in captions))
    return {ngram: tuple(caption.ngrams.get(ngram, 0) for caption in captions) for ngram in ngrams}


def _bleu_counts(comparison: Comparison) -> BleuCounts:
    candidate, _, references = comparison
    guess, correct = [0] * len(ORDERS), [0] * len(ORDERS)
    for ngram, count in candidate.ngrams.items():
        guess[len(ngram) - 1] += count
        correct[len(ngram) - 1] += min(count, max(references.counts.get(ngram, (0,))))
    return BleuCounts(len(candidate.tokens), _closest_length(candidate, references), guess, correct)


def _sum_columns(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _closest_length(candidate: CountedCaption, references: ImageReferences) -> int:
    length = len(candidate.tokens)
    return min(map(len, references.tokens), key=lambda other: (abs(other - length), other), default=0)


def _rouge_l(comparison: Comparison) -> float:
    candidate = comparison.candidate.tokens
    references = [tokens for tokens in comparison.references.tokens if tokens]
    common = [_common_length(candidate, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence; a row of its table is one integer (Hyyrö, AWOCA 2004)."""
    positions: dict[str, int] = {}
    for position, token in enumerate(left):
        positions[token] = positions.get(token, 0) | 1 << position
    everywhere = (1 << len(left)) - 1
    row = everywhere  # a 0 where the length grows along `left`
    for token in right:
        matches = row & positions.get(token, 0)
        row = (row + matches) | (row - matches)
    return len(left) - (row & everywhere).bit_count()


def _cider(comparison: Comparison) -> float:
    candidate, weights, references = comparison
    if not references.tokens:
        return 0.0
    products = [[0.0] * len(ORDERS) for _ in references.tokens]
    for ngram, count in candidate.ngrams.items():
        if ngram in references.counts:
            for product, other in zip(products, references.counts[ngram], strict=True):
                product[len(ngram) - 1] += min(count, other) * other * weights[ngram] ** 2
    norms = _norms(candidate, weights)
    return CIDER_SCALE * fmean(
        fmean(map(_cosine, product, norms, reference_norms))
        * math.exp(-((len(candidate.tokens) - len(tokens)) ** 2) / (2 * CIDER_SIGMA_TOKENS**2))
        for product, reference_norms, tokens in zip(products, references.norms, references.tokens, strict=True)
    )


def _norms(caption: CountedCaption, weights: Mapping[Ngram, float]) -> list[float]:
    """For n = 1..4 the Euclidean norm of the caption's TF-IDF weights."""
    squares = [0.0] * len(ORDERS)
    for ngram, count in caption.ngrams.items():
        weight = count * weights[ngram]
        squares[len(ngram) - 1] += weight * weight
    return list(map(math.sqrt, squares))


def _cosine(product: float, norm: float, other_norm: float) -> float:
    scale = norm * other_norm
    return product / scale if scale else 0.0
