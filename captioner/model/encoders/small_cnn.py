"""`small_cnn`, the encoder of our own."""

from torch import Tensor, nn

NAME = "small_cnn"


def small_cnn(*, grid: bool = False) -> nn.Sequential:
    """Five 3x3 convolutions and max pooling: learns small images from scratch in minutes on a CPU.

    For a grid the last convolution has stride 1, so that a position is 8 pixels wide, not 16. It has no pretrained
    weights. torchvision's models learn far more slowly there: see docs/decisions.
    """
    widths_and_strides = ((32, 2), (64, 2), (64, 1), (128, 2), (256, 1 if grid else 2))
    layers: list[nn.Module] = []
    width_before = 3  # red, green, blue
    for width, stride in widths_and_strides:
        convolution = nn.Conv2d(width_before, width, kernel_size=3, stride=stride, padding=1, bias=False)
        layers += (convolution, nn.BatchNorm2d(width), nn.ReLU())
        width_before = width
    return nn.Sequential(*layers, MaxPool(), nn.Flatten(), nn.Linear(width_before, 1000))


class MaxPool(nn.Module):
    """Each channel's largest value: (B, C, H, W) to (B, C, 1, 1).

    `nn.AdaptiveMaxPool2d(1)` is the same, but torch 2.11 cannot export it to ONNX, and on CUDA its gradient is not the
    same in each run.
    """

    def forward(self, values_BCHW: Tensor) -> Tensor:
        """The values (B, C, 1, 1)."""
        return values_BCHW.amax(dim=(2, 3), keepdim=True)
