"""`audit`: likely wrong labels, copies, leaks and images unlike the rest."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import transferkit as tk
from tiny import CLASSES, make_backbone, make_images
from transferkit import audit
from transferkit.analysis.duplicates import find_copies, thumbnails
from transferkit.analysis.labels import find_limit, find_wrong_labels
from transferkit.analysis.outliers import distances, nearest, unlike
from transferkit.errors import ArgumentError

PLAIN = {"device": "cpu", "precision": "fp32", "verbose": 0}


def audited(data: object, validation: object = None, **arguments: object) -> object:
    return audit(make_backbone(), data, validation, classes=CLASSES, **PLAIN, **arguments)


def photographs(count: int, *, side: int = 48, seed: int = 0) -> torch.Tensor:
    """Smooth pictures with some detail, none like another."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noise = 0.05 * torch.randn(count, 3, side, side, generator=generator)
    return ((smooth + noise) * 255).clamp(0, 255).to(torch.uint8)


def as_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


# ---- labels


def test_exchanged_labels_are_found():
    """Labels that were exchanged are named first, each with the class that the image looks like."""
    images, targets = make_images(120)
    wrong = [3, 40, 77, 111]
    given = targets.clone()
    given[wrong] = (targets[wrong] + 1) % 3
    found = audited((images, given)).of("label")
    assert {each.index for each in found[:4]} == set(wrong)
    for each in found[:4]:
        assert each.label == CLASSES[given[each.index]]
        assert each.detail.startswith(f"looks like {CLASSES[targets[each.index]]} (")
        assert each.score < 0.5
    assert [each.score for each in found] == sorted(each.score for each in found)


def test_a_head_that_saw_the_image_would_not_tell():
    """The probabilities are out of fold: on labels of pure chance the head is no better, and the check says so."""
    images, _ = make_images(120)
    found = audited((images, torch.randint(0, 3, (120,), generator=torch.Generator().manual_seed(0))))
    assert found.assessment.accuracy < 0.5
    assert found.precision < 0.5


def test_an_image_that_is_hard_is_not_called_wrong():
    """A label is suspected only where it is as improbable as labels that were exchanged on purpose."""
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.55, 0.45], [0.95, 0.05]])
    assert find_wrong_labels(probabilities, torch.tensor([0, 0, 1, 1, 1]), 0.1).tolist() == [4]
    own = torch.tensor([0.01, 0.02, 0.03, 0.3, 0.6, 0.9])
    exchanged = torch.tensor([True, False, True, False, False, False])
    assert find_limit(own, exchanged) == pytest.approx(0.3)
    assert find_limit(own, ~exchanged & (own > 0.8)) == 0.0


