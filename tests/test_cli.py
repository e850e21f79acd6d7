"""The command line before any command runs: help, version, flags, and one-line mistakes."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import tyro

from cli_helpers import error_of
from perrin import __version__
from perrin.cli.flags import one_line, parse
from perrin.cli.main import COMMANDS, main
from perrin.cli.overrides import registry, short_flags
from perrin.cli.train import Options, read
from perrin.config import MLPConfig, RunConfig, UNetConfig, decode
from perrin.errors import ConfigError


def config_of(*args: str) -> RunConfig:
    """The configuration that the flags of ``perrin train digits --out x`` give."""
    options = parse(
        Options,
        short_flags(["digits", "--out", "x", *args]),
        command="train",
        registry=registry(RunConfig(), require_data=True),
    )
    return decode(options.run.values, "command line")


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_neither_torch_nor_matplotlib(args):
    script = (
        "import sys; from perrin.cli.main import main; code = main(sys.argv[1:]);"
        "found = {'torch', 'matplotlib', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {found}' if found else code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: perrin{' ' + args[0] if len(args) > 1 else ''} ")


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "perrin", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("perrin: error: ")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " in output] == [*COMMANDS]


def test_a_reader_may_stop_reading():
    command = [sys.executable, "-m", "perrin", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"perrin {__version__}\n"


@pytest.mark.parametrize(("args", "found"), [([], "got none"), (["trian"], "got 'trian'")])
def test_an_unknown_command_lists_the_known_ones(args, found, capsys):
    line = error_of(args, capsys)
    assert ", ".join(COMMANDS) in line
    assert found in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lrr", "3"], "unrecognized options: --lrr, 3 (perhaps you meant --lr FLOAT)"),
        (["--lr", "a"], "--lr must be a number, got 'a'"),
        (["--lr", "-1"], "command line: training.lr = -1.0: input should be greater than 0"),
        (["--steps"], "missing value for argument '--steps'. Expected 1 value."),
        (["--steps", "abc"], "--steps must be a whole number, got 'abc'"),
        (
            ["--channel-mult", "1", "2", "b"],
            "--channel-mult takes whole numbers, got 1 2 b: what belongs to no flag goes before --channel-mult",
        ),
        (["--steps", "0"], "command line: training.steps = 0: input should be greater than or equal to 1"),
        (
            ["--schedule", "cos"],
            "invalid choice 'cos' for argument '--schedule'. Expected one of ('linear', 'cosine'",
        ),
        (["--kind", "cnn"], "invalid choice 'cnn' for argument '--kind'. Expected one of ('unet', 'mlp')"),
        (["--width", "3"], "unrecognized options: --width, 3"),
        (["more"], "unrecognized options: more"),
        (["training.lrr=3"], "unknown key training.lrr (expected one of batch_size, beta2, "),
        (
            ["--data.lr", "3"],
            "unknown key data.lr (expected one of conditional, flip, held_out, levels, path)",
        ),
        (["data.flip=yes"], "data.flip = 'yes': expected true or false"),
        (["--stop-at", "0"], "--stop-at must be at least 1, got 0"),
        (["--config", "absent.toml"], "absent.toml"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(args, message, capsys, tmp_path):
    line = error_of(["train", "digits", "--out", str(tmp_path / "run"), *args], capsys)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_missing_argument_is_named(capsys):
    line = error_of(["train", "--out", "absent"], capsys)
    assert line.startswith("missing from perrin train: ")
    assert "DATA" in line


@pytest.mark.parametrize(
    "args",
    [
        ["--lr", "1e-3", "--fourier", "2", "3", "--log-snr-min", "-6", "--flip", "--steps", "None"],
        [
            "training.lr=1e-3",
            "network.fourier=2,3",
            "diffusion.log_snr_min=-6",
            "data.flip=true",
            "training.steps=none",
        ],
        [
            "--training.lr",
            "1e-3",
            "--network.fourier=[2, 3]",
            "--diffusion.log-snr-min=-6",
            "--data.flip",
            "--steps=None",
        ],
    ],
    ids=["short", "assignments", "dotted"],
)
def test_keys_may_be_short_or_dotted(args):
    config = config_of(*args)
    assert config.training.lr == 1e-3
    assert config.network.fourier == (2, 3)
    assert config.diffusion.log_snr_min == -6
    assert config.data.flip
    assert config.training.steps is None


def test_data_path_may_be_written_as_a_key():
    assert short_flags(["data.path=photos/", "--data.path", "photos/"]) == ["photos/", "photos/"]


def test_a_switch_can_be_turned_off_by_a_key():
    assert short_flags(["data.flip=false"]) == ["--no-flip"]


@pytest.mark.parametrize(("kind", "network"), [("mlp", MLPConfig(width=8)), ("unet", UNetConfig())])
def test_kind_chooses_the_network(kind, network, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[network]\nkind = "mlp"\nwidth = 8\n')
    options = read(["digits", "--config", str(path), "--kind", kind], None)
    assert decode(options.run.values, "command line").network == network


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_mistake_is_one_line_whatever_the_terminal_can_show(encoding):
    args = ["-m", "perrin", "inspect", "x", "--jso"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stderr == "perrin: error: unrecognized options: --jso (perhaps you meant --json, --no-json)\n"


def test_text_that_is_no_box_becomes_one_line():
    assert one_line("some\n  text\n") == "some text"


@dataclass(frozen=True)
class Several:
    """Flags of several kinds."""

    count: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 1
    share: float = 0.5
    steps: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    near: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    named: tuple[str, int] | None = None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("-n x", "-n/--count must be a whole number, got 'x'"),
        ("--share x", "--share must be a number, got 'x'"),
        (
            "--steps 10 20 DATA",
            "--steps takes whole numbers, got 10 20 DATA: what belongs to no flag goes before --steps",
        ),
        ("--steps x", "--steps takes whole numbers, got x"),
        ("--size 1", "--size takes 2 whole numbers, got 1"),
        ("--size", "--size takes 2 whole numbers, got nothing"),
        ("--size 1 x", "--size takes 2 whole numbers, got 1 x"),
        ("--size 1 2 3", "--size takes 2 whole numbers, got 1 2 3"),
        (
            "--size 1 2 x",
            "--size takes 2 whole numbers, got 1 2 x: what belongs to no flag goes before --size",
        ),
        ("--near 1", "--near takes 2 numbers (LOW HIGH), got 1"),
        ("--named a b", "--named takes STR INT, got a b"),
    ],
)
def test_values_of_another_kind_are_told_without_the_parser_s_own_words(args, message):
    with pytest.raises(ConfigError) as caught:
        parse(Several, args.split(), command="several")
    assert str(caught.value) == message


@pytest.mark.parametrize("row", ["--beta-2", "--beta PATH", "--beta; by default 3.", "--beta, as above."])
def test_a_description_that_begins_a_row_with_a_flag_is_not_proposed(row):
    rows = [
        "Unknown: --alpha",
        "─" * 30,
        "Perhaps you meant:",
        "    --alpha-2 INT",
        "        Not that of",
        f"        {row}",
    ]
    box = "\n".join(["╭─ Unknown ─╮", *(f"│ {text:<30} │" for text in rows), "╰───╯"])
    assert one_line(box) == "unknown: --alpha (perhaps you meant --alpha-2 INT)"
