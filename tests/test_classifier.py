"""The classifier of noisy images: its training, its files, and what it is for."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM
from perrin.config import DataConfig, RunConfig, TrainingConfig
from perrin.data import Dataset, Facts
from perrin.errors import DataError, NonFiniteError, RunError
from perrin.guidance import classifier
from perrin.oracles import arbitrary
from perrin.schedules import cosine_betas, linear_betas, log_snr_linear_betas, zero_terminal_snr
from perrin.timestep_sampling import UniformSampler
from perrin.training import Interrupted
from perrin.training.checkpoint import STATE_FILE
from perrin.training.classifier import (
    FACTS_FILE,
    BandAccuracy,
    ChainMark,
    ClassifierFacts,
    EncoderConfig,
    load_classifier,
    save_classifier,
)
from perrin.training.classifier_loop import (
    ClassifierConfig,
    ClassifierProgress,
    ClassifierTask,
    train_classifier,
)
from perrin.training.schedule import Budget

ENCODER = EncoderConfig(
    channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_levels=(),
    num_heads=1,
    dropout=0.1,
    patch=2,
)
CONFIG = ClassifierConfig(encoder=ENCODER, batch_size=16, lr=1e-2, weight_decay=0.01, seed=3)
CHAIN = GaussianDiffusion(betas=log_snr_linear_betas(40, 5.0, -5.0))


def halves(n: int = 120) -> Dataset:
    """Images (1, 4, 4) that are bright above (class 0) or below (class 1), with some noise."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % 2
    values = random.integers(0, 64, (n, 1, 4, 4)).astype(np.uint8)
    values[labels == 0, :, :2] += 190
    values[labels == 1, :, 2:] += 190
    facts = Facts((1, 4, 4), 256, ("above", "below"), n, "mark")
    return Dataset(values, labels, [str(i) for i in range(n)], facts)


def task(folder: Path, **changes: Any) -> ClassifierTask:
    run = RunConfig(data=DataConfig(held_out=0.25))
    given = {
        "folder": folder,
        "config": CONFIG,
        "run": run,
        "dataset": halves(),
        "classes": ("above", "below"),
        "diffusion": CHAIN,
        "device": torch.device("cpu"),
    }
    return ClassifierTask(**{**given, **changes})


