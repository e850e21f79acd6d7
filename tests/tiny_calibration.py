"""A calibration for the tiny run, as `perrin calibrate` leaves one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perrin.likelihood.calibration import Calibration, Fit


@contextmanager
def calibrate(run: Path, *, log_variance: float = -3.0) -> Iterator[None]:
    """Within it, the tiny run has a calibration: chains of 1 to 3 steps, of which 2 are the best."""
    fit = {"calibrated": Fit((0.0,) * 12, (log_variance,) * 12)}
    calibration = Calibration(
        weights="ema-0.9",
        step=4,
        num_timesteps=12,
        levels=256,
        images=1,
        seed=0,
        kind="calibrated",
        covariances=fit,
        decoders=fit,
        paths=((11,), (5, 11), (2, 7, 11)),
        curve=(3.0, 1.0, 2.0),
    )
    calibration.write(run / "calibration.json")
    try:
        yield
    finally:
        (run / "calibration.json").unlink()
