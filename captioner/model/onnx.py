"""The ONNX folder: a model that captions through onnxruntime, with searches in NumPy. Imports no torch.

`encoder.onnx` · `decoder.onnx` · `config.json` · `vocabulary.json` · `README.md`, and if the model was calibrated
`calibration.json` · `calibration.safetensors`

Shapes: B images, N unfinished captions, S candidates for the next token, R positions of an image, P sides of a view in
pixels, F features of an image, V vocabulary.
"""

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.calibration import Calibration, read_calibration
from captioner.errors import UserError
from captioner.files import storage
from captioner.images.views import ViewSpec
from captioner.model.generated import COPY_PENALTY, DIVERSITY, FORBIDDEN, DecodingDefaults, GeneratedCaption
from captioner.vocabulary import END, START, Vocabulary, read_vocabulary

if TYPE_CHECKING:
    import onnxruntime

FORMAT_VERSION = 1
CONFIG, ENCODER, DECODER = "config.json", "encoder.onnx", "decoder.onnx"
EXPORT_AGAIN = "export the model folder again with infer/export.py"
ENCODED_AT_ONCE = 4  # activations of more images do not fit a core's cache
SEARCHED_AT_ONCE = 32  # images: more are no faster, and take more memory

Encoded = tuple[np.ndarray, ...]  # what decoder.onnx reads of B images, and its first hidden and cell state
Beams = list["Beam"]


@dataclass(frozen=True, kw_only=True)
class OnnxBundle:
    """An exported model ready to caption; its fields are those of `captioner.model.bundle.Bundle`.

    `grid` is the rows and columns of the encoder's feature map; None for a decoder without attention.
    """

    encoder: "onnxruntime.InferenceSession"
    decoder: "onnxruntime.InferenceSession"
    view: ViewSpec
    vocabulary: Vocabulary
    decoding: DecodingDefaults
    name: str
    grid: tuple[int, int] | None
    calibration: Calibration | None = None
    is_on_cpu: bool = True
    uses_torch: bool = False

    def encode(self, views_BPP3: np.ndarray, *, precision: str) -> tuple[Encoded, np.ndarray]:
        """What the decoder reads of B evaluation views, uint8, and their pooled features (B, F), in float32."""
        if precision != "float32":
            raise UserError(f"an ONNX folder has no {precision}: its precision is float32")
        starts = range(0, len(views_BPP3), ENCODED_AT_ONCE)
        parts = [self.encoder.run(None, {"views": views_BPP3[start : start + ENCODED_AT_ONCE]}) for start in starts]
        *encoded, features_BF = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return tuple(encoded), features_BF

    def search(self, encoded: Sequence[Encoded], *, num_captions: int, **options: Any) -> list[list[GeneratedCaption]]:
        """The captions of each encoded image, in order: those of `captioner.model.decoding.diverse`, up to rounding."""
        arrays = [np.concatenate(parts) for parts in zip(*encoded, strict=True)]
        found: list[list[GeneratedCaption]] = []
        for start in range(0, len(arrays[0]), SEARCHED_AT_ONCE):
            images = [array[start : start + SEARCHED_AT_ONCE] for array in arrays]
            captions = [[caption] for caption in beam_search(self.decoder, images, **options)]
            for _ in range(1, num_captions):
                others = beam_search(self.decoder, images, **options | {"beam_size": 1}, earlier=captions)
                captions = [[*group, other] for group, other in zip(captions, others, strict=True)]
            found += captions
        return found


# ---- the folder -------------------------------------------------------------------------------------------


def is_onnx_folder(folder: str) -> bool:
    """Whether a folder, or what is behind a URL, holds a model for onnxruntime."""
    return storage.exists(storage.join(folder, DECODER))


