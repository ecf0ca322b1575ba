"""Small networks of the bundled workloads."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

from expunge.problems._foreign import need


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


class DigitsCNN(nn.Module):
    """Two convolutions and two linear layers for 8×8 images; 64 features before the last one."""

    def __init__(self, classes: int = 10) -> None:
        """Build it untrained (38,282 weights)."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, 2, padding=1)
        self.hidden = nn.Linear(32 * 16, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, 8, 8] to logits [B, classes]."""
        x = relu(self.conv2(relu(self.conv1(x)))).flatten(1)
        return self.head(relu(self.hidden(x)))


class ConvRegressor(nn.Module):
    """Blocks of convolution, batch norm and ReLU, a global average, and one linear output."""

    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 32, 32),
        strides: tuple[int, ...] = (1, 2, 1, 2),
    ) -> None:
        """Build it untrained; a block of stride 2 halves the image."""
        super().__init__()
        sizes = [1, *channels]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride, 1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )
            for (i, o), stride in zip(itertools.pairwise(sizes), strides, strict=True)
        )
        self.head = nn.Linear(sizes[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, H, W] to predictions [B, 1]."""
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Factorisation(nn.Module):
    """A rating as a mean, a bias of user and of item, and the product of their factors."""

    def __init__(self, users: int, items: int, factors: int = 16, mean: float = 3.5) -> None:
        """Build it untrained, with factors of standard deviation 0.1."""
        super().__init__()
        self.user = nn.Embedding(users, factors + 1)
        self.item = nn.Embedding(items, factors + 1)
        self.mean = nn.Parameter(torch.tensor([mean]))
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map pairs (user, item) [B, 2] to ratings [B]."""
        user, item = self.user(x[:, 0]), self.item(x[:, 1])
        return self.mean + user[:, -1] + item[:, -1] + (user[:, :-1] * item[:, :-1]).sum(1)


def diabetes_mlp() -> nn.Module:
    """Build the perceptron of the diabetes workload: 10-64-32-1."""
    return nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
    )


def small_llama(
    vocabulary: int, width: int, blocks: int, inner: int, *, context: int, tied: bool = False
) -> nn.Module:
    """Build an untrained Llama with four heads.

    Args:
        vocabulary: number of tokens; 0 is padding, 1 and 2 begin and end a text.
        width: hidden size.
        blocks: number of them.
        inner: width within the blocks.
        context: longest sequence.
        tied: whether input and output embeddings are one.
    """
    need("transformers", "llm")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=blocks, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=context, tie_word_embeddings=tied,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")
