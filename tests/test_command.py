"""The command `transferkit`: its run folder, report, results, exit status, and what it refuses."""

import base64
import inspect
import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import transferkit as tk
from tiny import environment, make_images, python
from transferkit.command import actions
from transferkit.command.chart import chart
from transferkit.command.images import open_parts, open_training
from transferkit.command.main import COMMANDS, build_parser, main
from transferkit.data.samples import path_of
from transferkit.results.assessment import Assessment

NAMES = ("cat", "<b>dog & co", "owl")
NETWORK = ["--name", "vgg11", "--weights", "none", "--image-size", "32", "--device", "cpu", "--precision", "fp32"]
QUICK = [*NETWORK, "--freeze-until", "head", "--augment", "none"]


def write_images(folder: Path, count: int = 30, *, seed: int = 0, names: tuple[str, ...] = NAMES) -> Path:
    """Write images of three classes, one folder each."""
    images, targets = make_images(count, seed=seed)
    for index, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        path = folder / names[target] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with images in photos and a finished run in run, which tests only read."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "photos")
    moved = folder / "photos" / "owl" / "moved <i>.png"  # a wrong label and a copy
    shutil.copy(next((folder / "photos" / "cat").iterdir()), moved)
    assert main(["train", str(folder / "photos"), *QUICK, "--rejected", "0.5", "--folder", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos")


def parsed(*arguments: object) -> dict[str, object]:
    """The options that the command gets from a line."""
    return vars(build_parser().parse_args([*map(str, arguments)]))


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run the command; return its exit status and what it wrote on standard output and standard error."""
    capsys.readouterr()
    status = main([*map(str, arguments)])
    return status, *capsys.readouterr()


# ---- train


def test_a_run_folder_has_model_figures_settings_and_report(work):
    """All that a run leaves is there, and nothing else: no checkpoints that nobody needs any more."""
    names = {"model.pt", "report.html", "settings.json", "history.json", "assessment.json", "audit.csv"}
    assert {path.name for path in (work / "run").iterdir()} == names
    assert tk.load_model(work / "run" / "model.pt").classes == tuple(sorted(NAMES))
    assert json.loads((work / "run" / "history.json").read_text()) == {}  # of a solved head


def test_the_held_out_images_are_not_trained_on_and_all_others_are(photos):
    """Without val a part of each class is held out, in the proportion asked for."""
    parts = open_training(parsed("train", photos, "--validation-split", "0.2"))
    train, val = ({path_of(parts[name], index) for index in range(len(parts[name]))} for name in ("train", "val"))
    assert not train & val
    assert train | val == {str(path) for path in photos.rglob("*.png")}
    assert np.bincount([target for _, target in parts["val"]]).tolist() == [2, 2, 2]


def test_the_figures_are_those_of_the_saved_model_on_the_test_images(tmp_path, capsys):
    """With train, valid and test below the folder, the test images are assessed, and all of train is trained on."""
    for seed, part in enumerate(("Train", "valid", "test")):
        write_images(tmp_path / "photos" / part, 24, seed=seed)
    status, out, err = run(capsys, "train", tmp_path / "photos", *QUICK, "--folder", tmp_path / "run", "--json")
    shown = json.loads(out)
    assert status == 0
    assert err.count("features of 24 images: computed") == 1
    assert "features of 24 images: known already" in err.splitlines()[-2]  # the audit's
    trainer = tk.Trainer(tk.load_model(tmp_path / "run" / "model.pt"), device="cpu", precision="fp32")
    assessment = trainer.assess(ImageFolder(tmp_path / "photos" / "test"))
    assert shown["accuracy"] == assessment.accuracy
    assert shown["confusion_matrix"] == assessment.confusion_matrix().tolist()
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"24 of {tmp_path / 'photos' / 'Train'}" in page
    assert "on 24 images that it had not seen" in page


def test_the_command_in_the_settings_repeats_the_run_bit_for_bit(work, tmp_path):
    """The same command with another folder gives the same weights, for random initial weights too."""
    command = shlex.split(json.loads((work / "run" / "settings.json").read_text())["command"])
    assert command[0] == "transferkit"
    command[command.index("--folder") + 1] = str(tmp_path / "again")
    assert main([*command[1:], "--no-audit"]) == 0
    first, second = (tk.load_model(path / "model.pt") for path in (work / "run", tmp_path / "again"))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert first.temperature == second.temperature
    assert not (tmp_path / "again" / "audit.csv").exists()


def test_deeper_training_is_shown_epoch_by_epoch(tmp_path, capsys):
    """The history has a figure for each epoch, and the report a curve."""
    photos = write_images(tmp_path / "photos", 66)
    arguments = ["--freeze-until", "block5_conv2", "--epochs", "2", "--augment", "none", "--no-audit"]
    status, _, err = run(capsys, "train", photos, *NETWORK, *arguments, "--folder", tmp_path / "run")
    assert status == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history["val_loss"]) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<g class="s0">') == 3  # loss, accuracy, calibration
    assert ("the solved head stays" in page) == ("the solved head stays" in err)


# ---- the report


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(work):
    return Page((work / "run" / "report.html").read_text())


def test_the_report_is_one_page_without_scripts_and_network(page):
    """Every tag is closed, none runs code or loads a file, and pictures are in the page."""
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action", "background"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:")
        assert "url(" not in (attributes.get("style") or "")
    policy = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_report_tells_what_a_stranger_asks(work, page):
    """Classes, settings, versions, findings and how to load the model are in it, no name is taken for HTML."""
    for name in NAMES:
        assert name in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"b", "i"})
    settings = json.loads((work / "run" / "settings.json").read_text())
    assert settings["command"] in page.text
    for name, version in settings["versions"].items():
        assert name in page.text
        assert version in page.text
    assert f"tk.load_model({str(work / 'run' / 'model.pt')!r})" in page.text
    assert "moved <i>.png" in page.text
    assert "$" not in page.text


def test_pictures_in_the_report_are_small(page):
    """Each picture is a JPEG of at most 192 pixels."""
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert sources
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
        assert picture.format == "JPEG"
        assert max(picture.size) <= 192


# ---- the other commands


def test_predict_prints_a_line_for_each_image(work, capsys):
    """Path, class and probability, with tabs between: those of the library; folders are searched, whatever the case."""
    folder = work / "photos" / "owl"
    status, out, _ = run(capsys, "predict", work / "run", folder, work / "photos" / "cat" / "000.png")
    lines = [line.split("\t") for line in out.splitlines()]
    paths = [*sorted(map(str, folder.iterdir())), str(work / "photos" / "cat" / "000.png")]
    trainer = tk.Trainer(tk.load_model(work / "run" / "model.pt"))
    assert status == 0
    assert [path for path, _, _ in lines] == paths
    assert [name for _, name, _ in lines] == trainer.predict_classes(paths)
    assert [number for _, _, number in lines] == [f"{row.max():.4f}" for row in trainer.predict_proba(paths)]


def test_predict_as_json_has_every_probability(work, capsys):
    """Standard output is one JSON document, a record for each image, its classes in the order of their probability."""
    _, out, _ = run(capsys, "predict", work / "run" / "model.pt", work / "photos" / "cat" / "000.png", "--json")
    [record] = json.loads(out)
    assert sorted(record["probabilities"]) == sorted(NAMES)
    assert sum(record["probabilities"].values()) == pytest.approx(1)
    assert list(record["probabilities"].values()) == sorted(record["probabilities"].values(), reverse=True)
    assert record["classes"] == [max(record["probabilities"], key=record["probabilities"].get)]


def test_predict_names_what_is_unknown_and_what_cannot_be_read(work, tmp_path, capsys):
    """Images unlike the training images get the name asked for; a broken file gets no class where that is allowed."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"?")
    paths = sorted(map(str, (work / "photos").rglob("*.png")))
    command = ["predict", work / "run", broken, *paths, "--unknown", "?", "--precision", "fp32"]
    assert run(capsys, *command)[0] == 2
    status, out, _ = run(capsys, *command, "--on-bad-image", "nan")
    first, *lines = [line.split("\t") for line in out.splitlines()]
    expected = tk.Trainer(tk.load_model(work / "run" / "model.pt"), precision="fp32").predict_classes(
        paths, unknown="?"
    )
    assert status == 0
    assert first == [str(broken), "", "nan"]
    assert [name for _, name, _ in lines] == expected
    assert 0 < expected.count("?") < len(expected)


def test_predict_prints_each_label_where_there_may_be_several(tmp_path, capsys):
    """A model for several labels gets a line for each label that an image has, and none without any."""
    model = tk.attach_head(tk.load_backbone("vgg11", weights=None, image_size=32), ["a", "b", "c"])
    model.threshold = 0.5
    with torch.no_grad():
        model.head.logits.weight.zero_()
        model.head.logits.bias.copy_(torch.tensor([2.0, -2.0, 2.0]))
    tk.save_model(model, tmp_path / "model.pt")
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    _, out, _ = run(capsys, "predict", tmp_path / "model.pt", tmp_path / "x.png", "--precision", "fp32")
    assert [line.split("\t")[1:] for line in out.splitlines()] == [["a", "0.8808"], ["c", "0.8808"]]


def test_evaluate_takes_the_test_images(work, tmp_path, capsys):
    """Of train and test, test is assessed; the figures are those of `assess`."""
    for seed, part in enumerate(("train", "test")):
        write_images(tmp_path / part, 12 + 3 * seed, seed=seed + 5)
    status, out, err = run(capsys, "evaluate", work / "run", tmp_path, "--json", "--precision", "fp32")
    trainer = tk.Trainer(tk.load_model(work / "run" / "model.pt"), precision="fp32")
    shown, assessment = json.loads(out), trainer.assess(ImageFolder(tmp_path / "test"))
    assert status == 0
    assert "15 images" in err
    assert shown["loss"] == assessment.loss
    assert [row["name"] for row in shown["classes"]] == sorted(NAMES)


def test_audit_finds_what_the_library_finds(work, tmp_path, capsys):
    """A moved copy is found, and the file of findings is that of `Audit.to_csv`."""
    arguments = [*NETWORK, "--verbose", "0", "--to-csv", tmp_path / "found.csv", "--json"]
    status, out, _ = run(capsys, "audit", work / "photos", *arguments)
    copies = [each for each in json.loads(out)["findings"] if each["kind"] == "duplicate"]
    assert status == 0
    assert [Path(each["path"]).name for each in copies] == ["moved <i>.png"]
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 1 + len(json.loads(out)["findings"])


def test_info_describes_a_run_and_the_installation(work, capsys):
    """With a run folder the classes and the accuracy; without one, versions."""
    _, out, _ = run(capsys, "info", work / "run", "--json")
    assert json.loads(out)["classes"] == sorted(NAMES)
    assert json.loads(out)["accuracy"] == json.loads((work / "run" / "assessment.json").read_text())["accuracy"]
    _, out, _ = run(capsys, "info")
    assert f"torch        {torch.__version__.partition('+')[0]}" in out


@pytest.mark.slow
def test_an_exported_program_gives_the_same_probabilities(work, tmp_path, capsys):
    """torch runs the file without this library, and it holds the class names."""
    status, _, _ = run(capsys, "export", work / "run", tmp_path / "model.pt2")
    assert status == 0
    files = {"classes.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    assert json.loads(files["classes.json"]) == sorted(NAMES)
    photo = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    ours = tk.Trainer(tk.load_model(work / "run" / "model.pt"), device="cpu", precision="fp32").predict_proba(photo)
    assert np.abs(program(photo).numpy() - ours).max() < 1e-5


@pytest.mark.slow
def test_an_exported_onnx_file_gives_the_same_probabilities(work, tmp_path):
    """onnxruntime runs the file, and its metadata holds the class names."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export = command_line("export", work / "run", tmp_path / "model.onnx")  # the exporter leaves a thread behind
    subprocess.run(export, capture_output=True, env=environment(), check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == sorted(NAMES)
    photo = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    ours = tk.Trainer(tk.load_model(work / "run" / "model.pt"), device="cpu", precision="fp32").predict_proba(photo)
    assert np.abs(session.run(None, {"images": photo.numpy()})[0] - ours).max() < 1e-5


# ---- arguments


USED = {
    "train": [tk.load_backbone, tk.fine_tune, tk.Trainer.fit, tk.Trainer.learn_known],
    "predict": [tk.Trainer, tk.Trainer.predict_proba, tk.Trainer.predict_classes],
    "evaluate": [tk.Trainer, tk.Trainer.assess],
    "audit": [tk.load_backbone, tk.audit],
    "export": [tk.WithPreprocessing],
    "info": [],
}
"""The functions whose arguments the options of a command are."""

OWN = {"folder", "no_audit", "to_csv", "validation_split", "json"}
"""Options with a meaning of the command's own."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_an_argument_of_the_library(command, capsys):
    """An option has the name of an argument, and help that tells the library's default; so has every path."""
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert "usage: transferkit" in capsys.readouterr().out
    _, paths, options = COMMANDS[command]
    assert all(text for text, _ in paths.values())
    for name in options.keys() - OWN:
        parameters = [inspect.signature(function).parameters for function in USED[command]]
        default = next(each[name].default for each in parameters if name in each)
        shown = ",".join(default) if isinstance(default, tuple) else str(default)
        text = options[name][1]
        assert f"(default: {shown})" in text or (default in (None, False, 0.05, "auto") and "(default" not in text)


def test_an_option_that_is_not_written_is_left_to_the_library(photos):
    """Defaults are the library's: the command has no second copy of them."""
    assert parsed("train", photos) == {"command": "train", "DATA": photos}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "command"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "DATA"),
        (["train", "photos", "--budget", "soon"], "--budget"),
        (["train", "photos", "--image-szie", "32"], "--image-szie"),
        (["train", "photos", "--image", "32"], "--image"),  # no abbreviations: they may change their meaning
    ],
)
def test_arguments_that_cannot_be_parsed_end_with_one_line(arguments, words, capsys):
    """Exit status 2, one line on standard error that names the argument and says where help is."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert "--help" in err


# ---- what cannot be used


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere"], "no folder nowhere"),
        (["train", "photos/cat"], "Expected a folder of images for each class"),
        (["train", "photos", "--name", "vgg61"], "vgg16"),
        (["train", "photos", "--weights", "nosuch.pth"], "nosuch.pth"),
        (["train", "photos", "--image-size", "8"], "image_size"),
        (["train", "photos", "--budget", "-1"], "budget"),
        (["train", "photos", "--freeze-until", "blok5"], "block5"),
        (["train", "photos", "--layers", "block9"], "block9"),
        (["train", "photos", "--augment", "flop"], "flip"),
        (["train", "photos", "--device", "tpu"], "tpu"),
        (["train", "photos", "--on-bad-image", "ignore"], "on_bad_image"),
        (["train", "photos", "--validation-split", "2"], "validation_split"),
        (["train", "photos", "--verbose", "9"], "verbose"),
        (["train", "photos", "--folder", "photos/run"], "would be a class"),
        (["train", "photos", "--folder", "full"], "--folder full-2"),
        (["predict", "nosuch", "photos"], "nosuch"),
        (["predict", "full", "photos"], "model.pt"),
        (["evaluate", "nosuch.pt", "photos"], "nosuch.pt"),
        (["export", "nosuch.pt", "model.txt"], "FILE.onnx"),
        (["info", "nosuch.pt"], "nosuch.pt"),
        (["audit", "nowhere"], "no folder nowhere"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_used_ends_with_one_line(arguments, words, photos, capsys, monkeypatch):
    """Exit status 2, one line on standard error that names it, nothing on standard output, and no model."""
    monkeypatch.chdir(photos.parent)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    defaults = [word for pair in zip(QUICK[::2], QUICK[1::2], strict=True) if pair[0] not in arguments for word in pair]
    status, out, err = run(capsys, *arguments, *(defaults if arguments[0] == "train" else []))
    assert (status, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("transferkit: ")
    assert "Traceback" not in err
    assert not list(Path().rglob("*.pt"))
    assert [path.name for path in Path("full").iterdir()] == ["notes.txt"]


def test_a_finished_run_stays(work, capsys):
    """The run folder of a finished run is refused, with a free name that the shell takes."""
    before = {path: path.read_bytes() for path in (work / "run").iterdir()}
    status, _, err = run(capsys, "train", work / "photos", *QUICK, "--folder", work / "run")
    assert status == 2
    assert f"--folder {work / 'run'}-2" in err
    assert {path: path.read_bytes() for path in (work / "run").iterdir()} == before


def test_an_unfinished_run_continues_with_the_same_settings_alone(photos, capsys, tmp_path, monkeypatch):
    """Where there are checkpoints another seed is refused by name; the same command runs to the end."""
    command = ["train", photos, *QUICK, "--no-audit", "--folder", tmp_path / "run"]

    def interrupted(*_arguments, folder, **_options):
        (folder / "step-3.pt").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transferkit.command.actions.fine_tune", interrupted)
        assert run(capsys, *command)[0] == 130
    status, _, err = run(capsys, *command, "--seed", 3)
    assert status == 2
    assert "other settings (seed" in err
    assert "--seed" not in err.split("continues it:")[1]
    assert run(capsys, *command, "--verbose", 0)[0] == 0  # what the model does not depend on may differ
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_refused_command_can_be_corrected(photos, capsys, tmp_path):
    """After a misspelt layer the same folder is used with the right one: there is nothing to continue."""
    command = ["train", photos, *NETWORK, "--no-audit", "--folder", tmp_path / "run", "--freeze-until"]
    assert run(capsys, *command, "haed")[0] == 2
    assert run(capsys, *command, "head", "--augment", "none")[0] == 0


def test_classes_must_be_the_same_in_all_parts(tmp_path, capsys):
    """A class that test lacks is an error before training: indices would not match."""
    write_images(tmp_path / "photos" / "train")
    write_images(tmp_path / "photos" / "test", names=("cat", "bird", "owl"))
    status, _, err = run(capsys, "train", tmp_path / "photos", *QUICK, "--folder", tmp_path / "run")
    assert status == 2
    assert "expected the same classes" in err
    assert not (tmp_path / "run").exists()


def test_two_folders_for_one_part_are_refused(tmp_path, capsys):
    """val and validation beside each other: nobody knows which is meant."""
    for part in ("train", "val", "validation"):
        write_images(tmp_path / part, 6)
    status, _, err = run(capsys, "train", tmp_path, *QUICK)
    assert status == 2
    assert "needs one folder for each of train, val, test" in err


def test_a_class_may_be_called_test(tmp_path):
    """A folder of images called test, without folders below, is a class."""
    write_images(tmp_path, names=("test", "train", "val"))
    assert open_parts(tmp_path)["train"].classes == ["test", "train", "val"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_that_cannot_be_read_is_told_before_training(part, tmp_path, capsys):
    """The first one ends the command with its path, or all are left out, as the user says."""
    for seed, name in enumerate(("train", "test")):
        write_images(tmp_path / "photos" / name, seed=seed)
    broken = tmp_path / "photos" / part / "cat" / "000.png"
    broken.write_bytes(broken.read_bytes()[:100])
    command = ["train", tmp_path / "photos", *QUICK, "--no-audit", "--folder", tmp_path / "run"]
    status, _, err = run(capsys, *command)
    assert status == 2
    assert str(broken) in err.splitlines()[-1]
    assert "solved the head" not in err
    status, _, err = run(capsys, *command[:-1], tmp_path / "other", "--on-bad-image", "skip")
    assert status == 0
    assert "left out: cannot read image" in err
    assert str(broken) in err


def test_files_that_are_no_images_are_told(photos, capsys):
    """A photograph in a format that is not read is not left out in silence."""
    (photos / "cat" / "photo.heic").write_bytes(b"?")
    (photos / "cat" / ".hidden").write_bytes(b"?")
    images = open_parts(photos)["train"]
    assert len(images) == 30
    err = capsys.readouterr().err
    assert "1 files" in err
    assert "photo.heic" in err


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    """What is no error of the library or of the file system is not taken for bad input."""
    monkeypatch.setattr(actions, "versions", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_json_has_no_nan():
    """A class that is never predicted has no precision: null, since JSON has no NaN."""
    half = np.array([[0.6, 0.4], [0.7, 0.3]], np.float32)
    text = actions.to_json(actions.figures(Assessment(half, half[:, 0], np.array([0, 1]), ("cat", "dog"))))
    assert json.loads(text)["classes"][1]["precision"] is None


# ---- the chart


def test_a_chart_has_each_point_where_it_belongs():
    """The axes run from the first tick to the last, and a higher value is further up."""
    drawn = chart({"a": [(1, 0.0), (2, 0.5), (3, 1.0)]}, x="epoch", y="loss")
    dots = [attributes for tag, attributes in Page(drawn).tags if tag == "circle"]
    assert [(dot["cx"], dot["cy"]) for dot in dots] == [("52.0", "220.0"), ("240.0", "124.0"), ("428.0", "28.0")]


@pytest.mark.parametrize(
    "values", [[0.5], [2.0, 2.0], [0.0], [1e-9, 2e-9], [1e6, 3e6], [-1.0, 1.0], [float("nan"), 1.0]]
)
def test_a_chart_takes_any_numbers(values):
    """One point, equal ones, tiny and large ones are drawn within the picture; NaN is left out."""
    drawn = Page(chart({"<a>": list(enumerate(values))}, x="x", y="y"))
    dots = [attributes for tag, attributes in drawn.tags if tag == "circle"]
    assert len(dots) == sum(value == value for value in values)
    assert all(52 <= float(dot["cx"]) <= 428 and 28 <= float(dot["cy"]) <= 220 for dot in dots)
    assert "<a>" in drawn.text


# ---- in a terminal and in a pipe


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "transferkit", *map(str, arguments)]


@pytest.mark.slow
def test_results_can_be_piped(work):
    """Standard output holds the results alone; a reader that stops early is no error."""
    predict = command_line("predict", work / "run", work / "photos", "--json")
    done = subprocess.run(predict, capture_output=True, text=True, env=environment(), check=True)
    assert len(json.loads(done.stdout)) == 31
    assert done.stderr == ""
    many = command_line("predict", "--json", work / "run", *[work / "photos"] * 20)  # more than a pipe holds
    piped = f"set -o pipefail; {shlex.join(many)} | head -c 1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[", "")


@pytest.mark.slow
def test_a_run_that_was_ended_continues(tmp_path):
    """SIGTERM ends training with exit status 143 and no traceback; the same command finishes the run."""
    photos = write_images(tmp_path / "photos", 66)
    arguments = ["--freeze-until", "block5", "--epochs", "6", "--augment", "none", "--no-audit"]
    command = command_line("train", photos, *NETWORK, *arguments, "--folder", tmp_path / "run")
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as running:
        for line in running.stderr:
            if line.startswith("epoch 1 "):
                running.send_signal(signal.SIGTERM)
                break
        err = running.stderr.read()
    assert running.returncode == 143
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "model.pt").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert "epoch 1 " not in done.stderr
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())["loss"]) == 6
    assert (tmp_path / "run" / "report.html").exists()


HELP = """
import sys
from transferkit.command.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    print([name for name in ("torch", "numpy", "transferkit.api") if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["trian"]], ids=" ".join)
def test_help_comes_without_torch(arguments):
    """Help, and the line for a misspelt command, do not wait for torch: the library is imported when it is used."""
    assert python(HELP, *arguments).endswith("[]\n")


@pytest.mark.slow
def test_the_library_does_not_import_its_command():
    """A program that uses the library reads no part of the command."""
    program = (
        "import sys, transferkit; transferkit.Trainer; print(*filter(lambda name: '.command' in name, sys.modules))"
    )
    assert python(program) == "\n"
