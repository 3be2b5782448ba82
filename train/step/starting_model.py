"""What a run begins with: how pictures come to the model, and the model itself, new or with new words.

Shapes: V known words (the special ones included), W new words, E embedding width, H hidden width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from captioner.errors import UserError
from captioner.images.views import ViewSpec
from captioner.model.bundle import Bundle, load_bundle
from captioner.model.encoders import Encoder, check_crop, load_encoder_weights, preprocessing
from captioner.model.network import CaptionModel, ModelConfig
from captioner.streaming.dataset import Split
from captioner.vocabulary import SPECIAL_WORDS, Vocabulary
from train.data.split import check_fits, read_view
from train.settings import NEW_MODEL, TrainSettings
from train.uneven import refused_together


def choose_model(
    settings: TrainSettings, words: Vocabulary, *, splits: Sequence[Split | None]
) -> tuple[TrainSettings, Bundle | None, Vocabulary, ViewSpec]:
    """The settings with all that describes the model filled in, the initial model, the words, and how it sees pictures.

    Raises UserError where flags, initial model and shards do not fit together.
    """
    initial = load_bundle(settings.init) if settings.init else None
    settings = complete(settings, initial)
    vocabulary = initial.vocabulary.extended(words) if initial else words
    encoder = settings.model_config(len(vocabulary)).encoder
    view = choose_view(splits, encoder=encoder, crop=settings.crop, initial=initial)
    return replace(settings, crop=view.crop), initial, vocabulary, view


def complete(settings: TrainSettings, initial: Bundle | None) -> TrainSettings:
    """The settings with what describes the model filled in where no flag gives it: as the initial model, or NEW_MODEL.

    The weights of an initial model stay None. Raises UserError for a flag that asks for another model than that.
    """
    if initial is None:
        own = NEW_MODEL
    else:
        own = {name: getattr(initial.model.config, name) for name in NEW_MODEL if name != "weights"}
        _check_asked(settings, own)
    return replace(settings, **{name: value for name, value in own.items() if getattr(settings, name) is None})


def _check_asked(settings: TrainSettings, own: Mapping[str, object]) -> None:
    """Raise UserError for a flag that an initial model with these figures of its `own` does not fit."""
    for name, value in own.items():
        asked, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        if asked not in (None, value):
            raise UserError(f"{flag} is {asked}, but the model of --init has {value}: leave out {flag} or --init")
    if settings.weights == "none":
        raise UserError("--weights none is a random encoder, and --init brings a trained one: leave out one of them")


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
    weights: str | None,
    trainable: bool,
    crop: int,
    compiled: bool,
    accelerator: Accelerator,
) -> CaptionModel:
    """A model that is the initial one with new words, or new; None for `weights` is what the initial encoder has.

    All processes must call it; one of a machine downloads the weights for all. Raises UserError, also where the
    encoder cannot see pictures of `crop` pixels.
    """
    with refused_together():
        if initial is not None:
            model = _grown_model(config, vocabulary, initial, trainable=trainable)
        else:
            model = _new_model(config, weights=weights, trainable=trainable)
    for goes_first in (True, False):
        with refused_together():
            if weights is not None and goes_first == accelerator.is_local_main_process:
                load_encoder_weights(model.encoder, name=config.encoder, weights=weights)
    with refused_together():
        _check_sees(model.encoder, name=config.encoder, crop=crop)
    if compiled:
        model.encoder.backbone.compile()  # in place: its weights keep their names
    return model


def _new_model(config: ModelConfig, *, weights: str | None, trainable: bool) -> CaptionModel:
    if weights == "none" and not trainable:
        raise UserError(
            "--weights none leaves the frozen encoder random: add --finetune-encoder-from-step 0, or give weights"
        )
    return CaptionModel(config, encoder_trainable=trainable)


def _grown_model(config: ModelConfig, vocabulary: Vocabulary, initial: Bundle, *, trainable: bool) -> CaptionModel:
    model = start_from(initial, vocabulary=vocabulary, encoder_trainable=trainable)
    model.config = replace(model.config, input_dropout=config.input_dropout, dropout=config.dropout)
    model.drop_input.p, model.drop.p = config.input_dropout, config.dropout
    return model


@torch.no_grad()
def _check_sees(encoder: Encoder, *, name: str, crop: int) -> None:
    """Raise UserError where nothing is left of a picture of `crop` pixels behind the encoder's strides."""
    was_training = encoder.training
    try:
        encoder.eval()(torch.zeros(1, 3, crop, crop))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"encoder {name} cannot see pictures of {crop} pixels ({reason}): give a larger --crop"
        ) from error
    encoder.train(was_training)


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
