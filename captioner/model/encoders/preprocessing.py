"""The images that an encoder takes: their size and normalisation, and the errors of a size that does not fit."""

from dataclasses import dataclass

from captioner.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What an encoder's weights were trained with: the crop's side in pixels, and mean and std of RGB in 0..1.

    An encoder of `fixed_crop` takes no other crops.
    """

    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fixed_crop: bool = False


class FixedCropError(UserError):
    """The encoder takes crops of `needed` pixels only, not of `crop`."""

    def __init__(self, encoder: str, crop: int, needed: int) -> None:
        super().__init__(encoder, crop, needed)
        self.encoder, self.crop, self.needed = encoder, crop, needed

    def __str__(self) -> str:
        return f"encoder {self.encoder} takes crops of {self.needed} pixels only, not of {self.crop}"


class SmallImagesError(UserError):
    """Stored images of `size` pixels are smaller than the encoder's crops of `crop` pixels.

    `packed_size` has room for crops at random positions: 256 for 224.
    """

    def __init__(self, encoder: str, crop: int, size: int) -> None:
        super().__init__(encoder, crop, size)
        self.encoder, self.crop, self.size = encoder, crop, size
        self.packed_size = -(-crop * 8 // 7)

    def __str__(self) -> str:
        return f"the shards hold images of {self.size} pixels, and encoder {self.encoder} takes crops of {self.crop}"
