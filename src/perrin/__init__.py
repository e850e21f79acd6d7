"""perrin: Gaussian diffusion models you can measure.

The public names load on first use, so that ``import perrin`` and the command line's help need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perrin.build import load_run as load_run
    from perrin.diffusion import GaussianDiffusion as GaussianDiffusion
    from perrin.gaussian import discretized_gaussian_log_likelihood as discretized_gaussian_log_likelihood
    from perrin.gaussian import normal_kl as normal_kl
    from perrin.learned import LearnedGaussianDiffusion as LearnedGaussianDiffusion
    from perrin.losses import LossType as LossType
    from perrin.networks import MLP as MLP
    from perrin.networks import Encoder as Encoder
    from perrin.networks import UNet as UNet
    from perrin.parameterization import ModelMeanType as ModelMeanType
    from perrin.samplers import SamplerBDIA as SamplerBDIA
    from perrin.samplers import SamplerDDIM as SamplerDDIM
    from perrin.samplers import SamplerDDPM as SamplerDDPM
    from perrin.samplers import SamplerDEIS as SamplerDEIS
    from perrin.samplers import SamplerDPM as SamplerDPM
    from perrin.samplers import SamplerHeun as SamplerHeun
    from perrin.samplers import SamplerUniPC as SamplerUniPC
    from perrin.schedules import get_named_beta_schedule as get_named_beta_schedule
    from perrin.schedules import space_timesteps as space_timesteps
    from perrin.tensors import mean_flat as mean_flat
    from perrin.timestep_sampling import LossSecondMomentResampler as LossSecondMomentResampler
    from perrin.timestep_sampling import StratifiedImportanceSampler as StratifiedImportanceSampler
    from perrin.timestep_sampling import StratifiedSampler as StratifiedSampler
    from perrin.timestep_sampling import UniformSampler as UniformSampler
    from perrin.variance import ModelVarType as ModelVarType

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "networks",
    "GaussianDiffusion": "diffusion",
    "LearnedGaussianDiffusion": "learned",
    "LossSecondMomentResampler": "timestep_sampling",
    "LossType": "losses",
    "MLP": "networks",
    "ModelMeanType": "parameterization",
    "ModelVarType": "variance",
    "SamplerBDIA": "samplers",
    "SamplerDDIM": "samplers",
    "SamplerDDPM": "samplers",
    "SamplerDEIS": "samplers",
    "SamplerDPM": "samplers",
    "SamplerHeun": "samplers",
    "SamplerUniPC": "samplers",
    "StratifiedImportanceSampler": "timestep_sampling",
    "StratifiedSampler": "timestep_sampling",
    "UNet": "networks",
    "UniformSampler": "timestep_sampling",
    "discretized_gaussian_log_likelihood": "gaussian",
    "get_named_beta_schedule": "schedules",
    "load_run": "build",
    "mean_flat": "tensors",
    "normal_kl": "gaussian",
    "space_timesteps": "schedules",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'perrin' has no attribute {name!r}")
    return getattr(import_module(f"perrin.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
