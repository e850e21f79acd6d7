"""From a configuration to objects."""

from dataclasses import replace

import pytest
import torch

from perrin.build import build_diffusion, build_model, build_network
from perrin.config import DataConfig, DiffusionConfig, MLPConfig, RunConfig, TrainingConfig, UNetConfig
from perrin.data import Facts
from perrin.errors import ConfigError, DataError
from perrin.losses import LossType
from perrin.networks import MLP, LevelPosterior, UNet
from perrin.parameterization import ModelMeanType
from perrin.schedules import cosine_betas, get_named_beta_schedule, log_snr_linear_betas, zero_terminal_snr
from perrin.variance import ModelVarType

IMAGES = Facts((3, 8, 12), 256, ("cat", "dog"), 9)
VECTORS = Facts((5,), None, None, 9)
SMALL = UNetConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sqrt-linear", "sigmoid"])
def test_a_schedule_has_its_betas(schedule):
    betas = build_diffusion(DiffusionConfig(schedule=schedule, num_timesteps=7), 256).betas
    torch.testing.assert_close(betas, torch.from_numpy(get_named_beta_schedule(schedule, 7)))


def test_log_snr_linear_takes_its_ends():
    config = DiffusionConfig(schedule="log-snr-linear", num_timesteps=7, log_snr_max=9, log_snr_min=-6)
    expected = torch.from_numpy(log_snr_linear_betas(7, 9, -6))
    torch.testing.assert_close(build_diffusion(config, 256).betas, expected)


def test_zero_terminal_snr_rescales_the_schedule():
    config = DiffusionConfig(
        num_timesteps=7, zero_terminal_snr=True, mean_type="velocity", var_type="fixed-small"
    )
    expected = torch.from_numpy(zero_terminal_snr(cosine_betas(7)))
    torch.testing.assert_close(build_diffusion(config, 256).betas, expected)


def test_zero_terminal_snr_is_refused_with_epsilon():
    with pytest.raises(ConfigError, match=r"diffusion\.zero_terminal_snr = True: needs mean_type"):
        build_diffusion(DiffusionConfig(zero_terminal_snr=True), 256)


@pytest.mark.parametrize("mean_type", ["epsilon", "start-x", "velocity", "previous-x"])
@pytest.mark.parametrize("var_type", ["fixed-small", "fixed-large", "learned", "learned-range"])
def test_each_pair_of_kinds_gets_a_network_that_fits(mean_type, var_type):
    config = RunConfig(
        diffusion=DiffusionConfig(num_timesteps=4, mean_type=mean_type, var_type=var_type),
        network=MLPConfig(width=8),
    )
    diffusion, network = build_model(config, VECTORS)
    assert diffusion.model_mean_type is ModelMeanType(mean_type)
    assert diffusion.model_var_type is ModelVarType(var_type)
    losses = diffusion.training_losses(network, torch.zeros(2, 5), torch.tensor([0, 3]))
    assert losses["loss"].shape == (2,)


@pytest.mark.parametrize("loss", ["mse", "rescaled-mse", "kl", "rescaled-kl"])
def test_the_loss_and_the_levels_reach_the_chain(loss):
    diffusion = build_diffusion(DiffusionConfig(loss=loss, rescale_timesteps=True, num_timesteps=4), 17)
    assert diffusion.loss_type is LossType(loss)
    assert diffusion.levels == 17
    assert diffusion.rescale_timesteps


def test_an_image_network_takes_the_shape_from_the_data():
    network = build_network(SMALL, IMAGES, learn_sigma=True, conditional=True)
    assert isinstance(network, UNet)
    assert network.num_classes == 2
    out = network(torch.zeros(1, 3, 8, 12), torch.zeros(1), torch.ones(1, dtype=torch.long))
    assert out.shape == (1, 6, 8, 12)


def test_a_vector_network_takes_the_length_from_the_data():
    network = build_network(MLPConfig(width=8), VECTORS, learn_sigma=False, conditional=False)
    assert isinstance(network, MLP)
    assert network.num_classes is None
    assert network(torch.zeros(1, 5), torch.zeros(1)).shape == (1, 5)


@pytest.mark.parametrize(
    ("config", "facts", "message"),
    [
        (MLPConfig(), IMAGES, r"network\.kind = 'mlp': data of shape \(3, 8, 12\) need 'unet'"),
        (UNetConfig(), VECTORS, r"network\.kind = 'unet': data of shape \(5,\) need 'mlp'"),
    ],
)
def test_a_network_of_the_wrong_kind_is_refused(config, facts, message):
    with pytest.raises(ConfigError, match=message):
        build_network(config, facts, learn_sigma=False, conditional=False)


