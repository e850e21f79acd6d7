"""Guidance: functions from one denoiser to another, so that every sampler has it, and each goes with the others.

They change raw predictions, before thresholds and clipping: ``sampler.sample(..., guidance=[classifier_free(4.0)])``.
"""

from perrin.guidance.base import Guidance, Guided
from perrin.guidance.free import classifier_free
from perrin.guidance.gradient import MeanGuided, ScoreGuided, classifier, classifier_gradient
from perrin.guidance.threshold import dynamic_threshold
from perrin.guidance.weaker import autoguidance

__all__ = [
    "Guidance",
    "Guided",
    "MeanGuided",
    "ScoreGuided",
    "autoguidance",
    "classifier",
    "classifier_free",
    "classifier_gradient",
    "dynamic_threshold",
]
