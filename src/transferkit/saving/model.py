"""A model as plain types and tensors, and back."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from transferkit.base.arrays import sha256_of
from transferkit.base.calls import explained
from transferkit.base.surroundings import own_surroundings
from transferkit.data.classes import numbered
from transferkit.data.preprocessing import Preprocessing
from transferkit.errors import ArgumentError, CheckpointError, CheckpointTypeError, HeadMismatchError, TransferKitError
from transferkit.model.backbone import MIN_IMAGE_SIZE, Backbone, load_backbone
from transferkit.model.freezing import freeze_modules, stays_in_eval, trainable_state
from transferkit.model.head import FLATTEN, POOLING, TransferModel, attach_head, build_head, find_pools
from transferkit.model.layers import Pool, structure, unlike
from transferkit.model.novelty import Novelty
from transferkit.model.weights import differences
from transferkit.saving.archive import check_no_tensors, check_parts, read_checkpoint, shown, write_checkpoint

MAX_IMAGE_SIZE = 2**14  # pixels of a side: beyond it one image takes more memory than any machine has
NOVELTY = "novelty."  # begins the names of a model's novelty among its weights

PARTS: dict[str, Any] = {
    "backbone": (str,),
    "preprocessing": (dict,),
    "classes": [(str,)],
    "layers": [(str,)],
    "head": (dict, type(None)),
    "threshold": (float, type(None)),
    "temperature": (float,),
    "structure": {str: {str: (bool, int, float, str, tuple, list, type(None))}},
    "in_eval": [(str,)],
    "frozen": [(str,)],
    "weights": {str: (Tensor,)},
    "left_out": [(str,)],
    "sha256": (str,),
}


def model_state(model: TransferModel) -> dict[str, Any]:
    """Return all that is needed to rebuild a model, as plain types and tensors that are not copies."""
    return {
        "backbone": model.backbone.name,
        "preprocessing": asdict(model.backbone.preprocess),
        "classes": list(model.classes),
        "layers": list(model.layers),
        "head": model.head_arguments,
        "threshold": model.threshold,
        "temperature": model.temperature,
        "structure": _structure(model),
        "in_eval": [name for name, part in model.named_modules() if stays_in_eval(part) and name != NOVELTY[:-1]],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "weights": dict(model.state_dict()),
        "left_out": [],  # names of weights that the file does not hold
        "sha256": "",  # of those weights
    }


def check_model_state(model: TransferModel, state: Mapping[str, Any]) -> None:
    """Refuse a saved model, of the form `PARTS`, that differs from a live one, before anything is assigned."""
    _check_description(state)
    others = len(model.classes) != len(state["classes"])
    if list(model.classes) != state["classes"] and (others or not numbered(model.classes)):
        raise HeadMismatchError(
            f"the checkpoint has {len(state['classes'])} classes ({', '.join(state['classes'][:5])}...), the model "
            f"{len(model.classes)} ({', '.join(model.classes[:5])}...): expected the same. load_model builds its model."
        )
    live, saved = _described(model_state(model)), _described(state)
    if different := [name for name in live if live[name] != saved[name]]:
        here, there = shown(live[different[0]]), shown(saved[different[0]])
        raise CheckpointError(f"the checkpoint has {different[0]} {there}, the model {here}: expected the same.")
    weights, novelty = _apart(state["weights"])
    _build_novelty(novelty)
    if faults := differences(_apart(model.state_dict())[0], weights, same_width=True):
        wrapped = any(name.startswith(("module.", "_orig_mod.")) for name in weights)
        cause = "A wrapper put a prefix before its names: remove it." if wrapped else "Was its head built otherwise?"
        raise CheckpointError(f"the checkpoint's weights do not fit the model: {faults}. {cause}")
    names = [*dict(model.named_parameters()), *dict(model.named_modules())]
    if unknown := [name for name in (*state["frozen"], *state["in_eval"]) if name not in names]:
        raise CheckpointError(f"the checkpoint freezes {shown(unknown[0])}, which the model does not have.")
    if changed := unlike(_structure(model), state["structure"]):
        faults = shown("; ".join(changed[:5]))
        raise CheckpointError(f"the checkpoint's layers are not the model's, where {faults}: expected the same.")


def _described(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same in two models, and what their weights do not tell."""
    default = POOLING if state["layers"] else FLATTEN  # of a head of the user's own
    return {
        "backbone": state["backbone"],
        "preprocessing": asdict(_preprocessing(state)),
        "labels of an image:": "one" if state["threshold"] is None else "several",
        "layers": state["layers"],
        "pooling": state["head"].get("pooling") if state["head"] else default,
    }


