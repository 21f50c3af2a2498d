"""How far a call of `fit` has come, and its best weights: what a checkpoint needs to continue the run exactly."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from transferkit.errors import CheckpointError, DataChangedError
from transferkit.model.freezing import trainable_state, write_values
from transferkit.model.weights import differences
from transferkit.results.history import EpochReport, History
from transferkit.saving.archive import check_no_tensors, check_parts, check_ranges, shown
from transferkit.training.callback_list import CallbackList
from transferkit.training.metrics import Sums
from transferkit.training.step import Step

PARTS: dict[str, Any] = {
    "facts": (dict,),
    "first_step": (int,),
    "first_epoch": (int,),
    "batches": (int,),
    "skipped": (int,),
    "skipped_before": (int,),
    "sums": (dict,),
    "reports": (list,),
    "best": (dict, type(None)),
    "callbacks": {str: {str: (Tensor,)}},
    "ended": (bool,),
}


class BestWeights:
    """Remembers the weights that training changes, as they were at one moment.

    Frozen weights are not copied, since they stay the same. If more layers begin to train later, `before_training`
    copies them before they change. Memory is allocated once.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> best = BestWeights(layer)
        >>> best.take()
        >>> _ = layer.weight.data.zero_()
        >>> best.restore()
        >>> bool(layer.weight.any())
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._copies: dict[str, Tensor] | None = None

    def take(self) -> None:
        """Copy the weights as they are now, over those copied before."""
        live = trainable_state(self.model)
        copies = {} if self._copies is None else self._copies
        self._copies = {
            name: copies[name].copy_(value) if name in copies else value.clone() for name, value in live.items()
        }

    def before_training(self) -> None:
        """Copy weights that were frozen when the others were taken and no longer are."""
        if self._copies is not None:
            for name, value in trainable_state(self.model).items():
                if name not in self._copies:
                    self._copies[name] = value.clone()

    def state(self) -> dict[str, Tensor] | None:
        """Return the remembered weights, which are not copies; None if there are none."""
        return self._copies

    def load(self, copies: Mapping[str, Tensor] | None) -> None:
        """Take over what `state` returned in another process."""
        live = self.model.state_dict()
        self._copies = None if copies is None else {name: copy.to(live[name].device) for name, copy in copies.items()}

    def restore(self) -> None:
        """Put the remembered weights back, if there are any."""
        write_values(self._copies or {}, self.model.state_dict())

    def average(self) -> None:
        """Put the mean of the remembered weights and of those in the model into the model."""
        live = self.model.state_dict()
        means = {
            name: copy.lerp(live[name], 0.5) if copy.is_floating_point() else copy
            for name, copy in (self._copies or {}).items()
        }
        write_values(means, live)


