"""A residual multilayer perceptron for vectors."""

from collections.abc import Sequence

from torch import Tensor, nn

from perrin.networks.checks import require_input, require_positive, require_share
from perrin.networks.embeddings import Conditioning, FourierFeatures
from perrin.networks.layers import ResidualBlock, output_layers


class MLP(nn.Module):
    """The network (x, t, y) → (B, D), or (B, 2D) with ``learn_sigma``: the mean part, then the variance.

    dim: D of the vectors.
    width: width of the hidden layers, and of the embedding of time and class.
    depth: number of residual blocks, of two linear layers each.
    learn_sigma: whether there is a variance part.
    num_classes: number of classes of a conditional network, whose `forward` then needs ``y``.
    dropout: share of activations dropped in training.
    fourier: the n of the input Fourier features, see `FourierFeatures`.
    out_dim: length of the output where it is neither D nor 2D.

    The output starts at zero. Raises `ArgumentError` for a value outside its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 256,
        depth: int = 4,
        learn_sigma: bool = False,
        num_classes: int | None = None,
        dropout: float = 0.0,
        fourier: Sequence[int] = (),
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        require_positive(dim=dim, width=width, depth=depth, num_classes=num_classes, out_dim=out_dim)
        require_share(dropout=dropout)
        self.dim, self.num_classes = dim, num_classes
        self.features = FourierFeatures(fourier)
        self.conditioning = Conditioning(width, width, num_classes)
        self.enter = nn.Linear(self.features.channels(dim), width)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, width, width, dropout=dropout, layer=nn.Linear) for _ in range(depth)
        )
        self.exit = output_layers(width, out_dim or (2 * dim if learn_sigma else dim), layer=nn.Linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, D or 2D) in the precision of ``x`` (B, D), for times ``t`` (B,) and classes ``y`` (B,).

        Computed in the precision of the weights; raises as `UNet.forward` does.
        """
        require_input(x, self.dim, ())
        embedding = self.conditioning(t, y, len(x))  # (B, width)
        h = self.enter(self.features(x).to(embedding.dtype))
        for block in self.blocks:
            h = block(h, embedding)
        out: Tensor = self.exit(h)
        return out.to(x.dtype)
