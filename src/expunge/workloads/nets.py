"""Small networks of the bundled workloads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu


class Block(nn.Module):
    """A residual block: two 3×3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H/stride, W/stride]."""
        y = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small grey images: a stem, three blocks, a linear layer.

    The stem halves the image, which keeps a training within seconds on one core.
    """

    def __init__(self, classes: int = 10, width: int = 12) -> None:
        """Build it untrained; channels are width, 2·width and 4·width."""
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block1 = Block(width, width, 1)
        self.block2 = Block(width, 2 * width, 2)
        self.block3 = Block(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, H, W] to logits [B, classes]."""
        x = relu(self.norm(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(adaptive_avg_pool2d(x, 1).flatten(1))


def small_resnet() -> nn.Module:
    """Build the network of the MNIST workloads (43,990 weights)."""
    return SmallResNet()


def digits_mlp() -> nn.Module:
    """Build the perceptron of the digits workload: 64-128-64-10."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
