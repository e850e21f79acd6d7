"""Which model compressed a file: a hash over all that determines the distributions."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import nn

from perrin.diffusion import GaussianDiffusion


def model_hash(chain: GaussianDiffusion, network: nn.Module) -> str:
    """A digest of the weights, the chain's tables to ten digits, how outputs are read, and the levels."""
    digest = blake2b(digest_size=16)
    kinds = chain.model_mean_type.name, repr(chain.variance), chain.rescale_timesteps
    digest.update(repr((kinds, chain.levels, chain.original_num_timesteps)).encode())
    for name, table in sorted(chain.floats.items()):
        digest.update(f"{name}: {' '.join(f'{value:.9e}' for value in table)}\n".encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}: {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