LEVELS = DiffusionConfig(num_timesteps=4, mean_type="start-x")
BELIEFS = UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, attention_levels=(), level_basis=3)


@pytest.mark.parametrize("var_type", ["fixed-small", "learned-range"])
@pytest.mark.parametrize("rescale", [False, True])
def test_beliefs_about_levels_become_a_mean_and_a_variance(var_type, rescale):
    config = RunConfig(
        diffusion=replace(LEVELS, var_type=var_type, rescale_timesteps=rescale), network=BELIEFS
    )
    diffusion, network = build_model(config, IMAGES)
    assert isinstance(network, LevelPosterior)
    assert network.time_scale == (250 if rescale else 1)
    losses = diffusion.training_losses(network, torch.zeros(2, 3, 8, 12), torch.tensor([0, 3]))
    assert losses["loss"].isfinite().all()


def test_vectors_can_have_levels_too():
    config = RunConfig(diffusion=LEVELS, network=MLPConfig(width=8, level_basis=3))
    diffusion, network = build_model(config, Facts((5,), 17, None, 9))
    assert diffusion.training_losses(network, torch.zeros(2, 5), torch.tensor([0, 3]))["loss"].shape == (2,)


@pytest.mark.parametrize(
    ("diffusion", "levels"),
    [
        (replace(LEVELS, mean_type="epsilon"), 256),
        (replace(LEVELS, var_type="learned"), 256),
        (LEVELS, None),
    ],
)
def test_beliefs_about_levels_are_refused_where_they_make_no_sense(diffusion, levels):
    message = r"network\.level_basis = 3: needs data with levels, mean_type start-x"
    with pytest.raises(ConfigError, match=message):
        build_model(RunConfig(diffusion=diffusion, network=BELIEFS), replace(IMAGES, levels=levels))


def test_a_skip_past_beliefs_is_refused():
    config = RunConfig(diffusion=LEVELS, network=replace(BELIEFS, input_skip=True))
    with pytest.raises(ConfigError, match="the output is no image, so input_skip must be False"):
        build_model(config, IMAGES)


def test_patches_and_the_skip_reach_the_network():
    config = replace(SMALL, patch=2, input_skip=True, channel_mult=(1, 1), attention_levels=())
    network = build_network(config, IMAGES, learn_sigma=True, conditional=False)
    assert isinstance(network, UNet)
    assert (network.patch, network.input_skip) == (2, True)
    x = torch.randn(1, 3, 8, 12)
    assert torch.equal(network(x, torch.zeros(1))[:, :3], x)


def test_what_is_left_to_the_data_is_chosen_by_them():
    config = RunConfig(
        diffusion=DiffusionConfig(schedule="log-snr-linear", num_timesteps=4, log_snr_max=None),
        network=UNetConfig(channels=8, fourier=None, patch=None),
    )
    diffusion, network = build_model(config, Facts((1, 8, 16), 17, None, 9))
    first = (
        diffusion.get_buffer("log_alphas_cumprod")[0]
        - diffusion.get_buffer("log_one_minus_alphas_cumprod")[0]
    )
    assert first.item() == pytest.approx(7.74)
    assert isinstance(network, UNet)
    assert (network.features.n, network.patch) == ((0, 1, 2), 1)


@pytest.mark.parametrize("key", ["fourier", "patch"])
def test_a_network_whose_values_nothing_chose_is_refused(key):
    with pytest.raises(ConfigError, match=rf"network\.{key} = None: needs a value"):
        build_network(replace(SMALL, **{key: None}), IMAGES, learn_sigma=False, conditional=False)


def test_a_chain_whose_end_nothing_chose_is_refused():
    with pytest.raises(ConfigError, match=r"diffusion\.log_snr_max = None: needs a value"):
        build_diffusion(DiffusionConfig(schedule="log-snr-linear", log_snr_max=None), 17)


def test_classes_are_refused_for_data_without_them():
    with pytest.raises(DataError, match=r"data\.conditional = True: these data have no classes"):
        build_network(MLPConfig(), VECTORS, learn_sigma=False, conditional=True)


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed):
        config = RunConfig(DataConfig(), network=SMALL, training=TrainingConfig(seed=seed))
        return torch.cat([weight.flatten() for weight in build_model(config, IMAGES)[1].parameters()])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)