def train(steps: int, work: ClassifierTask) -> ClassifierFacts:
    return train_classifier(work, Budget(steps, None), lambda progress: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    train(80, task(folder))
    return folder


def test_it_learns_what_the_noise_leaves(trained: Path) -> None:
    _, facts = load_classifier(trained)
    low, high = facts.bands[0], facts.bands[-1]
    assert (low.band, high.band) == ("log-SNR 4 to 6", "log-SNR -6 to -4")
    assert low.accuracy > 0.95
    assert high.accuracy < 0.8
    assert {band.count for band in facts.bands} == {30}
    assert sum(band.timesteps for band in facts.bands) == 40
    assert facts.accuracy == pytest.approx(sum(band.accuracy * band.timesteps / 40 for band in facts.bands))
    share = high.accuracy
    assert high.standard_error == pytest.approx((share * (1 - share) / 30) ** 0.5)


def test_its_gradient_guides_samples_of_an_unconditional_model(trained: Path) -> None:
    network, _ = load_classifier(trained)
    y = torch.tensor([0, 1, 0, 1])
    sample = SamplerDDIM(CHAIN, 10).sample(
        arbitrary(1), (4, 1, 4, 4), seed=0, guidance=[classifier(network, 20.0, y=y)]
    )
    t = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(network(sample, t).argmax(1), y)


def test_no_class_is_withheld_from_the_classifier_of_a_run_that_withholds_some(tmp_path: Path) -> None:
    run = RunConfig(data=DataConfig(held_out=0.25, conditional=True), training=TrainingConfig(label_drop=0.9))
    batches = task(tmp_path, run=run).batches()
    labels = batches.draw(0, UniformSampler(CHAIN)).labels
    assert labels is not None
    assert set(labels.tolist()) == {0, 1}


def test_a_loaded_classifier_needs_no_gradients_and_leaves_torchs_generator_alone(trained: Path) -> None:
    before = torch.random.get_rng_state()
    network, facts = load_classifier(trained)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert (facts.shape, facts.classes, facts.step) == ((1, 4, 4), ("above", "below"), 80)
    assert facts.encoder == ENCODER
    facts.check(CHAIN, (1, 4, 4), ("above", "below"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_classifier(folder)[0].state_dict()


def test_training_in_two_parts_is_training_in_one(tmp_path: Path) -> None:
    seen: list[ClassifierProgress] = []
    train(40, task(tmp_path / "one"))
    train(15, task(tmp_path / "two"))
    facts = train_classifier(task(tmp_path / "two"), Budget(40, None), seen.append)
    assert facts.step == 40
    assert [progress.step for progress in seen] == [20, 40]
    assert [progress.progress for progress in seen] == [0.5, 1.0]
    assert seen[-1].eta_seconds == 0
    for name, value in weights(tmp_path / "one").items():
        assert torch.equal(value, weights(tmp_path / "two")[name])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        FACTS_FILE,
        STATE_FILE,
        "weights-00000040.safetensors",
    ]


def test_what_is_saved_and_measured_is_the_average(tmp_path: Path) -> None:
    train(20, task(tmp_path))
    state, saved = torch.load(tmp_path / STATE_FILE, weights_only=True), weights(tmp_path)
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert not torch.allclose(saved["head.weight"], state["model"]["head.weight"], rtol=1e-2)


def test_the_learning_rate_rises_from_almost_nothing(tmp_path: Path) -> None:
    train(1, task(tmp_path, config=replace(CONFIG, weight_decay=0.0)))
    state, before = torch.load(tmp_path / STATE_FILE, weights_only=True), ENCODER.build((1, 4, 4), 2, 3)
    steps = [(state["model"][name] - value).abs().max() for name, value in before.state_dict().items()]
    assert float(max(steps)) == pytest.approx(CONFIG.lr / 100, rel=0.01)


def test_a_large_gradient_is_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perrin.training.classifier_loop.CLIP_NORM", 1e-12)
    train(1, task(tmp_path, config=replace(CONFIG, weight_decay=0.0)))
    state, before = torch.load(tmp_path / STATE_FILE, weights_only=True), ENCODER.build((1, 4, 4), 2, 3)
    steps = [(state["model"][name] - value).abs().max() for name, value in before.state_dict().items()]
    assert float(max(steps)) < CONFIG.lr / 1e5


def test_a_spent_budget_trains_no_more(tmp_path: Path) -> None:
    first = train(5, task(tmp_path))
    assert train(5, task(tmp_path)) == first
    assert train_classifier(task(tmp_path), Budget(None, 1e-9), lambda progress: None).step == 5


def test_what_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(40, task(tmp_path / "whole"))
    calls = iter(range(100))

    def check(self: object) -> None:
        if next(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("perrin.training.classifier_loop.Interrupts.check", check)
        with pytest.raises(Interrupted, match="step 7 is saved"):
            train(40, task(tmp_path / "part"))
    assert not (tmp_path / "part" / FACTS_FILE).exists()
    train(40, task(tmp_path / "part"))
    assert_close(weights(tmp_path / "part"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_its_settings_change_what_is_learned(tmp_path: Path) -> None:
    train(10, task(tmp_path / "plain"))
    plain = weights(tmp_path / "plain")
    changes = {"lr": 2e-2, "weight_decay": 0.5, "seed": 4, "batch_size": 8}
    for name, value in changes.items():
        train(10, task(tmp_path / name, config=replace(CONFIG, **{name: value})))
        other = weights(tmp_path / name)
        assert not all(torch.equal(other[key], plain[key]) for key in plain)
    run = RunConfig(data=DataConfig(held_out=0.25, flip=True))
    train(10, task(tmp_path / "flip", run=run))
    assert not torch.equal(weights(tmp_path / "flip")["head.weight"], plain["head.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": replace(CONFIG, lr=0.5)},
            "holds a classifier with lr 0.01, asked for 0.5: choose another",
        ),
        ({"config": replace(CONFIG, encoder=replace(ENCODER, channels=16))}, "channels 8, asked for 16"),
        ({"diffusion": GaussianDiffusion(betas=linear_betas(40))}, "for another chain: choose another --out"),
        ({"classes": ("up", "down")}, r"classes \['above', 'below'\], asked for \['up', 'down'\]"),
        ({"run": RunConfig(data=DataConfig(held_out=0.5))}, "held-out 0.25, asked for 0.5"),
        ({"dataset": replace(halves(), facts=replace(halves().facts, fingerprint="x"))}, "data mark, asked"),
    ],
)
def test_a_folder_is_gone_on_with_only_as_it_was_begun(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train(1, task(tmp_path))
    with pytest.raises(RunError, match=message):
        train(2, task(tmp_path, **changes))


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    train(1, task(tmp_path))
    (tmp_path / STATE_FILE).write_bytes((tmp_path / STATE_FILE).read_bytes()[:1000])
    with pytest.raises(RunError, match=r"state.pt is damaged .*; delete it to start again"):
        train(2, task(tmp_path))
    for other in ({"step": 3}, torch.zeros(2)):
        torch.save(other, tmp_path / STATE_FILE)
        with pytest.raises(RunError, match=r"was not made by perrin train-classifier: choose another place"):
            train(2, task(tmp_path))


def test_a_foreign_state_that_cannot_be_read_is_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"mine")
    with pytest.raises(RunError, match=r"was not made by perrin train-classifier: choose another place$"):
        task(tmp_path).check()


def test_damaged_facts_are_written_anew_by_training_on(tmp_path: Path) -> None:
    train(1, task(tmp_path))
    (tmp_path / FACTS_FILE).write_text("{")
    train(2, task(tmp_path))
    assert load_classifier(tmp_path)[1].step == 2


def test_all_files_may_be_read_by_whom_the_folder_s_owner_lets(tmp_path: Path) -> None:
    train(1, task(tmp_path))
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {plain.stat().st_mode}
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset": replace(halves(), labels=None)},
            "labels of at least 2 classes, and these data have none",
        ),
        ({"classes": ("all",)}, "labels of at least 2 classes, and these data have 1"),
        (
            {"dataset": replace(halves(), facts=replace(halves().facts, shape=(16,)))},
            r"needs images \(C, H, W\), got data of shape \(16,\)",
        ),
    ],
)
def test_data_without_classes_or_images_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        train(1, task(tmp_path, **changes))


