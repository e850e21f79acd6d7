"""The entry of the command line: picks the command and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from perrin import __version__
from perrin.errors import ConfigError, PerrinError

COMMANDS = {
    "train": "train a model on your data, or go on with a run",
    "train-classifier": "train a classifier of a run's noisy images, which can guide its samples",
    "sample": "draw samples from a run, by any sampler, guided or not",
    "interpolate": "draw what lies between two samples, or between two of your images",
    "inpaint": "fill in the rest of images of which a part is known",
    "vary": "draw variations of images, from an intermediate noise level",
    "invert": "find the noise that a run makes given images of, and how exactly",
    "reconstruct": "measure how well inverted images come back, against the number of steps",
    "likelihood": "measure bits per dimension, with a standard error and one row per example",
    "compare": "measure the difference of two runs, checkpoints or numbers of steps on the same images and noise",
    "calibrate": "find the variances and timesteps with which a run, as it is, has the best bound",
    "compress": "compress images or arrays losslessly with a run as the model",
    "decompress": "restore what compress wrote, bit for bit",
    "anomaly": "score how unlike its training data each example is",
    "verify": "check samplers and likelihoods against closed forms on this machine",
    "inspect": "show what a run is: configuration, data, checkpoints, schedule, last metrics",
    "demo": "train, sample and measure a model of handwritten digits in about a minute",
}

HELP = f"""usage: perrin [-h] [--version] COMMAND ...

Gaussian diffusion models you can measure.

commands:
{"".join(f"  {name:<18}{text}{chr(10)}" for name, text in COMMANDS.items())}
`perrin COMMAND --help` lists what a command takes; with --json each prints one JSON object."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (the process's own by default) and return the exit code.

    0: done, or help. 1: a check of `perrin verify` failed. 2: a mistake of the caller's, told in one line on
    standard error. 130: interrupted. 141: nobody reads on.
    """
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except PerrinError as error:
        print(f"perrin: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"perrin: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a file of the user's that cannot be read or written
        what = "" if error.filename is None else f"{error.filename}: "
        print(f"perrin: error: {what}{error.strerror or error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # --help
        return int(stop.code or 0)


def _dispatch(args: list[str]) -> int:
    first = args[0] if args else None
    if first in ("-h", "--help"):
        print(HELP)
        return 0
    if first == "--version":
        print(f"perrin {__version__}")
        return 0
    if first not in COMMANDS:
        found = "none" if first is None else repr(first)
        raise ConfigError(f"the first argument must be a command, one of {', '.join(COMMANDS)}; got {found}")
    return import_module(f"perrin.cli.{first.replace('-', '_')}").run(args[1:]) or 0
