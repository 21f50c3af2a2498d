"""What a model does not know: learnt from training images, kept, saved and exported."""

import copy

import numpy as np
import pytest
import torch

import transferkit as tk
from tiny import make_backbone, make_images, make_model, make_trainer
from transferkit.analysis.unknown import learn_known
from transferkit.errors import ArgumentError, CheckpointError


def solved_trainer(**head: object) -> tk.Trainer:
    trainer = make_trainer(make_model(make_backbone(), "head", **head))
    if head:
        trainer.fit(make_images(90), epochs=3, verbose=0)
    else:
        trainer.solve(make_images(90), verbose=0)
    return trainer


def strange_images(count: int = 30) -> torch.Tensor:
    """Images in which all channels are bright: none of the three classes."""
    images, _ = make_images(count, seed=9)
    return images // 4 + 190


# ---- the measure


def test_features_between_the_classes_are_unknown():
    """What lies between two classes is farther than what lies in one, however far the classes spread along an axis."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 2
    features = torch.randn(300, 4, generator=generator) * torch.tensor([1.0, 1.0, 30.0, 0.1])
    features[:, 0] += 12 * targets
    known = learn_known(features, targets, rejected=0.05)
    own = known(torch.tensor([[0.0, 0, 0, 0], [12.0, 0, 50, 0]]))
    assert bool((own < 0).all())
    assert bool((known(torch.tensor([[6.0, 0, 0, 0]])) > 0).all())


@pytest.mark.parametrize("rejected", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("given", [True, False])
def test_the_stated_share_of_new_images_is_rejected(rejected, given):
    """Of new images of the same classes, about the share asked for is called unknown, with held-out images or not."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(5, 20, generator=generator) * 3

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.arange(count) % 5
        return centres[targets] + torch.randn(count, 20, generator=generator), targets

    features, targets = draw(400)
    known = learn_known(features, targets, rejected=rejected, held_out=draw(1000)[0] if given else None)
    share = (known(draw(2000)[0]) > 0).float().mean().item()
    assert share == pytest.approx(rejected, abs=0.05)


def test_a_class_without_images_is_no_centre():
    """Classes that have no training image are left out, and few images are enough for a finite measure."""
    known = learn_known(
        torch.randn(6, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 3, 3, 3]), rejected=0.5
    )
    assert known.centres.shape[0] == 2
    assert bool(known(torch.randn(4, 50)).isfinite().all())


# ---- in the trainer


@pytest.mark.parametrize("head", [{}, {"hidden": (16,)}], ids=str)
def test_strange_images_are_called_unknown(head):
    """Images of no class get the name of the unknown, and images of the classes keep theirs."""
    trainer = solved_trainer(**head)
    trainer.learn_known(make_images(120))  # of 72 features each
    images, _ = make_images(60, seed=4)
    plain = trainer.predict_classes(images)
    named = trainer.predict_classes(images, unknown="?")
    assert all(name in ("?", expected) for name, expected in zip(named, plain, strict=True))
    assert named.count("?") < 15
    assert trainer.predict_classes(strange_images(), unknown="?").count("?") > 20
    passed = []
    trainer.model.backbone.features[0].register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    assert trainer.predict_classes(iter(list(images)), unknown="?") == named
    assert sum(passed) == 60  # both from one pass
    scores = trainer.novelty(images)
    assert scores.shape == (60,)
    assert [name == "?" for name in named] == (scores > 0).tolist()


def test_any_head_can_learn_it():
    """A head over a flattened output, and one of the user's own, have features to measure as well."""
    own = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    for trainer in (solved_trainer(pooling="flatten"), solved_trainer(head=own)):
        trainer.learn_known(make_images(90), rejected=0.1)
        assert 0 < (trainer.novelty(make_images(90)[0]) > 0).mean() < 0.2


def test_assess_counts_the_unknown():
    """An assessment has the score of each image and says how many are unknown."""
    trainer = solved_trainer()
    assert trainer.assess(make_images(30)).novelty is None
    trainer.learn_known(make_images(90), make_images(45, seed=3), rejected=0.2)
    assessment = trainer.assess(make_images(45, seed=3))
    np.testing.assert_allclose(assessment.novelty, trainer.novelty(make_images(45, seed=3)[0]), rtol=1e-4, atol=1e-4)
    assert f"{(assessment.novelty > 0).mean():.1%} unknown" in str(assessment)
    assert (assessment.novelty > 0).sum() == 9


