"""A calibration as an object and as a file: what it gives, and what it refuses."""

import json
import math

import pytest
import torch

from chains import chain
from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, get_named_beta_schedule
from perrin.errors import ArgumentError, RunError
from perrin.gaussian import gaussian_log_likelihood
from perrin.likelihood import bound
from perrin.likelihood.calibration import Calibration, Fit, plan, with_covariance
from perrin.likelihood.costs import Levels, fitted_covariances, rules
from perrin.likelihood.covariance import Covariance
from perrin.likelihood.statistics import collect
from perrin.oracles import arbitrary
from perrin.variance import STATE_FLOOR, StateVariance

T = 20


def calibrated(var=ModelVarType.LEARNED_RANGE, kind="per-state"):
    """A chain, a network that is ideal for nothing, data and the calibration for them."""
    diffusion = chain(ModelMeanType.START_X, var, num_timesteps=T, levels=17)
    network = within(diffusion) if var is ModelVarType.LEARNED else arbitrary(diffusion.output_channels(1))
    index = torch.randint(0, 17, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    x = index.double() / 8 - 1
    statistics, levels = collect(diffusion, network, x, indices=range(6)), Levels.of(diffusion)
    covariances = fitted_covariances(statistics, levels)
    found = plan(statistics, levels, rules(covariances)[kind])
    calibration = Calibration(
        weights="ema-0.9",
        step=4,
        num_timesteps=T,
        levels=17,
        images=6,
        seed=0,
        kind=kind,
        covariances={name: Fit.of(covariance) for name, covariance in covariances.items()},
        decoders={name: Fit.of(width) for name, width in statistics.widths.items()},
        paths=tuple(map(tuple, found.paths)),
        curve=tuple(found.curve),
    )
    return diffusion, network, x, calibration


def within(diffusion):
    """An arbitrary network whose log-variance lies between those of the posterior and of beta."""
    plain = arbitrary(2)
    small, large = (diffusion.get_buffer(name) for name in ("posterior_log_variance_clipped", "log_betas"))

    def network(x, t):
        mean, extra = plain(x, t).chunk(2, 1)
        low, high = (table[t][:, None, None, None] for table in (small, large))
        return torch.cat([mean, torch.lerp(low, high, 0.5 + 0.5 * extra)], 1)

    return network


CASES = [
    (ModelVarType.FIXED_SMALL, "calibrated"),
    (ModelVarType.LEARNED_RANGE, "calibrated"),
    (ModelVarType.LEARNED_RANGE, "per-state"),
    (ModelVarType.LEARNED, "per-state"),
]


@pytest.mark.parametrize(("var", "kind"), CASES)
@pytest.mark.parametrize("steps", [1, 5, T, None])
def test_its_chain_has_the_bound_of_its_curve(var, kind, steps):
    diffusion, network, x, calibration = calibrated(var, kind)
    found = calibration.chain(diffusion, steps)
    steps = calibration.best_steps if steps is None else steps
    assert found.num_timesteps == steps
    assert [int(t) for t in found.floats["timestep_map"]] == calibration.timesteps(steps)
    measured = bound(found, network, x, indices=range(6)).total.mean()
    exact = kind == "calibrated"
    assert float(measured) == pytest.approx(calibration.curve[steps - 1], rel=1e-6 if exact else 2e-3)


def test_without_a_number_of_steps_it_takes_the_best():
    calibration = calibrated()[-1]
    assert calibration.curve[calibration.best_steps - 1] == min(calibration.curve)
    assert calibration.timesteps() == list(calibration.paths[calibration.best_steps - 1])
    assert 1 < calibration.best_steps < T  # the arbitrary network is worth few steps


def test_it_knows_the_mean_squared_error():
    diffusion, network, x, calibration = calibrated()
    error = collect(diffusion, network, x, indices=range(6)).squared_error.mean(0)
    torch.testing.assert_close(torch.tensor(calibration.x_start_variance, dtype=torch.float64), error)


@pytest.mark.parametrize("steps", [0, T + 1])
def test_steps_out_of_range_are_refused(steps):
    diffusion, _, _, calibration = calibrated()
    with pytest.raises(ArgumentError, match=f"from 1 to {T} steps, got {steps}"):
        calibration.chain(diffusion, steps)


def test_another_chain_is_refused():
    calibration = calibrated()[-1]
    with pytest.raises(RunError, match="num_timesteps = 20, not 19"):
        calibration.chain(chain(var=ModelVarType.LEARNED_RANGE, num_timesteps=19, levels=17))
    with pytest.raises(RunError, match="levels = 17, not 256"):
        calibration.chain(chain(var=ModelVarType.LEARNED_RANGE, num_timesteps=20))


# The file


@pytest.mark.parametrize(("var", "kind"), CASES)
def test_a_file_gives_the_same_calibration_back(tmp_path, var, kind):
    calibration = calibrated(var, kind)[-1]
    calibration.write(tmp_path / "calibration.json")
    assert Calibration.read(tmp_path / "calibration.json") == calibration


def changed(**values):
    return lambda record: record | values


def shorter(record):
    return record | {"curve": record["curve"][:-1]}


def descending(record):
    return record | {"paths": [*record["paths"][:-1], record["paths"][-1][::-1]]}


def early(record):
    return record | {"paths": [[0], *record["paths"][1:]]}


def one_table_short(record):
    fits = record["covariances"]
    return record | {"covariances": fits | {"analytic": {"power": [0.0], "log_scale": [0.0]}}}


def infinite(record):
    return record | {"curve": [math.inf, *record["curve"][1:]]}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (changed(step=-1), "step"),
        (changed(kind="best"), "kind"),
        (changed(extra=1), "extra"),
        (changed(num_timesteps="20"), "num_timesteps"),
        (changed(num_timesteps=21), "covariances must hold 21 numbers each"),
        (changed(decoders={}), "decoders has no kind per-state"),
        (changed(paths=[], curve=[]), "one length, at least 1"),
        (one_table_short, "covariances must hold 20 numbers each"),
        (shorter, "one length"),
        (descending, "path 20 must be 20 ascending timesteps up to 19"),
        (early, "path 1 must be 1 ascending timesteps up to 19"),
        (infinite, "curve.0"),
        (lambda record: {}, "weights"),
        (lambda record: [], "damaged"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, reason):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(damage(json.loads(calibrated()[-1].to_json()))))
    with pytest.raises(RunError) as caught:
        Calibration.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith("`perrin calibrate` makes it anew")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"weights": "model"', b"null"])
