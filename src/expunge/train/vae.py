r"""A small variational autoencoder of feature vectors.

Encoder d → 128 → 32 → \((\mu, \log\sigma^2)\), \(z = \mu + \sigma\varepsilon\), decoder latent → 32 → 128 → d, ReLU
between the layers. The noise \(\varepsilon\) is an argument, so that whoever calls decides where it comes from.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Decoder = Literal["sigmoid", "linear"]


class VAE(nn.Module):
    """Reconstructs feature vectors from a normal latent of a few dimensions."""

    def __init__(self, size: int, latent: int, decoder: Decoder = "sigmoid") -> None:
        """Build it untrained.

        Args:
            size: d of the features.
            latent: dimensions of z.
            decoder: output between 0 and 1, or without bounds.
        """
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        self.mean, self.spread = nn.Linear(32, latent), nn.Linear(32, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, size),
            nn.Sigmoid() if decoder == "sigmoid" else nn.Identity(),
        )  # fmt: skip

    def forward(self, e: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Reconstruct features.

        Args:
            e: features [n, d].
            noise: \(\varepsilon\) [n, latent].

        Returns:
            The reconstruction [n, d], and \(\mu\) and \(\log\sigma^2\) [n, latent].
        """
        hidden = self.encoder(e)
        mean, log_variance = self.mean(hidden), self.spread(hidden)
        z = mean + (log_variance / 2).exp() * noise
        return self.decoder(z), mean, log_variance

    def errors(self, e: Tensor, noise: Tensor) -> Tensor:
        r"""Squared errors \(\|\hat e - e\|^2\) [n]; their gradient goes through input and target."""
        return (self(e, noise)[0] - e).square().sum(1)


def vae_loss(vae: nn.Module, e: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Squared error plus weighted divergence from a standard normal, both means over the batch."""
    reconstruction, mean, log_variance = vae(e, noise)
    return (reconstruction - e).square().sum() / len(e) + kl_weight * kl(mean, log_variance)


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""\(-\tfrac12 \sum [\log(\sigma^2 + 10^{-8}) + 1 - \mu^2 - \sigma^2] / n\), in nats a sample."""
    variance = log_variance.exp()
    terms = torch.log(variance + 1e-8) + 1 - mean.square() - variance
    return -terms.sum() / (2 * len(mean))