def _preprocessing(state: Mapping[str, Any]) -> Preprocessing:
    return Preprocessing(**{"scaled_decoding": False, **state["preprocessing"]})  # older files do not say it


def check_loadable(model: object) -> None:
    """Raise `CheckpointTypeError` for a model that `load_model` could not build again from its file."""
    if not isinstance(model, TransferModel) or type(model) is not TransferModel:
        inside = [name for name in ("module", "_orig_mod") if isinstance(getattr(model, name, None), TransferModel)]
        advice = f"Pass what it wraps: model.{inside[0]}." if inside else "Build one with attach_head."
        raise CheckpointTypeError(f"the model is a {type(model).__name__}: expected a TransferModel. {advice}")
    with torch.device("meta"):
        known = {type(layer): layer for layer in make_layers([1, "M"], batch_norm=True)}
        layers = [copy.deepcopy(known.get(type(layer), nn.Identity())) for layer in model.backbone.features]
    expected: dict[str, tuple[nn.Module, nn.Module]] = {}
    expected["backbone.features."] = model.backbone.features, nn.Sequential(*layers)
    pools = model.pools
    if model.head_arguments is not None:
        pools, head = _head_without_weights(model.backbone, model.layers, model.head_arguments, len(model.classes))
        expected["head."] = (model.head, head)
    faults = [] if pools == model.pools else [f"it pools {model.pools} instead of {pools}"]
    faults += [f"{name} has a forward of its own" for name, part in model.named_modules() if "forward" in vars(part)]
    for place, (live, reference) in expected.items():
        names = live.state_dict().keys() ^ reference.state_dict().keys()
        faults += [f"{place}{name} is in one of them alone" for name in sorted(names)]
        faults += [f"{place}{fault}" for fault in unlike(structure(live), structure(reference))]
    weights = {name: value.dtype for name, value in _apart(model.state_dict())[0].items() if value.is_floating_point()}
    faults += [f"{name} is {dtype}" for name, dtype in weights.items() if dtype != torch.float32]
    if faults:
        advice = next((text for cause, text in _ADVICE.items() if any(cause in fault for fault in faults)), "")
        raise CheckpointTypeError(f"load_model could not build this model again: {'; '.join(faults[:3])}. {advice}")


_ADVICE = {
    "_orig_mod": "Save the model that was compiled.",
    "_mask": "Make the pruning permanent: torch.nn.utils.prune.remove(layer, 'weight').",
    "parametrizations": "First: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight').",
    "_orig": "First take the normalisation off: torch.nn.utils.remove_spectral_norm(layer).",
    "is torch.": "Convert it: model.float().",
    "": "Layers of your own go into attach_head(head=...). A Checkpoint saves any model, to resume its run.",
}


def _check_description(state: Mapping[str, Any]) -> Preprocessing:
    """Refuse a saved model that no model can be like; return its preprocessing."""
    described = [state["preprocessing"], state["head"], state["structure"]]
    check_no_tensors(described, "model/preprocessing, model/head or model/structure")
    for name, end in (("threshold", 1.0), ("temperature", math.inf)):
        if state[name] is not None and not 0 < state[name] < end:
            raise CheckpointError(f"the checkpoint has the {name} {state[name]}: expected one above 0 and below {end}.")
    if len(state["classes"]) < 2:
        raise CheckpointError(f"the checkpoint has {len(state['classes'])} classes: expected 2 or more.")
    try:
        found = _preprocessing(state)
        usable = all(isinstance(part, tuple) and len(part) == 3 for part in (found.mean, found.std, found.channels))
        usable = usable and all(type(number) is float and math.isfinite(number) for number in (*found.mean, *found.std))
        usable = usable and min(found.std) > 0 and sorted(map(str, found.channels)) == [*"012"]
        usable = usable and type(found.scaled_decoding) is bool and type(found.image_size) is int
        usable = usable and MIN_IMAGE_SIZE <= found.image_size <= MAX_IMAGE_SIZE
    except (TypeError, ArgumentError) as error:
        raise CheckpointError(f"the checkpoint has a preprocessing that cannot be used: {error}") from error
    if not usable:
        raise CheckpointError(
            f"the checkpoint has the preprocessing {shown(dict(state['preprocessing']))}: expected three finite means, "
            "three standard deviations above 0, an order of three channels, an image_size of "
            f"{MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE:,} pixels and, for scaled_decoding, True or False."
        )
    return found