@dataclass(slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        facts: What must be the same when it is resumed, by name.
        first_step: Steps the trainer had made before it.
        first_epoch: Epochs it had finished before it.
        best: The weights of the best epoch so far.
        callbacks: Those of the run; some have a state that a checkpoint holds.
        sums: Loss and accuracy of the current epoch.
        history: The finished epochs.
        batches: Batches of the current epoch that were trained on or skipped.
        skipped: Steps of the run that were skipped because a number was not finite.
        skipped_before: Those of finished epochs.
        ended: Whether a callback ended it.
        between_steps: Whether weights, optimizer and the figures above belong together.
    """

    facts: dict[str, Any]
    first_step: int
    first_epoch: int
    best: BestWeights
    callbacks: CallbackList
    sums: Sums
    history: History = field(default_factory=History)
    batches: int = 0
    skipped: int = 0
    skipped_before: int = 0
    ended: bool = False
    between_steps: bool = True

    @property
    def epoch(self) -> int:
        """Number of the current epoch, in the life of the trainer."""
        return self.first_epoch + len(self.history.reports)

    def add(self, step: Step) -> None:
        """Count a step that was made."""
        self.sums.add(step.loss, step.correct, step.count, logits=step.logits, targets=step.targets)
        self.batches = step.index + 1
        self.between_steps = True

    def skip(self, index: int) -> None:
        """Count a step that was skipped."""
        self.skipped += 1
        self.batches = index + 1
        self.between_steps = True

    def finish_epoch(self, report: EpochReport) -> None:
        """Count an epoch that was trained and validated, and remember its weights if it is the best so far."""
        self.history.reports.append(report)
        self.sums.clear()
        self.batches, self.skipped_before = 0, self.skipped
        if self.history.best_epoch == len(self.history.reports) - 1:
            self.best.take()

    def state(self) -> dict[str, Any]:
        """Return all this as plain types and tensors that are not copies."""
        return {
            "facts": self.facts,
            "first_step": self.first_step,
            "first_epoch": self.first_epoch,
            "batches": self.batches,
            "skipped": self.skipped,
            "skipped_before": self.skipped_before,
            "sums": {
                "loss": self.sums.loss,
                "correct": self.sums.correct,
                "count": self.sums.count,
                "outputs": [list(output) for output in self.sums.outputs],
            },
            "reports": [dict(vars(report)) for report in self.history.reports],
            "best": self.best.state(),
            "callbacks": self.callbacks.state(),
            "ended": self.ended,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned in another process, already compared with `check_progress`."""
        for name in ("first_step", "first_epoch", "batches", "skipped", "skipped_before", "ended"):
            setattr(self, name, state[name])
        sums, device = state["sums"], self.sums.loss.device
        self.sums.loss.copy_(sums["loss"])
        self.sums.correct.copy_(sums["correct"])
        self.sums.count = sums["count"]
        self.sums.outputs = [(logits.to(device), targets.to(device)) for logits, targets in sums["outputs"]]
        self.history.reports[:] = [_report(figures) for figures in state["reports"]]
        self.best.load(state["best"])
        self.callbacks.load(state["callbacks"])


def check_progress(
    state: object, facts: Mapping[str, Any], live: Mapping[str, Tensor], *, origin: str, but: Collection[str] = ()
) -> None:
    """Compare the run of a checkpoint with the call that is to resume it, before anything is assigned.

    `state` is the part "run" of the checkpoint `origin`, `facts` are those of the call, `live` are the model's weights.
    The facts in `but` need not be equal.

    Raises:
        CheckpointError: When it holds no run, or that of a call with other arguments.
        DataChangedError: When the run began with other data.
    """
    if state is None:
        raise CheckpointError(
            f"{origin} was not saved during a run, so there is none to resume. trainer.load({origin!r}) loads its "
            "weights; fit then starts a new run with them."
        )
    check_parts({"run": state}, {"run": PARTS}, origin=origin)
    run: Mapping[str, Any] = state  # type: ignore[assignment]
    check_no_tensors(run["facts"], "run/facts")
    counts = ("first_step", "first_epoch", "batches", "skipped", "skipped_before")
    check_ranges(run, dict.fromkeys(counts, (0, 2**63 - 1)), origin=f"the run of {origin}")
    for name in [*facts, *(name for name in run["facts"] if name not in facts)]:
        saved, value = run["facts"].get(name), facts.get(name)
        if saved == value or name in but:
            continue
        if name.endswith("data"):
            raise DataChangedError(
                f"{name}: the run of {origin} began with {_describe(saved)}, now there are {_describe(value)}. "
                f"Expected the same images in the same order. To train on other data from its weights: "
                f"trainer.load({origin!r}), then fit without resume_from."
            )
        raise CheckpointError(
            f"the run of {origin} has {shown(name)}={shown(saved)}, this call {shown(value)}: expected the same. To "
            f"begin a new run with its weights: trainer.load({origin!r}), then fit without resume_from."
        )
    best = run["best"] or {}
    check_parts(list(best.values()), [(Tensor,)], origin=origin, place="run/best")
    if faults := differences({name: live[name] for name in best if name in live}, best, same_width=True):
        raise CheckpointError(f"{origin} holds best weights that do not fit the model: {faults}.")
    sums = {"loss": (Tensor,), "correct": (Tensor,), "count": (int,), "outputs": (list,)}
    check_parts(run, {"sums": sums, "reports": [(dict,)]}, origin=origin, place="run")
    check_ranges(run["sums"], {"count": (0, 2**63 - 1)}, origin=f"the run of {origin}")

    usable = all(set(EpochReport.__dataclass_fields__) <= set(report) for report in run["reports"])
    usable &= all(isinstance(value, _FIGURE) for report in run["reports"] for value in report.values())
    usable &= not any(run["sums"][name].ndim for name in ("loss", "correct"))
    pairs = run["sums"]["outputs"]
    usable &= all(isinstance(pair, list) and len(pair) == 2 and _is_output(*pair) for pair in pairs)
    if not usable:
        raise CheckpointError(f"{origin} holds reports or sums of another form: expected those that fit writes.")


_FIGURE = (bool, int, float, type(None))


def _is_output(logits: object, targets: object) -> bool:
    return isinstance(logits, Tensor) and isinstance(targets, Tensor) and len(logits) == len(targets)


def _report(figures: Mapping[str, Any]) -> EpochReport:
    known = {name: figures[name] for name in EpochReport.__dataclass_fields__}
    report = EpochReport(**known)
    vars(report).update(figures)
    return report


def _describe(data: object) -> str:
    if not isinstance(data, list) or len(data) != 2:
        return "none"
    return f"{shown(data[0])} images (digest {shown(data[1])[:8]})"
