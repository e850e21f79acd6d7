"""Whole runs: resuming bit for bit, what is written when, and stopping where figures are not finite."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perrin.data import Dataset, Facts, split
from perrin.errors import ConfigError, NonFiniteError, RunError
from perrin.likelihood import bound, mean_and_error
from perrin.networks import MLP
from perrin.training import RunFolder, loop
from test_training_step import TIMESTEPS, Net, Trial, config, dataset, diffusion, network

CLOCK = ("seconds", "images_per_second")


def rows(path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in CLOCK}
        for row in RunFolder.open(path).metrics.rows()
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """The newest checkpoints and the metrics agree bit for bit, but for the clock."""
    first, second = (RunFolder.open(path).load_checkpoint() for path in (one, other))
    assert first.step == second.step
    for checkpoint in (first, second):
        del checkpoint.state["seconds"], checkpoint.state["window"]["began"]
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=0)
    torch.testing.assert_close(first.state, second.state, rtol=0, atol=0)
    assert rows(one) == rows(other)


@pytest.mark.parametrize(
    "t_sampler", ["uniform", "stratified", "loss-second-moment", "stratified-importance"]
)
def test_sessions_of_any_length_give_the_run_of_one_session(tmp_path: Path, t_sampler: str) -> None:
    setting = config(
        t_sampler=t_sampler, evaluate_every=6, microbatch=3, flip=True, conditional=True, steps=30
    )
    Trial(tmp_path / "whole", setting, network=network(classes=2)).session()
    for stop_at in (5, 6, 17, None):
        event = Trial(tmp_path / "parts", setting, network=network(classes=2)).session(stop_at)
    assert event.step == 30
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len(rows(tmp_path / "parts")) == 30 // 4 + 1 + 30 // 6


def test_one_trained_network_can_take_the_next_session(tmp_path: Path) -> None:
    Trial(tmp_path / "whole", config()).session()
    trial = Trial(tmp_path / "parts", config())
    for stop_at in (5, None):
        trial.session(stop_at)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_longer_budget_continues_the_run(tmp_path: Path) -> None:
    setting = config(decay="constant", steps=10)
    Trial(tmp_path / "short", setting).session()
    longer = replace(setting, training=replace(setting.training, steps=20))
    assert Trial(tmp_path / "short", longer).session().step == 20
    Trial(tmp_path / "long", longer).session()
    first, second = (RunFolder.open(tmp_path / name).load_checkpoint() for name in ("short", "long"))
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=0)
    extra = [row for row in rows(tmp_path / "short") if row["step"] == 10]
    assert [row for row in rows(tmp_path / "short") if row["step"] != 10] == rows(tmp_path / "long")
    assert len(extra) == 2  # the short run's last line and its measurement


def test_lines_past_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    setting = config(log_every=1)
    Trial(tmp_path / "whole", setting).session()
    Trial(tmp_path / "parts", setting).session(stop_at=6)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1}\n{"step": 8, "lo')
    Trial(tmp_path / "parts", setting).session()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    data = dataset()
    data.values[:] = 16 * (np.arange(4) % 2)
    Trial(tmp_path, config(steps=150, log_every=15), data).session(stop_at=149)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_first_average_is_what_is_measured(tmp_path: Path) -> None:
    trial = Trial(tmp_path, config())
    final = trial.session()
    state, name, _ = RunFolder.open(tmp_path).load_weights()
    assert name == "ema-0.99"
    net = network().eval()
    net.load_state_dict(state)
    held_out = split(len(trial.data), 0.2)[1]
    x_start, _ = trial.data.batch(held_out, "cpu")
    expected = bound(diffusion(), net, x_start, indices=[int(i) for i in held_out])
    assert (final.held_out_bpd, final.held_out_bpd_se) == pytest.approx(
        mean_and_error(expected.total), rel=1e-6
    )


def test_files_and_lines_of_a_run(tmp_path: Path) -> None:
    Trial(tmp_path, config(evaluate_every=8, checkpoint_every=5, keep=2)).session()
    assert RunFolder.open(tmp_path).checkpoints() == [10, 12]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-00000008.png",
        "step-00000012.png",
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "held_out_bpd" in row) for row in lines] == [
        (4, False), (8, False), (8, True), (12, False), (12, True),
    ]  # fmt: skip
    assert set(lines[0]) == {
        "step", "steps", "loss", "mse", "vb", "grad_norm", "lr", "images_per_second", "seconds",
    }  # fmt: skip
    assert set(lines[2]) == {"step", "held_out_bpd", "held_out_bpd_se", "outside_range"}
    assert lines[0]["lr"] == pytest.approx(1e-2 * (1 - 3 / 12))
    assert 0 <= lines[2]["outside_range"] <= 1


def test_a_short_run_still_has_a_line(tmp_path: Path) -> None:
    Trial(tmp_path, config(steps=3, log_every=50)).session()
    assert [row["step"] for row in rows(tmp_path)] == [3, 3]


def test_events_tell_how_training_stands(tmp_path: Path) -> None:
    trial = Trial(tmp_path, config(evaluate_every=8))
    final = trial.session()
    assert [(event.kind, event.step) for event in trial.events] == [
        ("start", 0), ("progress", 4), ("progress", 8), ("evaluation", 8),
        ("progress", 12), ("evaluation", 12), ("checkpoint", 12),
    ]  # fmt: skip
    assert final == trial.events[-1]
    assert trial.events[0].loss is None
    at_four = trial.events[1]
    assert (at_four.total_steps, at_four.progress) == (12, pytest.approx(1 / 3))
    assert at_four.loss == rows(tmp_path)[0]["loss"]
    assert at_four.images_per_second is not None
    assert at_four.eta_seconds is not None
    assert at_four.eta_seconds == pytest.approx(8 * 8 / at_four.images_per_second)
    assert trial.events[3].grid == tmp_path / "samples" / "step-00000008.png"
    assert final.held_out_bpd_se is not None
    assert final.held_out_bpd_se > 0


def test_slow_steps_are_reported_before_the_next_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_REPORTS", -1.0)
    trial = Trial(tmp_path, config(steps=3, log_every=50))
    trial.session()
    assert [event.step for event in trial.events if event.kind == "progress"] == [1, 2, 3]
    assert [row["step"] for row in rows(tmp_path)] == [3, 3]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = Trial(tmp_path, config()).session()
    before = (tmp_path / "metrics.jsonl").read_text()
    again = Trial(tmp_path, config())
    final = again.session()
    assert [event.kind for event in again.events] == ["start"]
    assert (final.step, final.held_out_bpd, final.progress) == (12, first.held_out_bpd, 1.0)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_minutes_end_training_and_are_counted_over_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def slow(name: str, seconds: float) -> None:
        inner = getattr(loop, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return inner(*args, **kwargs)

        monkeypatch.setattr(loop, name, call)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    slow("backward", 6.0)
    slow("evaluate", 1000.0)
    setting = config(steps=None, minutes=1.0, evaluate_every=2)
    stopped = Trial(tmp_path, setting).session(stop_at=3)
    assert (stopped.step, stopped.seconds, stopped.progress) == (3, 18.0, pytest.approx(0.3))
    final = Trial(tmp_path, setting).session()
    assert (final.step, final.seconds, final.total_steps) == (10, 60.0, None)


def test_the_callers_random_state_is_untouched(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Trial(tmp_path, config()).session()
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)


def test_flips_and_labels_reach_the_network_in_training_only(tmp_path: Path) -> None:
    net = network(classes=2)
    train_part = dataset()
    train_part.values[..., 1:] = 0  # a bright column on the left, if not mirrored
    train_part.values[..., 0] = 16
    trial = Trial(tmp_path, config(flip=True, conditional=True), train_part, net)
    clean: list[Tensor] = []
    chain = diffusion()
    inner = chain.training_losses

    def watched(model: Any, x_start: Tensor, *args: Any, **kwargs: Any) -> Any:
        clean.append(x_start)
        return inner(model, x_start, *args, **kwargs)

    chain.training_losses = watched  # type: ignore[method-assign]  # to see what the loop feeds it
    loop.train(trial.folder(), diffusion=chain, network=net, dataset=train_part, device="cpu", report=print)
    left = torch.cat(clean)[:, 0, 0, 0] == 1
    assert 0 < left.sum() < len(left)
    assert all(y is not None and set(y.tolist()) <= {0, 1} for _, _, y in net.inputs)


def test_clipping_bounds_the_gradient_that_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    inner = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        inner(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    Trial(tmp_path, config(clip_norm=1e-3), network=network(classes=2)).session(stop_at=2)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_optimizer_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    Trial(tmp_path, config(weight_decay=0.2, beta2=0.95)).session(stop_at=2)
    group = RunFolder.open(tmp_path).load_checkpoint().state["optimizer"]["param_groups"][0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.2)
    assert group["lr"] == pytest.approx(1e-2 * 2 / 3 * 11 / 12)


def test_bf16_training_keeps_float32_weights(tmp_path: Path) -> None:
    Trial(tmp_path / "half", config(precision="bf16")).session(stop_at=3)
    Trial(tmp_path / "full", config()).session(stop_at=3)
    half, full = (
        RunFolder.open(tmp_path / name).load_weights(weights="model")[0] for name in ("half", "full")
    )
    assert all(value.dtype == torch.float32 for value in half.values())
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.02)
    assert any(not torch.equal(half[name], full[name]) for name in half)


def test_vectors_are_trained_without_a_grid(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 17, (30, 2), np.uint8)
    data = Dataset(values, None, [str(i) for i in range(30)], Facts((2,), 17, None, 30))
    trial = Trial(tmp_path, config(), data, MLP(2, width=8, depth=1, learn_sigma=True))
    final = trial.session()
    assert final.grid is None
    assert final.held_out_bpd is not None
    assert not (tmp_path / "samples").exists()


def test_training_without_an_end_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both absent"):
        Trial(tmp_path, config(steps=None)).session()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    Trial(tmp_path, config()).session(stop_at=2)
    with pytest.raises(
        RunError, match=r"step 2 does not fit the network: label\.weight must have shape \(3, 4\)"
    ):
        Trial(tmp_path, config(), network=network(classes=3)).session()


class Sick(Net):
    """A network that falls ill at one step: in its output, or in one gradient only."""

    def __init__(self, at: int, where: str) -> None:
        super().__init__()
        self.at, self.where, self.calls = at, where, 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        out = super().forward(x, t, y)
        if self.calls != self.at:
            return out
        if self.where == "output":
            return out * torch.where(t == t.min(), float("nan"), 1.0)[:, None, None, None]
        return out + (0 * self.enter.bias.sum()).sqrt()  # finite, with an infinite derivative times 0


def sick(at: int, where: str) -> Sick:
    """The network that falls ill, with the weights of `network`."""
    net = Sick(at, where)
    net.load_state_dict(network().state_dict())
    return net


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("output", r"the loss is not finite at t = \d"),
        ("gradient", r"the gradient of enter\.bias is not finite"),
    ],
)
def test_figures_that_are_not_finite_stop_training(tmp_path: Path, where: str, what: str) -> None:
    with pytest.raises(NonFiniteError, match=rf"^step 8: {what}.*; step 6 is the last checkpoint$"):
        Trial(tmp_path, config(log_every=1, checkpoint_every=3), network=sick(8, where)).session()
    folder = RunFolder.open(tmp_path)
    assert folder.checkpoints() == [3, 6]
    assert [row["step"] for row in folder.metrics.rows()] == [1, 2, 3, 4, 5, 6, 7]
    Trial(tmp_path / "well", config(log_every=1, checkpoint_every=3)).session(stop_at=6)
    torch.testing.assert_close(
        folder.load_checkpoint().weights, RunFolder.open(tmp_path / "well").load_checkpoint().weights
    )


def test_a_step_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    trial = Trial(tmp_path, config(), network=sick(3, "output"))
    with pytest.raises(NonFiniteError, match=r"step 3: .*; there is no checkpoint yet$"):
        trial.session()
    assert all(bool(p.isfinite().all()) for p in trial.network.parameters())


def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the figures of a step lie until they are due, as on an accelerator."""
    inner = loop.Session.advance

    def asynchronous(self: loop.Session) -> None:
        self.device = torch.device("cuda")
        inner(self)

    monkeypatch.setattr(loop.Session, "advance", asynchronous)
    monkeypatch.setattr(loop, "seed_dropout", lambda device, seed, step: None)


