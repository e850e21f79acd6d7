"""What the simplest model reaches, to read a likelihood by."""

from __future__ import annotations

import numpy as np


def histogram_bpd(train: np.ndarray, held_out: np.ndarray, levels: int) -> tuple[float, float]:
    """Bits per dimension of ``held_out`` under one histogram per position, and the standard error.

    Both are (N, ...) level indices below ``levels``. The histograms are counted on ``train``, with one more
    count in every bin (Laplace's rule), so that no level is impossible; positions are taken as independent.
    """
    rows, tests = train.reshape(len(train), -1), held_out.reshape(len(held_out), -1)
    positions = np.arange(rows.shape[1])
    counts = np.ones((rows.shape[1], levels))
    np.add.at(counts, (np.broadcast_to(positions, rows.shape), rows), 1)
    bits = np.log2(len(train) + levels) - np.log2(counts)
    bpd = bits[positions, tests].mean(1)  # (N,)
    return float(bpd.mean()), float(bpd.std(ddof=1) / np.sqrt(len(bpd))) if len(bpd) > 1 else float("nan")
