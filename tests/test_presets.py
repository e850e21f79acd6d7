"""Presets, and the values that the data choose."""

import math

import pytest

from perrin.config import DiffusionConfig, MLPConfig, RunConfig, UNetConfig, decode, encode
from perrin.presets import PRESETS, first_log_snr, fourier_of, patch_of, resolved


@pytest.mark.parametrize(("levels", "expected"), [(256, 13.28), (17, 7.74), (2, 2.2), (None, 13.3)])
def test_the_first_sigma_is_a_third_of_half_the_distance_of_two_levels(levels, expected):
    assert first_log_snr(levels) == expected
    if levels is not None:
        sigma = math.exp(-first_log_snr(levels) / 2)
        assert sigma * (levels - 1) == pytest.approx(1 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("levels", "expected"), [(256, (4, 5, 6)), (65536, (12, 13, 14)), (17, (0, 1, 2)), (2, (0,)), (None, ())]
)
def test_the_highest_fourier_feature_turns_half_round_per_level(levels, expected):
    assert fourier_of(levels) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 28, 28), 2), ((3, 16, 32), 2), ((1, 8, 8), 1), ((1, 33, 32), 1), ((3, 32, 14), 1)],
)
def test_large_even_images_are_taken_in_patches(shape, expected):
    assert patch_of(shape) == expected


def test_resolved_fills_what_is_left_open():
    config = RunConfig(
        diffusion=DiffusionConfig(log_snr_max=None), network=UNetConfig(fourier=None, patch=None)
    )
    found = resolved(config, (1, 28, 28), 256)
    assert (found.diffusion.log_snr_max, found.network.fourier, found.network.patch) == (13.28, (4, 5, 6), 2)
    assert resolved(found, (1, 8, 8), 17) == found


def test_resolved_leaves_what_is_given():
    config = RunConfig(
        diffusion=DiffusionConfig(log_snr_max=3.0), network=UNetConfig(fourier=(1,), patch=4, level_basis=2)
    )
    assert resolved(config, (1, 28, 28), 256) == config


def test_a_network_of_beliefs_about_levels_needs_no_fourier_features():
    assert (
        resolved(RunConfig(network=UNetConfig(fourier=None, level_basis=2)), (1, 8, 8), 17).network.fourier
        == ()
    )


def test_vectors_have_features_but_no_patches():
    assert resolved(RunConfig(network=MLPConfig(fourier=None)), (5,), 256).network.fourier == (4, 5, 6)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("shape", "levels"), [((1, 28, 28), 256), ((1, 8, 8), 17), ((3, 32, 32), 256)])
def test_a_resolved_preset_leaves_nothing_open_to_the_data_and_survives_a_file(name, shape, levels):
    config = resolved(PRESETS[name], shape, levels)
    assert None not in (config.diffusion.log_snr_max, config.network.fourier, config.network.patch)
    assert decode(encode(config), "file") == config


@pytest.mark.parametrize(
    ("levels", "basis", "mean_type"),
    [(256, 16, "start-x"), (1024, 16, "start-x"), (65536, 0, "epsilon"), (None, 0, "epsilon")],
)
def test_data_without_few_levels_have_no_beliefs_about_them(levels, basis, mean_type):
    found = resolved(PRESETS["likelihood"], (1, 8, 8), levels)
    assert (found.network.level_basis, found.diffusion.mean_type) == (basis, mean_type)
    assert found.network.fourier == (() if basis else fourier_of(levels))
