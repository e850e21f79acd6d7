"""Training a network, and the folder in which a run lives."""

from perrin.training.ema import EMA, check_fit
from perrin.training.event import TrainEvent
from perrin.training.folder import RunFolder
from perrin.training.interrupt import Interrupted
from perrin.training.loop import train
from perrin.training.step import check_data

__all__ = ["EMA", "Interrupted", "RunFolder", "TrainEvent", "check_data", "check_fit", "train"]
