"""Densities fitted to reference examples: a Gaussian of few features, and a mixture of Gaussians of many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from perrin.randomness import generator_for

SMALLEST_SPREAD = 1e-2
"""Standard deviation below which a feature is not standardised further: it may be constant in the reference."""
RIDGE = 1e-9
"""Variance added to each coordinate: reference examples may all be the same."""
MOST_AXES = 150
"""Principal axes of a mixture: on turned MNIST digits 80 lose 0.01 of the AUROC, 250 gain nothing."""
EXAMPLES_PER_AXIS = 4
"""Reference examples for each axis, where they are too few for all: a covariance needs more examples than axes."""
CLUSTER_SIZE = 300
"""Reference examples for each cluster, on average."""
SHARED_EXAMPLES = 200
"""Examples for which the shared covariance counts in that of a cluster."""
PARTITIONS = 4
"""Of the examples into clusters, each counted alike: one alone gives an AUROC that varies by 0.002 with its start."""
ROUNDS = 15
"""Of k-means, which hardly moves after them."""


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian of features, its correlations shrunk."""

    mean: Tensor
    """(F,)"""
    spread: Tensor
    """(F,): standard deviations, of at least `SMALLEST_SPREAD`."""
    root: Tensor
    """(F, F): the Cholesky factor of the shrunk correlations."""
    shrinkage: float
    """How far the correlations were drawn towards none, 0 to 1."""

    @classmethod
    def fit(cls, features: Tensor) -> Gaussian:
        """The Gaussian of ``features`` (n, F)."""
        mean, spread = features.mean(0), features.std(0).clamp(min=SMALLEST_SPREAD)
        covariance, shrinkage = shrunk_covariance((features - mean) / spread)
        ridge = RIDGE * torch.eye(len(covariance), dtype=covariance.dtype)
        return cls(mean, spread, torch.linalg.cholesky(covariance + ridge), shrinkage)

    def standardised(self, features: Tensor) -> Tensor:
        """``features`` (B, F) in standard deviations from the mean."""
        return (features - self.mean) / self.spread

    def distance(self, features: Tensor) -> Tensor:
        """The squared Mahalanobis distance per feature of (B, F), (B,): 1 on average where the fit is right."""
        whitened = torch.linalg.solve_triangular(self.root, self.standardised(features).T, upper=False)
        return torch.as_tensor(whitened).square().mean(0)


@dataclass(frozen=True)
class Mixture:
    """A Gaussian for each cluster of a few partitions of the examples.

    In coordinates where the covariance within clusters is 1.
    """

    mean: Tensor
    """(F,)"""
    axes: Tensor
    """(F, Q): from features less the mean to the coordinates."""
    centres: Tensor
    """(K, Q)"""
    roots: Tensor
    """(K, Q, Q): the Cholesky factors of the clusters' covariances."""
    shares: Tensor
    """(K,): of the examples in each cluster, 1 together."""

    @classmethod
    def fit(cls, features: Tensor) -> Mixture:
        """The mixture of ``features`` (n, F), in each partition one cluster for each `CLUSTER_SIZE` of them.

        The clusters are those of k-means along the principal axes; the covariance of each is its own, drawn to the
        one within all clusters as if `SHARED_EXAMPLES` more examples had that.
        """
        mean, size = features.mean(0), min(MOST_AXES, len(features) // EXAMPLES_PER_AXIS)
        axes = torch.linalg.eigh((features - mean).T @ (features - mean)).eigenvectors[:, -size:]
        found, count = (features - mean) @ axes, max(1, len(features) // CLUSTER_SIZE)
        members = torch.cat([clusters(found, count, seed) for seed in range(PARTITIONS)], 1)
        within = torch.stack([_scatter(found[column]) for column in members.T]).sum(0) / members.sum()
        root = torch.linalg.cholesky(within + RIDGE * torch.eye(len(within), dtype=within.dtype))
        axes = torch.linalg.solve_triangular(root, axes.T, upper=False).T
        found = (features - mean) @ axes
        centres = torch.stack([found[column].mean(0) for column in members.T])
        roots = torch.stack([_root(found[column]) for column in members.T])
        return cls(mean, axes, centres, roots, members.sum(0) / members.sum())

    def distance(self, features: Tensor) -> Tensor:
        """-2 log of the density of (B, F) per coordinate, (B,), without the log of 2 pi.

        With one cluster the squared Mahalanobis distance per coordinate, up to what is the same for all.
        """
        found, terms = (features - self.mean) @ self.axes, []
        for centre, root, share in zip(self.centres, self.roots, self.shares, strict=True):
            away = torch.linalg.solve_triangular(root, (found - centre).T, upper=False)
            terms.append(share.log() - root.diagonal().log().sum() - away.square().sum(0) / 2)
        return -2 * torch.stack(terms).logsumexp(0) / found.shape[1]


def _scatter(found: Tensor) -> Tensor:
    away = found - found.mean(0)
    return away.T @ away


def _root(found: Tensor) -> Tensor:
    """The Cholesky factor of the covariance of ``found`` (n, Q), drawn to 1."""
    shared = SHARED_EXAMPLES * torch.eye(found.shape[1], dtype=found.dtype)
    covariance = (_scatter(found) + shared) / (len(found) + SHARED_EXAMPLES)
    return torch.as_tensor(torch.linalg.cholesky(covariance))


def clusters(found: Tensor, count: int, seed: int) -> Tensor:
    """Which of at most ``count`` clusters each of ``found`` (n, Q) is in by k-means (Lloyd), (n, K) bool.

    It starts at examples that ``seed`` chooses; clusters that become empty are left out.
    """
    order = torch.randperm(len(found), generator=generator_for("cpu", "k-means", seed))
    centres = found[order[:count]]
    for _ in range(ROUNDS):
        members = one_hot(torch.cdist(found, centres).argmin(1), len(centres))
        members = members[:, members.any(0)]
        centres = members.to(found.dtype).T @ found / members.sum(0)[:, None]
    return members.bool()


def shrunk_covariance(centred: Tensor) -> tuple[Tensor, float]:
    """The covariance (F, F) of ``centred`` (n, F), mixed with a multiple of the identity, and the share of that.

    Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004), lemma 3.2 to
    3.4: the share that is best in the mean square is itself estimated.
    """
    count, size = centred.shape
    sample = centred.T @ centred / count
    level = sample.trace() / size
    away = (sample - level * torch.eye(size, dtype=sample.dtype)).square().sum()
    noise = (centred.square().sum(1).square().mean() - sample.square().sum()) / count
    share = float((noise / away).clamp(0, 1)) if away > 0 else 1.0
    return (1 - share) * sample + share * level * torch.eye(size, dtype=sample.dtype), share