def test_all_images_are_held_out_once_however_many(monkeypatch):
    """Where the penalty is chosen by one fold only, every image still gets a probability of a head without it."""
    monkeypatch.setattr("transferkit.linear.choice.ONE_FOLD_ROWS", 10)
    images, targets = make_images(60)
    found = audited((images, targets))
    np.testing.assert_allclose(found.assessment.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (found.assessment.predicted == targets.numpy()).mean() > 0.9
    assert found.precision == 1.0  # all labels exchanged on purpose are found


# ---- copies


@pytest.mark.parametrize("change", ["none", "mirrored", "jpeg", "mirrored jpeg", "smaller", "larger"])
def test_a_copy_is_found(change):
    """The same picture is found again after compression, resizing and mirroring."""
    images = list(photographs(40))
    copy = images[11]
    if "mirrored" in change:
        copy = copy.flip(2)
    if "jpeg" in change:
        copy = as_jpeg(copy, 50)
    if change in ("smaller", "larger"):
        side = 30 if change == "smaller" else 100
        copy = torch.nn.functional.interpolate(copy[None].float(), (side, side), mode="bicubic", antialias=True)[0]
        copy = copy.round().clamp(0, 255).to(torch.uint8)
    images.insert(30, copy)
    (found,) = find_copies(thumbnails(images))
    assert (found.index, found.of, found.mirrored) == (30, 11, "mirrored" in change)


def test_other_pictures_are_no_copies():
    """Different pictures, gray ones, dark ones and ones of one color are told apart."""
    images = photographs(60)
    images[10:20] //= 16
    images[20:30] = images[20:30].float().mean(dim=1, keepdim=True).to(torch.uint8)
    for row, level in enumerate((0, 60, 120, 180)):
        images[row] = level
    assert find_copies(thumbnails(images)) == []


def test_many_equal_images_are_copies_of_the_first():
    """A thousand blank images are found in one pass, each as a copy of the first."""
    images = torch.full((1000, 3, 16, 16), 80, dtype=torch.uint8)
    images[:5] = photographs(5, side=16)
    found = find_copies(thumbnails(images))
    assert [(copy.index, copy.of) for copy in found] == [(index, 5) for index in range(6, 1000)]


def test_blocks_do_not_change_the_copies(monkeypatch):
    """Compared a few rows at a time, the same copies are found."""
    images = torch.cat([photographs(30), photographs(30)[:7]])
    whole = find_copies(thumbnails(images))
    monkeypatch.setattr("transferkit.analysis.duplicates._BLOCK_NUMBERS", 100)
    assert find_copies(thumbnails(images)) == whole
    assert [(copy.index, copy.of) for copy in whole] == [(30 + index, index) for index in range(7)]


def test_a_leak_names_both_images(tmp_path):
    """A validation image that is a training image is a leak, with both files; another label is said."""
    images = photographs(24)
    for part, places in (("train", range(20)), ("val", [20, 21, 3, 22])):
        for place in places:
            folder = tmp_path / part / CLASSES[(place + (part == "val")) % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[place].permute(1, 2, 0).numpy()).save(folder / f"{place:02}.png")
    found = audit(make_backbone(), ImageFolder(tmp_path / "train"), ImageFolder(tmp_path / "val"), **PLAIN)
    (leak,) = found.of("leak")
    assert leak.path.endswith("03.png")
    assert leak.other_path.endswith("03.png")
    assert "val" in leak.path
    assert "train" in leak.other_path
    assert leak.detail == f"same pixels as {leak.other_path}, labeled {CLASSES[0]}"
    assert found.of("duplicate") == []
    assert len(found.plot("leak").axes[0].child_axes) == 1


# ---- unlike the rest


def test_what_is_unlike_the_rest_is_named():
    """A black image, a white one and one of another shape and size are found; the others are not."""
    images = list(photographs(60))
    images[4], images[9] = torch.zeros(3, 48, 48, dtype=torch.uint8), torch.full((3, 48, 48), 255, dtype=torch.uint8)
    images[17] = photographs(1, side=400, seed=5)[0][:, :100]

    class Given(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int) -> tuple[object, int]:
            return images[index], index % 3

    found = audited(Given())
    assert {(each.index, each.detail.split()[1]) for each in found.of("brightness")} == {(4, "darker"), (9, "brighter")}
    assert [(each.index, each.detail) for each in found.of("size")] == [(17, "400 x 100 pixels, unlike the others")]


def test_equal_sizes_and_lights_are_nothing_to_report():
    """Where all images have one size, none is unlike the rest, and rounding is no difference."""
    found = audited((photographs(30), torch.arange(30) % 3))
    assert found.of("size") == found.of("brightness") == []


def test_a_row_far_from_all_others_is_the_farthest():
    """The distance is that to the nearest others: two rows near each other are not far, however far from the rest."""
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    rows[:, 0] += 3
    rows[7] = torch.tensor([-3.0, 3, 0, 0, 0, 0, 0, 0])
    assert int(distances(rows).argmax()) == 7
    assert unlike(distances(rows).log())[7] > 3.5
    indices, cosines = nearest(rows, rows[7:8], count=2)
    assert int(indices[0, 0]) == 7
    assert float(cosines[0, 0]) == pytest.approx(1)


# ---- what it returns


def test_findings_are_printed_written_and_drawn(tmp_path):
    """The summary has a line for each kind and the check; the file a line for each finding; the picture its titles."""
    pytest.importorskip("matplotlib")
    images, targets = make_images(60)
    images[50] = images[2]
    found = audited((images, targets))
    text = str(found)
    assert "     1  copies of another training image\n        image 50: same pixels as image 2" in text
    assert "     0  labels that are likely wrong" in text
    assert "Look before you delete: when 5 % of the labels were exchanged on purpose" in text
    found.to_csv(tmp_path / "audit.csv")
    with (tmp_path / "audit.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.findings) >= 1
    assert {"kind", "index", "path", "label", "score", "detail", "other", "other_path"} == set(rows[0])
    assert [row["other"] for row in rows if row["kind"] == "duplicate"] == ["2"]
    titles = [part.get_title() for part in found.plot("duplicate").axes[0].child_axes]
    assert titles == [f"50: {CLASSES[2]}\nsame pixels as image 2"]
    assert found.plot("leak").axes[0].child_axes == []  # there are no validation images
    with pytest.raises(ArgumentError, match="kind"):
        found.plot("blurred")


def test_each_image_is_read_once(monkeypatch):
    """Features, thumbnails and sizes come from one pass over the images, however many workers read them."""
    images, targets = make_images(30)
    read = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            read.append(index)
            return images[index], int(targets[index])

    monkeypatch.setattr("transferkit.data.samples.Samples.why_not_repeatable", lambda *_: None)  # reads some twice
    audited(Counted())
    assert sorted(read) == sorted([0, *range(30)])  # the first one once more, to see that the data can be used


@pytest.mark.parametrize("form", ["arrays", "data set"])
def test_its_features_are_those_of_later_runs(tmp_path, capsys, form):
    """Features in a folder serve whoever trains on the same images, also images larger than the network takes."""
    images, targets = photographs(12), torch.arange(12) % 3
    data = (images, targets) if form == "arrays" else list(zip(images, targets.tolist(), strict=True))
    audited(data, cache=tmp_path)
    model = tk.freeze_until(tk.attach_head(make_backbone(), CLASSES), "head")
    tk.cache_features(model, data, cache=tmp_path, device="cpu", precision="fp32", verbose=2)
    assert "features of 12 images: known already" in capsys.readouterr().out


def test_a_loader_that_shuffles_is_refused_before_any_work():
    """A `DataLoader` in order is its data set; one in another order is refused, as training or validation images."""
    data = make_images(24)
    plain = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=8)
    assert len(audited(plain, plain).of("leak")) == 24
    shuffled = torch.utils.data.DataLoader(plain.dataset, shuffle=True)
    for given in [(shuffled, None), (data, shuffled)]:
        with pytest.raises(ArgumentError, match=r"DataLoader .* cannot be audited: pass its Dataset"):
            audited(*given)


def test_the_model_and_the_generators_stay():
    """Nothing of the backbone changes, and no global random number is drawn."""
    backbone = make_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    audit(backbone, make_images(30), classes=CLASSES, **PLAIN)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