def test_what_was_learnt_is_forgotten_when_training_goes_on():
    """Other weights make other features: after fit there is no measure, and asking for it says what to call."""
    trainer = solved_trainer()
    trainer.learn_known(make_images(90))
    trainer.fit(make_images(90), epochs=1, verbose=0)
    assert trainer.model.novelty is None
    with pytest.raises(ArgumentError, match=r"call trainer\.learn_known\(training_images\) first"):
        trainer.predict_classes(make_images(3)[0], unknown="?")


def test_no_prediction_changes():
    """Probabilities are bit for bit those of before."""
    trainer = solved_trainer()
    images, _ = make_images(30, seed=2)
    before = trainer.predict_proba(images)
    trainer.learn_known(make_images(90))
    assert np.array_equal(trainer.predict_proba(images), before)


def test_several_labels_are_refused():
    """Where an image may have several labels there is no nearest class."""
    images, targets = make_images(30)
    trainer = make_trainer(make_model(make_backbone(), "head"), loss=tk.BinaryCrossEntropy())
    with pytest.raises(ArgumentError, match="one label each"):
        trainer.learn_known((images, torch.nn.functional.one_hot(targets, 3)))


# ---- saved, loaded, exported


@pytest.mark.parametrize("frozen", [True, False])
def test_it_is_saved_with_the_model(tmp_path, frozen):
    """A model that is saved and loaded knows the same images; so does a trainer that loads the file."""
    trainer = solved_trainer()
    trainer.learn_known(make_images(90))
    images = torch.cat([make_images(20, seed=5)[0], strange_images(10)])
    expected = trainer.novelty(images)
    tk.save_model(trainer.model, tmp_path / "model.pt", frozen=frozen)
    loaded = make_trainer(tk.load_model(tmp_path / "model.pt", backbone=make_backbone()))
    assert np.array_equal(loaded.novelty(images), expected)
    trainer.save(tmp_path / "trainer.pt")
    other = make_trainer(make_model(make_backbone(seed=2), "head"))
    other.load(tmp_path / "trainer.pt")
    assert np.array_equal(other.novelty(images), expected)
    fresh = make_trainer(make_model(make_backbone(), "head"))
    fresh.save(tmp_path / "fresh.pt")
    other.load(tmp_path / "fresh.pt")
    assert other.model.novelty is None


@pytest.mark.parametrize("change", ["missing", "shape", "nan"])
def test_a_damaged_measure_is_refused(change):
    """A checkpoint whose measure lacks a part, has another shape or holds NaN is refused before anything changes."""
    trainer = solved_trainer()
    trainer.learn_known(make_images(90))
    state = copy.deepcopy(trainer.state_dict())
    weights = state["model"]["weights"]
    if change == "missing":
        del weights["novelty.within"]
    elif change == "shape":
        weights["novelty.within"] = weights["novelty.within"][:1]
    else:
        weights["novelty.mean"][0] = float("nan")
    with pytest.raises(CheckpointError, match="novelty measure is damaged"):
        make_trainer(make_model(make_backbone(), "head")).load_state_dict(state)


@pytest.mark.slow
def test_the_exported_module_returns_it_too():
    """With `unknown` the module returns probabilities and scores of raw images, which torch.export takes."""
    trainer = solved_trainer()
    with pytest.raises(ArgumentError, match="has not learned which images are known"):
        tk.WithPreprocessing(trainer.model, unknown=True)
    trainer.learn_known(make_images(90))
    images = torch.cat([make_images(6, seed=5)[0], strange_images(4)])
    module = tk.WithPreprocessing(trainer.model, unknown=True)
    probabilities, scores = module(images)
    np.testing.assert_allclose(probabilities.numpy(), trainer.predict_proba(images), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores.numpy(), trainer.novelty(images), rtol=1e-3, atol=1e-3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},)).module()
    for found, expected in zip(program(images[:3]), module(images[:3]), strict=True):
        torch.testing.assert_close(found, expected)
    assert isinstance(tk.WithPreprocessing(trainer.model)(images), torch.Tensor)
