"""Arguments of the command, its exit status, and what goes to standard output."""

import argparse
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from transferkit.command import actions, train
from transferkit.data_audit import audit
from transferkit.errors import TransferKitError
from transferkit.fine_tune import fine_tune
from transferkit.model.backbone import load_backbone
from transferkit.trainer import Trainer

UNUSABLE = 2
"""Exit status where arguments, images or files cannot be used; a line on standard error says why."""

INTERRUPTED = 130

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


def _or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _names(text: str) -> list[str] | None:
    return None if text.lower() == "none" else text.split(",")


OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "name": (str, "vgg11, vgg13, vgg16, vgg19, or one of these with _bn"),
    "weights": (_or_none, "DEFAULT downloads ImageNet weights once; or the file of a state dict; none is random"),
    "image_size": (int, "pixels; 224 suits photographs, 64 is ten times faster"),
    "preprocessing": (str, "of a file's weights: IMAGENET1K_V1, IMAGENET1K_FEATURES or KERAS"),
    "budget": (float, "seconds for training (without it the number of images decides)"),
    "layers": (_names, "whose outputs the head sees, such as block4,block5 (without it the last three blocks)"),
    "freeze_until": (_or_none, "first layer that trains: head, block5, block4_conv1, ...; none trains all"),
    "epochs": (int, "of training the last layers (without it the budget decides)"),
    "lr": (float, "learning rate of training the last layers (without it 1e-4)"),
    "batch_size": (int, "images in a step"),
    "augment": (_names, "of flip,crop,color,trivial; or none"),
    "device": (str, "auto, cuda, cuda:1, mps or cpu"),
    "precision": (str, "auto, bf16, fp16 or fp32"),
    "cache": (str, "a folder for features, which later runs need not compute again"),
    "seed": (int, "everything random depends on it"),
    "on_bad_image": (str, "raise ends at the first image that cannot be read, skip leaves out up to 1 %%"),
    "num_workers": (int, "processes that read images"),
    "verbose": (int, "0 shows no progress, 1 lines and bars, 2 lines"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(UNUSABLE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command; each option has the default of the library's argument of that name."""
    formats: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser("transferkit", description=ABOUT, epilog=AFTERWARDS, **formats)
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)

    def command(name: str, action: Callable[..., Any], **paths: tuple[str, Any]) -> Any:
        usage, about = f"%(prog)s [options] {' '.join(paths)}", inspect.getdoc(action) or ""
        first = about.partition(".")[0]
        part = commands.add_parser(name, help=first, description=about, usage=usage, **formats)
        part.set_defaults(action=action)
        for path, (text, count) in paths.items():
            part.add_argument(path, type=Path, nargs=count, help=text)
        part.add_argument("--json", action="store_true", help="show results as JSON")
        return part

    data = ("folder of images", None)
    model = ("run folder, or file of transferkit.save_model", None)
    part = command("train", train.train, data=data)
    part.add_argument("--folder", type=Path, help="run folder (default: runs/ and the name of the data)")
    part.add_argument("--validation-split", type=float, default=0.1, help="to hold out without val/ (default: 0.1)")
    part.add_argument("--audit", action=argparse.BooleanOptionalAction, default=True, help="audit the images, too")
    _add(part, load_backbone)
    _add(part, fine_tune)
    part = command("predict", actions.predict, model=model, images=("image files, or folders that have some", "+"))
    _add(part, Trainer, ("device", "precision"))
    _add(part, Trainer.predict_proba, ("num_workers",))
    part = command("evaluate", actions.evaluate, model=model, data=data)
    _add(part, Trainer, ("device", "precision"))
    _add(part, Trainer.assess, ("num_workers",))
    part = command("audit", actions.find, data=data)
    part.add_argument("--to-csv", type=Path, metavar="FILE", help="write all findings to a file")
    _add(part, load_backbone)
    _add(part, audit)
    command("export", actions.export, model=model, path=("FILE.pt2 for torch.export, or FILE.onnx", None))
    command("info", actions.info, model=(model[0], "?"))
    return parser


def _add(parser: argparse.ArgumentParser, function: Callable[..., Any], names: Iterable[str] = OPTIONS) -> None:
    """Add the options that are arguments of a function, with its defaults."""
    group = parser.add_argument_group(f"arguments of transferkit.{function.__qualname__}")
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in names:
            continue
        kind, text = OPTIONS[name]
        default = parameter.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        text = text if default is None else f"{text} (default: {shown})"
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=kind, default=default, help=text, metavar=name.upper().split("_")[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Arguments after the command's name; None takes the process's own.

    Raises:
        SystemExit: When arguments cannot be parsed, help was asked for, or SIGTERM ended the work.

    Example:
        >>> main(["info", "runs/nothing"])
        2
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(arguments)
    options.command = shlex.join(["transferkit", *arguments])
    try:
        with redirect_stdout(sys.stderr):  # the library shows its progress on standard output
            text, data = options.action(options)
        print(actions.to_json(data) if options.json else text, flush=True)  # noqa: T201
    except BrokenPipeError:  # whoever reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TransferKitError, OSError) as error:
        sys.stderr.write(f"transferkit: {' '.join(str(error).split())}\n")
        return UNUSABLE
    except KeyboardInterrupt:
        sys.stderr.write("transferkit: interrupted\n")
        return INTERRUPTED
    return 0
