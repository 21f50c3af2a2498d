"""Arguments of the command, its help and its exit status, without torch: help comes at once."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from transferkit.errors import TransferKitError

UNUSABLE = 2  # exit status where arguments, images or files cannot be used

ABOUT = """\
Transfer learning for image classification with VGG networks pretrained on ImageNet.

Put the images of each class into a folder of its own: photos/daisy/1.jpg, photos/rose/1.jpg. Then
  transferkit train photos --budget 60       trains for a minute and writes runs/photos/report.html
  transferkit predict runs/photos new.jpg    predicts the class of other images
Options are arguments of the Python library: --image-size 64 is image_size=64.
"""

AFTERWARDS = """\
Progress goes to standard error, results to standard output, with --json as one JSON document.
Exit status: 0 done; 2 arguments, images or files cannot be used, as one line says; 130 interrupted by Ctrl-C;
143 ended by SIGTERM; 1 a bug, with a traceback.
"""

TRAIN = """\
Train on a folder with a folder of images for each class, or one with train/ and val/, test/ or both.

First, a linear head is solved on the frozen network. Then the last layers are trained from there, if the budget
allows, and kept if that is better on the held-out images: those of val/, else a tenth of the training images.
Ctrl-C ends training early and keeps the best model so far. If a run is killed, the same command continues it.
  transferkit train photos --budget 60 --image-size 64    a minute, on a CPU
  transferkit train photos --freeze-until head            only the head: seconds once the images have been read
  transferkit train photos --weights vgg16.pth --preprocessing IMAGENET1K_V1    without a network connection
"""

AUDIT = """\
Look for wrong labels, copies, images unlike the rest, and images of train/ that are also in val/ or test/.
The text shows the first findings of each kind; --to-csv and --json have all.
"""
PREDICT = """\
Predict the classes of images: a line of path, class and probability for each.
With --json each image has the probabilities of all classes, the most probable first.
"""

DATA = {"DATA": ("folder of images", None)}
MODEL = {"MODEL": ("run folder, or file of transferkit.save_model", None)}


def _or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _names(text: str) -> list[str] | None:
    return None if text.lower() == "none" else text.split(",")


Options = Mapping[str, tuple[Callable[[str], Any], str]]  # what reads a value (bool: there is none), and help
COMPUTING: Options = {
    "device": (str, "auto, cuda, cuda:1, mps or cpu (default: auto)"),
    "precision": (str, "auto, bf16, fp16 or fp32 (default: auto)"),
    "num_workers": (int, "processes that read images (default: 0)"),
}
NETWORK: Options = {
    "name": (str, "vgg11, vgg13, vgg16, vgg19, or one of these with _bn (default: vgg16)"),
    "weights": (
        _or_none,
        "DEFAULT downloads ImageNet's once; or a state dict's file; none is random (default: DEFAULT)",
    ),
    "image_size": (int, "pixels; 64 is ten times faster than 224, which suits photographs (default: 224)"),
    "preprocessing": (str, "of a file's weights: IMAGENET1K_V1, IMAGENET1K_FEATURES or KERAS (default: auto)"),
    "geometry": (str, "how images become square: crop, torchvision, letterbox or squash (without it crop)"),
    "layers": (_names, "whose outputs the head sees, such as block4,block5 (without it the last three blocks)"),
    "cache": (str, "folder for features, which later runs need not compute again (without it, memory)"),
    "seed": (int, "everything random depends on it (default: 0)"),
    "verbose": (int, "0 shows no progress, 1 lines and bars, 2 lines (default: 1)"),
}

COMMANDS: Mapping[str, tuple[str, Mapping[str, tuple[str, str | None]], Options]] = {
    "train": (
        TRAIN,
        DATA,
        {
            "folder": (Path, "run folder (default: runs/ and the name of the data)"),
            "budget": (float, "seconds for training (without it the number of images decides)"),
            "freeze_until": (_or_none, "first layer that trains: head, block5, ...; none trains all (default: auto)"),
            "epochs": (int, "of training the last layers (without it the budget decides)"),
            "lr": (float, "learning rate of training the last layers (without it 3e-4)"),
            "batch_size": (int, "images in a step (default: 32)"),
            "augment": (_names, "some of flip,crop,color,trivial; or none (default: flip,crop)"),
            "validation_split": (float, "to hold out where there is no val/ (default: 0.1)"),
            "on_bad_image": (str, "skip leaves out images that cannot be read, up to 1 %% (default: raise)"),
            "rejected": (float, "learn to know the training images; this share, such as 0.05, counts as unknown"),
            "no_audit": (bool, "leave out the audit of the training images"),
            **NETWORK,
            **COMPUTING,
        },
    ),
    "predict": (
        PREDICT,
        {**MODEL, "IMAGES": ("image files, or folders that have some", "+")},
        {
            "unknown": (str, "name for images unlike the training images; needs a model of train --rejected"),
            "on_bad_image": (str, "nan gives no class to an image that cannot be read (default: raise)"),
            **COMPUTING,
        },
    ),
    "evaluate": (
        "Compare predictions with labels: those of test/, else of val/, else of all images.",
        {**MODEL, **DATA},
        COMPUTING,
    ),
    "audit": (AUDIT, DATA, {"to_csv": (Path, "file for all findings"), **NETWORK, **COMPUTING}),
    "export": (
        "Write model and preprocessing as one program, which torch or ONNX runs without transferkit.",
        {**MODEL, "FILE": ("FILE.pt2 for torch.export, or FILE.onnx", None)},
        {"unknown": (bool, "the program tells also how unlike the training images each image is, above 0 unknown")},
    ),
    "info": ("Describe a model or, without one, versions and device.", {"MODEL": (MODEL["MODEL"][0], "?")}, {}),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(UNUSABLE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command. It gives the options that were written; others have the library's defaults."""
    formats: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser("transferkit", description=ABOUT, epilog=AFTERWARDS, **formats)
    commands = parser.add_subparsers(title="commands", metavar="command", dest="command", required=True)
    for name, (about, paths, options) in COMMANDS.items():
        usage, first = f"%(prog)s [options] {' '.join(paths)}", about.partition(".")[0]
        part = commands.add_parser(name, help=first, description=about, usage=usage, **formats)
        for path, (text, count) in paths.items():
            part.add_argument(path, type=Path, nargs=count, help=text)
        for option, (kind, text) in {**options, "json": (bool, "show results as JSON")}.items():
            how: dict[str, Any] = {"action": "store_true"}
            if kind is not bool:
                how = {"type": kind, "metavar": option.upper().split("_")[-1]}
            part.add_argument(f"--{option.replace('_', '-')}", help=text, default=argparse.SUPPRESS, **how)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, by default with the arguments of the process, and return its exit status.

    Example:
        >>> main(["info", "runs/nothing"])
        2
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = vars(build_parser().parse_args(arguments))
    try:
        with redirect_stdout(sys.stderr):  # the library shows its progress on standard output
            from transferkit.command import actions

            run: Callable[..., tuple[str, Any]] = getattr(actions, f"run_{options['command']}")
            text, data = run({**options, "command": shlex.join(["transferkit", *arguments])})
        print(actions.to_json(data) if "json" in options else text, flush=True)  # noqa: T201
    except BrokenPipeError:  # whoever reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TransferKitError, OSError) as error:
        sys.stderr.write(f"transferkit: {' '.join(str(error).split())}\n")
        return UNUSABLE
    except KeyboardInterrupt:
        sys.stderr.write("transferkit: interrupted\n")
        return 130
    return 0
