"""Networks that predict what a `GaussianDiffusion` asks for: any callable ``(x, t, y)`` would do as well."""

from perrin.networks.embeddings import NO_CLASS, timestep_embedding
from perrin.networks.encoder import Encoder
from perrin.networks.mlp import MLP
from perrin.networks.posterior import LevelPosterior
from perrin.networks.unet import UNet

__all__ = ["MLP", "NO_CLASS", "Encoder", "LevelPosterior", "UNet", "timestep_embedding"]