def make_config(
    *,
    view: ViewSpec,
    decoding: DecodingDefaults,
    vocabulary: Vocabulary,
    name: str,
    grid: Any,
    files: Mapping[str, bytes],
) -> str:
    """The text of `config.json`; `files` are the contents of both ONNX files, by name."""
    config = {
        "format_version": FORMAT_VERSION,
        "model": name,
        "view": asdict(view),
        "decoding": asdict(decoding),
        "grid": grid,
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    return json.dumps(config, indent=1, allow_nan=False)


def load_onnx(folder: str) -> OnnxBundle:
    """The model in an ONNX folder, a path or a URL. Raises UserError for missing or foreign files."""
    location = storage.join(folder, CONFIG)
    if not storage.exists(location):
        raise UserError(f"{folder} has ONNX files and no {CONFIG}: an earlier version exported it, {EXPORT_AGAIN}")
    config = storage.read_json(location, remedy=EXPORT_AGAIN)
    found = config.get("format_version") if isinstance(config, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{folder} has ONNX format {found}, this version reads {FORMAT_VERSION}: {EXPORT_AGAIN}")
    try:
        return _assemble(folder, config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{location} is not as it was written ({error!r}): {EXPORT_AGAIN}") from error


def _assemble(folder: str, config: dict[str, Any]) -> OnnxBundle:
    vocabulary = read_vocabulary(storage.join(folder, "vocabulary.json"), remedy=EXPORT_AGAIN)
    if vocabulary.fingerprint != config["vocabulary_fingerprint"]:
        raise UserError(f"the vocabulary in {folder} is not the one that was exported: {EXPORT_AGAIN}")
    view: dict[str, Any] = config["view"] | {name: tuple(config["view"][name]) for name in ("mean", "std")}
    return OnnxBundle(
        encoder=_open_session(folder, ENCODER, sha256=config["sha256"][ENCODER]),
        decoder=_open_session(folder, DECODER, sha256=config["sha256"][DECODER]),
        view=ViewSpec(**view),
        vocabulary=vocabulary,
        decoding=DecodingDefaults(**config["decoding"]),
        name=config["model"],
        grid=None if config["grid"] is None else tuple(config["grid"]),
        calibration=read_calibration(folder, model=config["model"], device=None, remedy=EXPORT_AGAIN),
    )


def _open_session(folder: str, file: str, *, sha256: str) -> "onnxruntime.InferenceSession":
    """The model in a file, for one thread of each caller. Raises UserError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{folder} needs onnxruntime ({error}): pip install onnxruntime") from error
    location = storage.join(folder, file)
    content = storage.read_required(location, remedy=EXPORT_AGAIN)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{location} is cut or changed (its sha256 differs): {EXPORT_AGAIN}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = file == ENCODER  # of the decoder's many shapes it would keep too much
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


# ---- search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beam:
    """A beginning of a caption: its tokens, `<end>` included, their log-probabilities and what they looked at.

    `row` is its row in the decoder's last state.
    """

    row: int
    tokens: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    attention: tuple[np.ndarray, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether its last token is `<end>`."""
        return self.tokens[-1:] == (END,)

    def rank(self, length_penalty: float) -> tuple[bool, float]:
        """What the best of an image's last beams has most of: see `captioner.model.decoding.beam_search`."""
        return self.has_ended, sum(self.scores) / len(self.scores) ** length_penalty


def beam_search(
    decoder: "onnxruntime.InferenceSession",
    images: Sequence[np.ndarray],
    *,
    beam_size: int,
    max_tokens: int,
    length_penalty: float,
    no_repeat_trigram: bool,
    with_attention: bool,
    earlier: Sequence[Sequence[GeneratedCaption]] | None = None,
) -> list[GeneratedCaption]:
    """The best caption of each of B images (`Encoded`): that of `captioner.model.decoding.decode`, up to rounding.

    With `earlier` captions of each image, and one beam, the caption differs from them, as in `diverse`.
    """
    image_B, *state = images
    others = [[[*caption.tokens, END] for caption in group] for group in earlier or [[]] * len(image_B)]
    num_candidates = beam_size + len(others[0]) if others else 0
    names = ["logits", "hidden_next", "cell_next"] + ["attention"] * with_attention
    beams: list[Beams] = [[Beam(row)] for row in range(len(image_B))]
    indices: list[int] = []
    image_N = image_B
    for step in range(max_tokens):
        alive = [(index, beam) for index, group in enumerate(beams) for beam in group if not beam.has_ended]
        if not alive:
            break
        if indices != [index for index, _ in alive]:
            indices = [index for index, _ in alive]
            image_N = image_B[indices]
        tokens_N = np.array([beam.tokens[-1] if step else START for _, beam in alive])
        hidden, cell = (array[[beam.row for _, beam in alive]] for array in state)
        feeds = {"tokens": tokens_N, "image": image_N, "hidden": hidden, "cell": cell}
        outputs: Any = decoder.run(names, feeds)
        logits_NV, state, attention_NR = outputs[0], outputs[1:3], outputs[3] if with_attention else None
        histories = [beam.tokens for _, beam in alive]
        scores_NS, words_NS = _likeliest(logits_NV, histories, num_candidates, no_repeat_trigram=no_repeat_trigram)
        candidates: list[Beams] = [[beam for beam in group if beam.has_ended] for group in beams]
        for row, (index, beam) in enumerate(alive):
            seen = beam.attention if attention_NR is None else (*beam.attention, attention_NR[row])
            for score, word in zip(scores_NS[row], words_NS[row], strict=True):
                if score > -np.inf:
                    candidates[index].append(Beam(row, (*beam.tokens, word), (*beam.scores, score), seen))
        beams = [
            heapq.nlargest(
                beam_size,
                group,
                key=lambda beam: sum(beam.scores) - _penalty(beam.tokens, given, max_tokens=max_tokens),
            )
            for group, given in zip(candidates, others, strict=True)
        ]
    return [_caption(max(group, key=lambda beam: beam.rank(length_penalty))) for group in beams]


def _likeliest(
    logits_NV: np.ndarray, histories: Sequence[tuple[int, ...]], num_tokens: int, *, no_repeat_trigram: bool
) -> tuple[list[list[float]], list[list[int]]]:
    """Log-probabilities and tokens (N, S) of the likeliest next tokens; forbidden ones are at minus infinity."""
    scores_NV = logits_NV - logits_NV.max(axis=1, keepdims=True)
    scores_NV -= np.log(np.exp(scores_NV).sum(axis=1, keepdims=True))
    scores_NV[:, FORBIDDEN if histories[0] else [*FORBIDDEN, END]] = -np.inf
    for row, tokens in enumerate(histories if no_repeat_trigram else ()):
        repeats = [
            third for *two, third in zip(tokens[:-2], tokens[1:-1], tokens[2:], strict=True) if two == [*tokens[-2:]]
        ]
        scores_NV[row, repeats] = -np.inf
    num_tokens = min(num_tokens, scores_NV.shape[1])
    words_NS = np.argpartition(scores_NV, -num_tokens, axis=1)[:, -num_tokens:]
    return np.take_along_axis(scores_NV, words_NS, axis=1).tolist(), words_NS.tolist()


def _penalty(tokens: tuple[int, ...], earlier: Sequence[Sequence[int]], *, max_tokens: int) -> float:
    """What the last token costs for each earlier caption (with `<end>`) that has it at the same step: see `diverse`."""
    step, total = len(tokens) - 1, 0.0
    for caption in earlier:
        if step < len(caption) and caption[step] == tokens[step]:
            is_copy = tuple(caption[:step]) == tokens[:step]
            ends = tokens[step] == END or len(tokens) == max_tokens
            total += COPY_PENALTY if is_copy and ends else DIVERSITY * (1 + step * is_copy)
    return total


def _caption(beam: Beam) -> GeneratedCaption:
    return GeneratedCaption(
        tokens=[token for token in beam.tokens if token != END],
        token_scores=list(beam.scores),
        attention=np.stack(beam.attention) if beam.attention else None,
    )
