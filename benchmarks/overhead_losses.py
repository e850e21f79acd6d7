"""What a training loss costs beside the network, forward pass only: perrin, diffusers, and a loop by hand.

Measured as in overhead.py.

    python benchmarks/overhead_losses.py [--rounds 15] [--json]
"""

from __future__ import annotations

from torch.nn.functional import mse_loss

from overhead import SCHEDULERS, Setting, T, options, report
from perrin import LossType, ModelVarType
from timing import NETWORK, Loop, measure

SHAPE = (16, 3, 32, 32)
LOSSES = 20
"""Calls of a loss in one round; a loss with the bound takes as long as many steps."""


def network_alone(setting: Setting) -> Loop:
    def loop() -> int:
        for _ in range(LOSSES):
            setting.network(setting.x, setting.t)
        return LOSSES

    return loop


def perrin_loss(setting: Setting, hybrid: bool) -> Loop:
    diffusion = (
        setting.diffusion(ModelVarType.LEARNED_RANGE, LossType.RESCALED_MSE)
        if hybrid
        else setting.diffusion()
    )
    network = setting.network_for(diffusion)

    def loop() -> int:
        for _ in range(LOSSES):
            diffusion.training_losses(network, setting.x_start, setting.t, noise=setting.noise)["loss"].mean()
        return LOSSES

    return loop


def diffusers_loss(setting: Setting) -> Loop:
    scheduler = SCHEDULERS.DDPMScheduler(T, trained_betas=setting.betas)

    def loop() -> int:
        for _ in range(LOSSES):
            x_t = scheduler.add_noise(setting.x_start, setting.noise, setting.t)
            mse_loss(setting.network(x_t, setting.t), setting.noise)
        return LOSSES

    return loop


def hand_loss(setting: Setting) -> Loop:
    alphas, sigmas = setting.signal.sqrt().float(), (1 - setting.signal).sqrt().float()

    def loop() -> int:
        for _ in range(LOSSES):
            alpha, sigma = alphas[setting.t, None, None, None], sigmas[setting.t, None, None, None]
            x_t = (alpha * setting.x_start).addcmul_(setting.noise, sigma)
            (setting.noise - setting.network(x_t, setting.t)).square_().mean()
        return LOSSES

    return loop


def main() -> None:
    """Measure and print."""
    given, setting = options(__doc__ or ""), Setting(SHAPE, LOSSES)
    loops = {
        NETWORK: network_alone(setting),
        "MSE loss, perrin": perrin_loss(setting, hybrid=False),
        "MSE loss, diffusers": diffusers_loss(setting),
        "MSE loss, by hand": hand_loss(setting),
        "hybrid loss, perrin": perrin_loss(setting, hybrid=True),
    }
    report({SHAPE: measure(loops, given.rounds)}, [], as_json=given.json)


if __name__ == "__main__":
    main()