def test_where_figures_are_read_late_nothing_is_written_after_the_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_late(monkeypatch)
    trial = Trial(tmp_path, config(log_every=4, checkpoint_every=5), network=sick(7, "output"))
    with pytest.raises(
        NonFiniteError, match=r"^step 7: the loss is not finite.*; step 5 is the last checkpoint$"
    ):
        trial.session()
    assert RunFolder.open(tmp_path).checkpoints() == [5]
    assert [row["step"] for row in rows(tmp_path)] == [4]


def test_where_figures_are_read_late_ctrl_c_does_not_save_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_late(monkeypatch)

    def pressed(self: loop.Interrupts) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Interrupts, "check", pressed)
    with pytest.raises(NonFiniteError, match=r"^step 1: the loss is not finite"):
        Trial(tmp_path, config(), network=sick(1, "output")).session()
    assert RunFolder.open(tmp_path).checkpoints() == []


def test_reading_late_changes_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trial(tmp_path / "early", config(), network=network(dropout=0.0)).session()
    read_late(monkeypatch)
    Trial(tmp_path / "late", config(), network=network(dropout=0.0)).session()
    assert_same_run(tmp_path / "early", tmp_path / "late")


def test_averages_follow_the_weights_with_their_warm_up(tmp_path: Path) -> None:
    setting = config(checkpoint_every=1, keep=12)
    Trial(tmp_path, setting).session()
    folder = RunFolder.open(tmp_path)
    average = network().exit.weight.detach()
    for step in range(1, 13):
        decay = min(0.99, step / (9 + step))
        average = decay * average + (1 - decay) * folder.load_weights(step, "model")[0]["exit.weight"]
    torch.testing.assert_close(folder.load_weights()[0]["exit.weight"], average, rtol=1e-5, atol=1e-7)


def test_every_timestep_is_trained(tmp_path: Path) -> None:
    net = network()
    Trial(tmp_path, config(), network=net).session(stop_at=12)
    assert set(torch.cat([t for _, t, _ in net.inputs]).tolist()) == set(range(TIMESTEPS))
