"""Self-attention over the positions of an image."""

from torch import Tensor, nn
from torch.nn import functional as F

from perrin.errors import ArgumentError
from perrin.networks.layers import GroupNorm, zeroed


class SelfAttention(nn.Module):
    """``x + project(attention(norm(x)))``: every position of (B, C, H, W) looks at every other.

    Heads share the channels evenly; the projection starts at zero.
    Source: arXiv:1706.03762 eq. 1, in its place in DDPM, arXiv:2006.11239 appendix B.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        if channels % num_heads:
            raise ArgumentError(
                f"num_heads must divide the {channels} channels of an attention layer, got {num_heads}"
            )
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.project = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        query, key, value = (
            self.query_key_value(tokens)
            .unflatten(2, (3, self.num_heads, -1))  # (B, HW, 3, heads, C / heads)
            .permute(2, 0, 3, 1, 4)  # (3, B, heads, HW, C / heads)
        )
        h = F.scaled_dot_product_attention(query, key, value)
        h = self.project(h.transpose(1, 2).flatten(2))  # (B, HW, C)
        out: Tensor = x + h.transpose(1, 2).reshape(x.shape)
        return out