def test_a_loss_that_is_not_finite_ends_training_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 20: the classifier's loss is not finite"):
        train(30, task(tmp_path, config=replace(CONFIG, lr=float("inf"), weight_decay=0.0)))
    assert list(tmp_path.iterdir()) == []


def facts(**changes: Any) -> ClassifierFacts:
    known = ClassifierFacts(
        shape=(1, 4, 4),
        classes=("above", "below"),
        chain=ChainMark.of(CHAIN),
        encoder=ENCODER,
        step=1,
        bands=(BandAccuracy("all", 40, 0.5, 0.1, 25),),
        weights="weights-00000001.safetensors",
    )
    return replace(known, **changes)


@pytest.mark.parametrize(
    ("diffusion", "shape", "classes", "message"),
    [
        (CHAIN, (1, 8, 8), None, r"data of shape \(1, 4, 4\), the run has \(1, 8, 8\)"),
        (CHAIN, (1, 4, 4), ("below", "above"), "knows the classes above, below, the run has below, above"),
        (
            GaussianDiffusion(betas=log_snr_linear_betas(40, 5.1, -5.0)),
            (1, 4, 4),
            None,
            r"another chain: T = 40, log-SNR 5.000 to -5.000, the run has T = 40, log-SNR 5.100 to -5.000",
        ),
        (
            GaussianDiffusion(betas=log_snr_linear_betas(40, 5.0, -5.0), rescale_timesteps=True),
            (1, 4, 4),
            None,
            "the run has T = 40, .*, rescaled times",
        ),
        (GaussianDiffusion(betas=log_snr_linear_betas(80, 5.0, -5.0)), (1, 4, 4), None, "T = 80"),
    ],
)
def test_a_run_that_it_does_not_fit_is_named(
    diffusion: GaussianDiffusion, shape: tuple[int, ...], classes: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        facts().check(diffusion, shape, classes)


def test_the_mark_of_a_chain_is_the_same_after_a_little_rounding_and_without_signal() -> None:
    betas = np.asarray(cosine_betas(40))
    one, other = (ChainMark.of(GaussianDiffusion(betas=b)) for b in (betas, betas * (1 + 1e-7)))
    assert one != other
    assert one.same(other)
    bare = GaussianDiffusion(betas=zero_terminal_snr(betas), model_mean_type=ModelMeanType.VELOCITY)
    assert ChainMark.of(bare).log_snr[-1] == -80


def test_the_facts_come_back_as_they_were_written(tmp_path: Path) -> None:
    network = ENCODER.build((1, 4, 4), 2)
    for wanted in (facts(), facts(encoder=replace(ENCODER, channel_mult=None), step=2, weights="weights-2")):
        network = wanted.encoder.build((1, 4, 4), 2)
        save_classifier(tmp_path, wanted, network.state_dict())
        loaded, found = load_classifier(tmp_path)
        assert found == wanted
        assert_close(loaded.state_dict(), network.state_dict(), rtol=0, atol=0)
        assert sorted(path.name for path in tmp_path.iterdir()) == [FACTS_FILE, wanted.weights]


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no classifier: `perrin train-classifier RUN` trains one"):
        load_classifier(tmp_path)
    known = facts()
    save_classifier(tmp_path, known, ENCODER.build((1, 4, 4), 3).state_dict())
    with pytest.raises(RunError, match=r"does not fit the network: head\.bias must have shape"):
        load_classifier(tmp_path)
    (tmp_path / known.weights).write_bytes(b"rubbish")
    with pytest.raises(RunError, match=r"weights-00000001.safetensors is missing or damaged"):
        load_classifier(tmp_path)
    (tmp_path / known.weights).unlink()
    with pytest.raises(RunError, match=r"weights-00000001.safetensors is missing or damaged"):
        load_classifier(tmp_path)
    values = json.loads((tmp_path / FACTS_FILE).read_text())
    whole = json.dumps(values)
    for broken in ({"bands": []}, {"encoder": values["encoder"] | {"channels": 0}}):
        (tmp_path / FACTS_FILE).write_text(json.dumps(values | broken))
        with pytest.raises(RunError, match=r"classifier.json is damaged \("):
            load_classifier(tmp_path)
    values = json.loads(whole)
    values["chain"]["log_snr"] = "high"
    (tmp_path / FACTS_FILE).write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"classifier.json is damaged \(chain.log_snr: "):
        load_classifier(tmp_path)
    (tmp_path / FACTS_FILE).write_text("{")
    with pytest.raises(RunError, match=r"classifier.json is damaged \(the file: "):
        load_classifier(tmp_path)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (ENCODER.build((1, 4, 4), 2, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert asdict(ENCODER)["patch"] == 2
