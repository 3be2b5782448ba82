"""What a run begins with: how pictures come to the model, and the model itself, new or with new words.

Shapes: V known words (the special ones included), W new words, E embedding width, H hidden width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from captioner.bundle import Bundle
from captioner.cli import UserError
from captioner.encoders import check_crop, load_encoder_weights, preprocessing
from captioner.model import CaptionModel, ModelConfig
from captioner.views import ViewSpec
from captioner.vocabulary import SPECIAL_WORDS, Vocabulary
from train.peers import in_main_of_each_machine_first
from train.settings import TrainSettings
from train.split import Split, check_fits, read_view


def choose_view(splits: Sequence[Split | None], *, encoder: str, crop: int | None, initial: Bundle | None) -> ViewSpec:
    """How pictures come to the model: as the initial one is used to, or as the encoder's weights want it.

    `crop` pixels instead of the encoder's own, where that is given. Raises UserError where the shards do not fit.
    """
    wanted = initial.view if initial else preprocessing(encoder)
    view = read_view([split for split in splits if split], crop=wanted.crop if crop is None else crop)
    view = replace(view, mean=wanted.mean, std=wanted.std)
    check_crop(initial.model.config.encoder if initial else encoder, crop=view.crop, size=view.size)
    if initial:
        check_fits(initial.view, view)
    return view


def make_model(
    config: ModelConfig,
    vocabulary: Vocabulary,
    initial: Bundle | None,
    *,
    weights: str,
    trainable: bool,
    compiled: bool,
) -> CaptionModel:
    """A model that is the initial one with new words, or new behind an encoder with `weights`.

    One process of a machine downloads these for all. Raises UserError.
    """
    if initial is None:
        model = _new_model(config, weights=weights, trainable=trainable)
    else:
        model = _grown_model(config, vocabulary, initial, trainable=trainable)
        if weights != "default":  # others are asked for, or a resumed run has kept its own
            load_encoder_weights(model.encoder, name=model.config.encoder, weights=weights)
    if compiled:
        model.encoder.backbone.compile()  # in place: its weights keep their names
    return model


def _new_model(config: ModelConfig, *, weights: str, trainable: bool) -> CaptionModel:
    if weights == "none" and not trainable:
        raise UserError(
            "--weights none leaves the frozen encoder random: add --finetune-encoder-from-step 0, or give weights"
        )
    model = CaptionModel(config, encoder_trainable=trainable)
    in_main_of_each_machine_first(lambda: load_encoder_weights(model.encoder, name=config.encoder, weights=weights))
    return model


def _grown_model(config: ModelConfig, vocabulary: Vocabulary, initial: Bundle, *, trainable: bool) -> CaptionModel:
    for name in ("encoder", "embedding_size", "hidden_size", "image_input"):
        wanted, own = getattr(config, name), getattr(initial.model.config, name)
        if wanted not in (own, getattr(TrainSettings, name)):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {wanted}, but the model of --init has {own}: leave out --{flag} or --init")
    model = start_from(initial, vocabulary=vocabulary, encoder_trainable=trainable)
    model.config = replace(model.config, input_dropout=config.input_dropout, dropout=config.dropout)
    model.drop_input.p, model.drop.p = config.input_dropout, config.dropout
    return model


def start_from(bundle: Bundle, *, vocabulary: Vocabulary, encoder_trainable: bool) -> CaptionModel:
    """A copy of the bundle's model, on the CPU, with a row for each word of `vocabulary`, which extends the bundle's.

    New words change no known word's logit, and are together never likelier than an average known word.
    """
    num_known = len(bundle.vocabulary)
    assert vocabulary.words[:num_known] == bundle.vocabulary.words
    trained = bundle.model.state_dict()
    if len(vocabulary) > num_known:
        trained |= _with_new_words(trained, num_new=len(vocabulary) - num_known)
    config = replace(bundle.model.config, vocabulary_size=len(vocabulary))
    model = CaptionModel(config, encoder_trainable=encoder_trainable)
    model.load_state_dict(trained)
    return model


def _with_new_words(trained: Mapping[str, Tensor], *, num_new: int) -> dict[str, Tensor]:
    """The word rows of a state dict, followed by those of W new words.

    Embeddings are drawn at random among the known ones. The mean of the known predictors scores below the best known
    word in every state, and less log W it makes all new words together no likelier than an average known one, since
    exp(mean) is at most mean(exp).
    """
    embed_VE, weight_VH, bias_V = (trained[name] for name in ("embed.weight", "predict.weight", "predict.bias"))
    said = slice(len(SPECIAL_WORDS), None)
    spread_E, middle_E = torch.std_mean(embed_VE[said], dim=0, correction=0)
    new_WE = middle_E + spread_E * torch.randn(num_new, len(middle_E), device=middle_E.device)
    new_WH = weight_VH[said].mean(dim=0).expand(num_new, -1)
    new_W = (bias_V[said].mean() - math.log(num_new)).expand(num_new)
    return {
        "embed.weight": torch.cat((embed_VE, new_WE)),
        "predict.weight": torch.cat((weight_VH, new_WH)),
        "predict.bias": torch.cat((bias_V, new_W)),
    }