def load_model_state(model: TransferModel, state: Mapping[str, Any]) -> None:
    """Assign a saved model, which `check_model_state` has accepted, to a live one: its weights and what is frozen."""
    model.novelty = _build_novelty(_apart(state["weights"])[1])
    model.load_state_dict(state["weights"])
    model.classes = tuple(state["classes"])
    model.threshold, model.temperature = state["threshold"], state["temperature"]
    freeze_modules(model, set(state["in_eval"]))
    frozen = set(state["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None if name in frozen else parameter.grad


def _structure(model: TransferModel) -> dict[str, dict[str, Any]]:
    return {name: settings for name, settings in structure(model).items() if name != NOVELTY[:-1]}


def _apart(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of backbone and head, and the buffers of the model's novelty, which it may not have."""
    novelty = {name.removeprefix(NOVELTY): value for name, value in weights.items() if name.startswith(NOVELTY)}
    return {name: value for name, value in weights.items() if not name.startswith(NOVELTY)}, novelty


def _build_novelty(buffers: Mapping[str, Tensor]) -> Novelty | None:
    try:
        return Novelty.of_state(buffers) if buffers else None
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's novelty measure is damaged: {error}.") from error


def leave_out_frozen(state: Mapping[str, Any], model: TransferModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a model's state without its frozen weights, and the frozen weights."""
    trained = trainable_state(model)
    frozen = {name: value for name, value in state["weights"].items() if name not in trained}
    kept = {name: value for name, value in state["weights"].items() if name in trained}
    return {**state, "weights": kept, "left_out": list(frozen), "sha256": _sha256(frozen)}, frozen


def put_back(state: dict[str, Any], path: Path, *others: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a model's state with the frozen weights that its file lacks: of live models, `others`, or of a file."""
    _check_description(state)
    if not state["left_out"]:
        return state
    beside = frozen_path(path.parent, state["sha256"])
    for weights in others:
        found = {name: weights[name].detach().clone() for name in state["left_out"] if name in weights}
        if _sha256(found) == state["sha256"]:
            return {**state, "weights": {**state["weights"], **found}}
    if beside.exists():
        content = read_checkpoint(beside)
        check_parts(content, {"frozen": {str: (Tensor,)}}, origin=str(beside))
        if _sha256(content["frozen"]) == state["sha256"]:
            return {**state, "weights": {**state["weights"], **content["frozen"]}}
        raise CheckpointError(f"{beside} does not hold the frozen weights that its name says: delete it.")
    raise CheckpointError(
        f"{path} was saved without its {len(state['left_out'])} frozen weights ({state['left_out'][0]}, ...), and "
        f"none with their SHA-256, {state['sha256'][:8]}..., are in the model, in backbone=, or in {beside}."
    )


def frozen_path(folder: Path, sha256: str) -> Path:
    """Return the path of the file that holds the frozen weights of checkpoints in a folder."""
    return folder / f"frozen-{sha256[:16]}.pt"


@explained
def save_model(model: TransferModel, path: str | os.PathLike[str], *, frozen: bool = True) -> None:
    """Write a model, whole or not at all, for `load_model` to read.

    Args:
        model: The file also holds its class names, its preprocessing and which layers are frozen.
        path: The file to write.
        frozen: `False` leaves out the frozen weights, which makes 56 kB for a linear head of three classes.
            `load_model` must then be given a backbone that has them, and compares their SHA-256.

    Raises:
        CheckpointTypeError: `load_model` could not build the model again: it is wrapped, or a layer was replaced,
            changed, pruned, parametrized or converted to another dtype.
        CheckpointWriteError: The folder is missing, read-only or full.

    Example:
        >>> import tempfile
        >>> from transferkit import freeze_until
        >>> model = attach_head(load_backbone(weights=None, image_size=32), ["cat", "dog"])
        >>> path = Path(tempfile.mkdtemp()) / "animals.pt"
        >>> save_model(freeze_until(model, "head"), path, frozen=False)
        >>> load_model(path, backbone=model.backbone).classes
        ('cat', 'dog')
    """
    check_loadable(model)
    state = model_state(model)
    write_checkpoint(path, {"model": state if frozen else leave_out_frozen(state, model)[0]})


@explained
@own_surroundings()
def load_model(
    path: str | os.PathLike[str], *, head: nn.Module | None = None, backbone: Backbone | None = None
) -> TransferModel:
    """Build the model that `Trainer.save` or `save_model` wrote, on the CPU and in eval mode, without a download.

    Args:
        path: The file to read. One of a `Checkpoint` has the weights of its step, neither the best ones nor an average:
            `Trainer.save` after `fit` writes those that `fit` leaves.
        head: A head built like that of the model, if it was your own.
        backbone: A backbone with the frozen weights, if they were left out. It becomes part of the model.

    Raises:
        CheckpointError: The file is missing, damaged or no checkpoint; it has a head of your own and no `head` is
            given; or its frozen weights were left out and `backbone` does not have them.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "animals.pt"
        >>> save_model(attach_head(load_backbone("vgg11", weights=None, image_size=32), ["cat", "dog"]), path)
        >>> model = load_model(path)
        >>> raw = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
        >>> model.classes, model(model.backbone.preprocess(raw)).shape
        (('cat', 'dog'), torch.Size([1, 2]))
    """
    whole = read_checkpoint(path)
    check_parts(whole, {"model": PARTS}, origin=str(path))
    state = whole["model"]
    given = {} if backbone is None else {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state = put_back(state, Path(path), given)
    if head is None and state["head"] is None:
        raise CheckpointError(f"{path} has a head of the user's own: pass one built the same way as head=.")
    try:
        model = _build(state, head, backbone)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TransferKitError) and not isinstance(error, ArgumentError):
            raise
        raise CheckpointError(f"{path} describes a model that cannot be built: {shown(str(error))}.") from error
    model.threshold = state["threshold"]
    check_model_state(model, state)
    load_model_state(model, state)
    return model.eval()


def _build(state: Mapping[str, Any], head: nn.Module | None, backbone: Backbone | None) -> TransferModel:
    if backbone is None:
        preprocessing = _check_description(state)
        size = preprocessing.image_size
        backbone = load_backbone(state["backbone"], weights=None, image_size=size, preprocessing=preprocessing)
    arguments: dict[str, Any] = state["head"] if head is None else {"head": head}
    if head is None:  # one larger than its weights in the file is refused before any memory is allocated for it
        saved = {name.removeprefix("head."): w for name, w in state["weights"].items() if name.startswith("head.")}
        if len(arguments.get("hidden", ())) > (count := len(state["weights"])):
            raise CheckpointError(f"the checkpoint describes a head of more layers than {count} weights.")
        expected = _head_without_weights(backbone, state["layers"], arguments, len(state["classes"]))[1]
        if faults := differences(expected.state_dict(), saved):
            raise CheckpointError(f"the checkpoint's weights do not fit the head that it describes: {faults}.")
    return attach_head(backbone, state["classes"], layers=state["layers"] or None, **arguments)


def _head_without_weights(
    backbone: Backbone, layers: Sequence[str], head: Mapping[str, Any], num_classes: int
) -> tuple[dict[int, Pool], nn.Module]:
    """Build the head that arguments of `attach_head` describe, on the meta device; return also what it pools."""
    arguments = dict(head)
    pools = find_pools(backbone, layers or None, arguments.pop("pooling"))
    with torch.device("meta"):
        return pools, build_head(backbone, pools, num_classes, **arguments)


def _sha256(weights: Mapping[str, Tensor]) -> str:
    return sha256_of(dict(sorted(weights.items())))
