"""A random model that says different things of different pictures, without training."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from tiny import picture
from torch import Tensor, nn

from captioner.images.views import ViewSpec, normalise
from captioner.model.bundle import Bundle, DecodingDefaults, save_bundle
from captioner.model.captions import PackedCaptions
from captioner.model.decoding import GeneratedCaption, decode
from captioner.model.network import AttentionModel, CaptionModel, ModelConfig, build_model
from captioner.vocabulary import START, Vocabulary

Form = Literal["first", "every-step", "attention"]
FORMS: tuple[Form, ...] = get_args(Form)
"""All kinds of decoders: the vector as first input, the vector at every step, and attention."""

VIEW = ViewSpec(size=40, crop=32)
DECODING = DecodingDefaults(beam_size=2, max_tokens=7)
WORDS = ["a", "man", "dog", "cat", "rides", "sits", "on", "red", "bicycle", "table", "near", "sea"]
VOCABULARY = Vocabulary.from_counts(dict.fromkeys(WORDS, 9), threshold=1)


def make_views(num_views: int) -> np.ndarray:
    """Views (B, P, P, 3), uint8."""
    return np.stack(
        [
            np.asarray(picture(seed).resize((40, 40), Image.Resampling.LANCZOS).crop((4, 4, 36, 36)))
            for seed in range(num_views)
        ]
    )


def form_options(form: Form) -> dict[str, Any]:
    """The fields of ModelConfig that make a model of this form."""
    return {"decoder": "attention"} if form == "attention" else {"decoder": "vector", "image_input": form}


def attend(model: AttentionModel, hidden_H: Tensor, image_RH: Tensor) -> Tensor:
    """What a hidden state sees of an image's positions (H), one head after the other."""
    attention = model.attention
    parts = [
        layer.chunk(attention.num_heads, dim=-1)
        for layer in (attention.query(hidden_H), attention.key(image_RH), attention.value(image_RH))
    ]
    seen = []
    for query, keys, values in zip(*parts, strict=True):
        weights_R = (keys @ query / len(query) ** 0.5).exp()
        seen.append((weights_R / weights_R.sum()) @ values)
    return torch.cat(seen)


def make_model(form: Form = "first") -> CaptionModel:
    """A model with large weights, and statistics of pictures like these."""
    torch.manual_seed(3)
    config = ModelConfig(
        encoder="small_cnn", vocabulary_size=len(VOCABULARY), embedding_size=8, hidden_size=9, **form_options(form)
    )
    model = build_model(config)
    with torch.no_grad():
        for parameter in (model.norm.weight, model.predict.weight):
            parameter.mul_(8)
    set_statistics(model, normalise(torch.from_numpy(make_views(8)), VIEW))
    return model.eval()


@torch.no_grad()
def set_statistics(model: CaptionModel, images: Tensor) -> None:
    """Give batch norm the statistics of these normalised images, under which they differ; attention has none."""
    if isinstance(model.norm, nn.BatchNorm1d):
        model.norm.momentum = 1.0
        model.norm.train()
        model.encode(images)


def caption_views(bundle: Bundle, views_BPP3: np.ndarray, **changed: Any) -> list[GeneratedCaption]:
    """Captions of views (B, P, P, 3), uint8, decoded as the model folder says but for what is changed."""
    decoding = replace(bundle.decoding, **changed)
    with torch.inference_mode():
        image_BE = bundle.model.encode(normalise(torch.from_numpy(views_BPP3), bundle.view))
        return decode(bundle.model, image_BE, **asdict(decoding))


def write_model(folder: Path, form: Form = "first", **options: Any) -> Path:
    """A model folder of it, which is returned."""
    model = make_model(form)
    save_bundle(folder, model=model, view=VIEW, vocabulary=VOCABULARY, decoding=DECODING, metrics={}, **options)
    return folder


def advance(bundle: Bundle, views_BPP3: np.ndarray, captions: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What the tokens of each view's caption look at (T, R), one view and one step after the other."""
    found = []
    with torch.inference_mode():
        for view, caption in zip(torch.from_numpy(views_BPP3), captions, strict=True):
            state = bundle.model.start(
                bundle.model.encode(normalise(view[None], bundle.view)), torch.zeros(1, dtype=torch.long), 1
            )
            steps = []
            for token in (START, *caption[:-1]):
                _, state, attention_NR = bundle.model.advance(torch.tensor([token]), state)
                assert attention_NR is not None
                steps.append(attention_NR[0].numpy())
            found.append(np.stack(steps))
    return found


def pack(captions_of_images: Sequence[Sequence[Sequence[int]]], *, max_tokens: int) -> PackedCaptions:
    """The captions (token ids) of each image, packed."""
    captions = list(chain.from_iterable(captions_of_images))
    tokens, lengths = list(chain.from_iterable(captions)), list(map(len, captions))
    return PackedCaptions.pack(tokens, lengths, list(map(len, captions_of_images)), max_tokens=max_tokens)


def logits(model: CaptionModel, images: Tensor, captions: PackedCaptions) -> Tensor:
    """The logits (M, V) of normalised images for `captions.targets_M`."""
    return model.predict(model.hidden(model.encode(images), captions))