def test_what_is_no_calibration_at_all_is_refused(tmp_path, content):
    (tmp_path / "calibration.json").write_bytes(content)
    with pytest.raises(RunError, match="is damaged"):
        Calibration.read(tmp_path / "calibration.json")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RunError, match="No such file"):
        Calibration.read(tmp_path / "calibration.json")


# The variance for each state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_for_each_state_is_the_posteriors_and_what_is_unknown_of_the_data(dtype):
    extra = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 2.0]], dtype=dtype)
    tables = {
        "state_low": -1.0,
        "state_span": 2.0,
        "state_power": 0.5,
        "state_log_scale": math.log(0.3),
        "posterior_mean_coef1": 0.2,
        "state_least": 1e-3,
    }
    kept = extra.clone()
    found = StateVariance().log_variance(extra, tables.__getitem__)
    place = torch.tensor([[STATE_FLOOR, STATE_FLOOR, 0.5, 1.0, 1.5]], dtype=dtype)
    torch.testing.assert_close(found.exp(), 1e-3 + 0.04 * 0.3 * place.sqrt())
    torch.testing.assert_close(extra, kept)
    assert StateVariance().extra_channels == 1


def test_a_decoder_never_stakes_all_on_one_level() -> None:
    """Images in which no level is missed would make it so narrow that the first miss costs hundreds of bits."""
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("linear", 4), levels=17)
    sure = Covariance(torch.zeros(4), torch.full((4,), math.log(1e-12)))
    chain = with_covariance(diffusion, sure, None, [0, 1, 2, 3])
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64)
    log_scale = torch.tensor(0.5 * chain.floats["calibrated_log_variance"][0], dtype=torch.float64)
    hit, missed = (
        -float(
            gaussian_log_likelihood(
                levels[8:9], means=levels[place : place + 1], log_scales=log_scale, levels=17
            )
        )
        / math.log(2)
        for place in (8, 7)
    )
    assert hit < 2e-4
    assert 10 < missed < 20
    assert chain.floats["calibrated_variance"][1] == pytest.approx(diffusion.floats["posterior_variance"][1])
