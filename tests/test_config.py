"""The typed configuration: what is refused, and how it comes and goes."""

from dataclasses import replace

import pytest

from perrin.config import (
    DiffusionConfig,
    MLPConfig,
    RunConfig,
    TrainingConfig,
    UNetConfig,
    decode,
    differences,
    encode,
    read_toml,
)
from perrin.errors import ConfigError
from perrin.presets import DEMO


@pytest.mark.parametrize("config", [RunConfig(), DEMO, RunConfig(network=MLPConfig(width=8))])
def test_decode_reads_back_what_encode_gives(config):
    assert decode(encode(config), "here") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"foo": 1}, "here: unknown key foo"),
        ({"training": {"lrr": 1}}, "here: unknown key training.lrr"),
        ({"network": {"kind": "mlp", "channels": 3}}, "here: unknown key network.channels"),
        ({"training": {"lr": -1}}, "here: training.lr = -1: input should be greater than 0"),
        ({"training": {"steps": 1.5}}, "here: training.steps = 1.5: input should be a valid integer"),
        ({"training": {"ema": []}}, "here: training.ema = []: tuple should have at least 1 item"),
        (
            {"diffusion": {"schedule": "cos"}},
            "here: diffusion.schedule = 'cos': input should be 'linear', 'cosine'",
        ),
        ({"data": {"held_out": 1}}, "here: data.held_out = 1: input should be less than 1"),
        ({"network": {"kind": "cnn"}}, "kind must be unet or mlp"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_value(values, message):
    with pytest.raises(ConfigError) as error:
        decode(values, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_differences_names_what_a_resumed_run_may_not_change():
    saved = RunConfig()
    asked = replace(saved, diffusion=DiffusionConfig(schedule="linear"))
    assert differences(saved, asked) == ["diffusion.schedule is 'cosine', asked for 'linear'"]


def test_differences_allows_another_budget():
    asked = RunConfig(
        training=TrainingConfig(steps=5, minutes=1, log_every=2, evaluate_every=3, checkpoint_every=4, keep=5)
    )
    assert differences(RunConfig(), asked) == []


def test_differences_tells_networks_apart():
    found = differences(RunConfig(), RunConfig(network=MLPConfig()))
    assert "network.kind is 'unet', asked for 'mlp'" in found


def test_toml_sets_the_keys_it_names(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[network]\nkind = "mlp"\nwidth = 8\n[training]\nema = [0.9]\nlr = 1e-3\n')
    assert read_toml(path) == RunConfig(
        network=MLPConfig(width=8), training=TrainingConfig(ema=(0.9,), lr=1e-3)
    )


def test_toml_goes_before_its_base(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[network]\nchannels = 8\n[training]\nlr = 1e-3\n")
    base = replace(DEMO, network=UNetConfig(channels=24, dropout=0.3))
    expected = replace(
        base, network=UNetConfig(channels=8, dropout=0.3), training=replace(DEMO.training, lr=1e-3)
    )
    assert read_toml(path, base) == expected


def test_toml_with_another_kind_of_network_leaves_that_of_its_base(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[network]\nkind = "mlp"\n')
    assert read_toml(path, DEMO) == replace(DEMO, network=MLPConfig())


@pytest.mark.parametrize(
    ("content", "message"), [("network = 3", "network = 3"), ("[net]\na = 1", "unknown key net")]
)
def test_mistakes_in_a_toml_file_over_a_base_are_named(tmp_path, content, message):
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_toml(path, DEMO)


@pytest.mark.parametrize("content", ["[training", "[training]\nlr = nan_\n", "\xff"])
def test_a_toml_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.toml"):
        read_toml(path)


def test_a_missing_toml_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        read_toml(tmp_path / "absent.toml")
