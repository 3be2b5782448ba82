"""The model that a run starts from: a new one, or a trained one with new words; and its view of images.

Shapes: V known words (the special ones included), W new words, E embedding width, H hidden width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from captioner.errors import UserError
from captioner.flags import flag_name
from captioner.images.views import ViewSpec
from captioner.model.bundle import Bundle, load_bundle
from captioner.model.encoders import Encoder, check_crop, load_encoder_weights, preprocessing
from captioner.model.network import CaptionModel, ModelConfig, build_model
from captioner.streaming.dataset import Split
from captioner.vocabulary import SPECIAL_WORDS, Vocabulary
from train.barriers import raising_on_all_ranks
from train.data.folders import CaptionData, check_fits, read_view
from train.settings import NEW_MODEL, TrainSettings
from train.step.step import CaptionLoss


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """The words and the view of a run's model, and the model of `--init`, if any."""

    vocabulary: Vocabulary
    view: ViewSpec
    initial: Bundle | None


def choose_start(settings: TrainSettings, data: CaptionData) -> tuple[TrainSettings, StartingPoint]:
    """The settings with all flags filled in that describe the model, and the starting point.

    Raises UserError where flags, initial model and shards do not fit together.
    """
    initial = load_bundle(settings.init) if settings.init else None
    settings = complete(settings, initial)
    if settings.decoder == "attention" and settings.image_input == "every-step":
        raise UserError("--image-input every-step is of the vector decoder: add --decoder vector, or leave it out")
    vocabulary = initial.vocabulary.extended(data.vocabulary) if initial else data.vocabulary
    encoder = settings.model_config(len(vocabulary)).encoder
    view = choose_view(data.splits, encoder=encoder, crop=settings.crop, initial=initial)
    return replace(settings, crop=view.crop), StartingPoint(vocabulary=vocabulary, view=view, initial=initial)


def complete(settings: TrainSettings, initial: Bundle | None) -> TrainSettings:
    """The settings with the initial model's values, or NEW_MODEL's, where no flag describes the model.

    The weights of an initial model stay None. Raises UserError for a flag that does not fit the initial model.
    """
    if initial is None:
        own = NEW_MODEL
    elif settings.weights == "none":
        raise UserError("--weights none is a random encoder, and --init has a trained one: leave out one of them")
    else:
        own = {name: getattr(initial.model.config, name) for name in NEW_MODEL if name != "weights"}
        for name, value in own.items():
            given, flag = getattr(settings, name), flag_name(name)
            if given not in (None, value):
                raise UserError(f"{flag} is {given}, but the model of --init has {value}: leave out {flag} or --init")
    return replace(settings, **{name: value for name, value in own.items() if getattr(settings, name) is None})


def choose_view(splits: Sequence[Split], *, encoder: str, crop: int | None, initial: Bundle | None) -> ViewSpec:
    """The model's view of images: that of the initial model, or that which the encoder's weights were trained with.

    `crop` pixels instead of the encoder's own, where that is given. Raises UserError where the shards do not fit.
    """
    wanted = initial.view if initial else preprocessing(encoder)
    view = read_view(splits, crop=wanted.crop if crop is None else crop)
    view = replace(view, mean=wanted.mean, std=wanted.std)
    check_crop(initial.model.config.encoder if initial else encoder, crop=view.crop, size=view.size)
    if initial:
        check_fits(initial.view, view)
    return view


def make_loss_model(
    settings: TrainSettings, start: StartingPoint, *, weights: str | None, total_steps: int, accelerator: Accelerator
) -> CaptionLoss:
    """The model to train, with its loss: the initial one with new words, or a new one.

    All ranks must call it; one of a machine downloads the encoder's `weights` for all. None for `weights` keeps the
    initial encoder's. Raises UserError, also where the encoder cannot take images of the view's size.
    """
    config, trainable = settings.model_config(len(start.vocabulary)), settings.finetune_encoder_from_step is not None
    if weights == "none" and not trainable:
        raise UserError(
            "--weights none leaves the frozen encoder random: add --finetune-encoder-from-step 0, or give weights"
        )
    with raising_on_all_ranks():
        if start.initial is None:
            model = build_model(config, encoder_trainable=trainable)
        else:
            model = start_from(start.initial, config, encoder_trainable=trainable)
        _check_crop(model.encoder, name=config.encoder, crop=start.view.crop)
    for goes_first in (True, False):
        with raising_on_all_ranks():
            if weights is not None and goes_first == accelerator.is_local_main_process:
                load_encoder_weights(model.encoder, name=config.encoder, weights=weights)
    if settings.compile_encoder:
        model.encoder.backbone.compile()  # in place: its weights keep their names
    return CaptionLoss(
        model,
        view=start.view,
        label_smoothing=settings.label_smoothing,
        scheduled_sampling=settings.scheduled_sampling,
        total_steps=total_steps,
        thaw_step=settings.finetune_encoder_from_step or 0,
    )


@torch.no_grad()
def _check_crop(encoder: Encoder, *, name: str, crop: int) -> None:
    """Raise UserError where nothing is left of an image of `crop` pixels after the encoder's strides."""
    was_training = encoder.training
    try:
        encoder.eval()(torch.zeros(1, 3, crop, crop))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"encoder {name} cannot take images of {crop} pixels ({reason}): give a larger --crop"
        ) from error
    encoder.train(was_training)


def start_from(bundle: Bundle, config: ModelConfig, *, encoder_trainable: bool) -> CaptionModel:
    """A model with the bundle's weights, on the CPU; `config` may have more words, and another dropout.

    New words change no known word's logit, and are together never likelier than an average known word.
    """
    trained = bundle.model.state_dict()
    num_new = config.vocabulary_size - len(bundle.vocabulary)
    if num_new:
        trained |= _with_new_words(trained, num_new=num_new)
    model = build_model(config, encoder_trainable=encoder_trainable)
    model.load_state_dict(trained)
    return model


def _with_new_words(trained: Mapping[str, Tensor], *, num_new: int) -> dict[str, Tensor]:
    """The word rows of a state dict, followed by those of W new words.

    Embeddings are drawn from a normal distribution with the known ones' mean and deviation. Each new predictor is the
    mean of the known ones, which scores below the best known word in every state, minus log W: all new words together
    are no likelier than an average known one, since exp(mean) is at most mean(exp).
    """
    embed_VE, weight_VH, bias_V = (trained[name] for name in ("embed.weight", "predict.weight", "predict.bias"))
    known = slice(len(SPECIAL_WORDS), None)
    spread_E, middle_E = torch.std_mean(embed_VE[known], dim=0, correction=0)
    new_WE = middle_E + spread_E * torch.randn(num_new, len(middle_E), device=middle_E.device)
    new_WH = weight_VH[known].mean(dim=0).expand(num_new, -1)
    new_W = (bias_V[known].mean() - math.log(num_new)).expand(num_new)
    return {
        "embed.weight": torch.cat((embed_VE, new_WE)),
        "predict.weight": torch.cat((weight_VH, new_WH)),
        "predict.bias": torch.cat((bias_V, new_W)),
    }
