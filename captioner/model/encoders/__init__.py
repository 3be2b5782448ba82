"""Image encoders: classification models of torchvision and timm by name, without their classifier."""

from captioner.model.encoders.encoder import Encoder, check_crop, preprocessing
from captioner.model.encoders.preprocessing import FixedCropError, Preprocessing, SmallImagesError
from captioner.model.encoders.weights import WeightsError, load_encoder_weights

__all__ = [
    "Encoder",
    "FixedCropError",
    "Preprocessing",
    "SmallImagesError",
    "WeightsError",
    "check_crop",
    "load_encoder_weights",
    "preprocessing",
]
