"""Pictures of training, and the baseline beside it."""

import numpy as np
import pytest
from PIL import Image

from perrin.evaluation.baseline import histogram_bpd
from perrin.evaluation.plots import plot_training

LOSSES = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
MEASURED = [
    {"step": 2, "held_out_bpd": 4.0, "held_out_bpd_se": 0.1},
    {"step": 3, "held_out_bpd": 3.0, "held_out_bpd_se": None},
]


def panels(rows, path, monkeypatch):
    """What is drawn: the texts of each panel, the scale and the points."""
    from matplotlib.figure import Figure

    figures = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))
    )
    plot_training(rows, path)
    return figures[0].axes


def test_a_mean_over_few_steps_is_left_out(tmp_path, monkeypatch):
    rows = [{"step": 50, "steps": 50, "loss": 3.0}, {"step": 100, "steps": 50, "loss": 2.0}]
    (loss,) = panels([*rows, {"step": 103, "steps": 3, "loss": 9.0}], tmp_path / "loss.png", monkeypatch)
    assert loss.lines[0].get_xydata().tolist() == [[50, 3], [100, 2]]


def test_both_curves_are_drawn_with_their_units(tmp_path, monkeypatch):
    loss, held_out = panels([*LOSSES, *MEASURED], tmp_path / "loss.png", monkeypatch)
    assert (loss.get_xlabel(), loss.get_ylabel(), loss.get_yscale()) == (
        "optimizer step",
        "training loss",
        "log",
    )
    assert loss.lines[0].get_xydata().tolist() == [[1, 1], [2, 1 / 2], [3, 1 / 3]]
    assert held_out.get_ylabel() == "bits per dimension"
    assert held_out.lines[0].get_xydata().tolist() == [[2, 4], [3, 3]]
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > image.height > 300
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(("rows", "count"), [(LOSSES, 1), (MEASURED, 1), ([], 0)])
def test_a_curve_without_points_is_left_out(rows, count, tmp_path, monkeypatch):
    assert len(panels(rows, tmp_path / "loss.png", monkeypatch)) == count


def test_losses_below_zero_are_drawn_on_a_plain_scale(tmp_path, monkeypatch):
    (loss,) = panels(
        [{"step": 1, "loss": -1.0}, {"step": 2, "loss": None}], tmp_path / "loss.png", monkeypatch
    )
    assert loss.get_yscale() == "linear"
    assert len(loss.lines[0].get_xydata()) == 1


def test_the_histogram_baseline_counts_each_position_apart():
    train = np.array([[0, 1], [0, 1], [0, 0]])
    bpd, error = histogram_bpd(train, np.array([[0, 0], [1, 1]]), 2)
    # counts + 1: position 0 is (4, 1)/5, position 1 is (2, 3)/5
    first, second = -np.log2(4 / 5) - np.log2(2 / 5), -np.log2(1 / 5) - np.log2(3 / 5)
    assert bpd == pytest.approx((first + second) / 4)
    assert error == pytest.approx(np.std([first / 2, second / 2], ddof=1) / 2**0.5)


def test_the_baseline_of_one_example_has_no_error():
    bpd, error = histogram_bpd(np.zeros((3, 1, 2, 2), int), np.zeros((1, 1, 2, 2), int), 3)
    assert bpd == pytest.approx(np.log2(6 / 4))
    assert np.isnan(error)
