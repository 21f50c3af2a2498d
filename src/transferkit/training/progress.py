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
from transferkit.training.run import Run
from transferkit.training.step import Step

_COUNTS = ("first_step", "first_epoch", "batches", "skipped", "skipped_before")
_FIGURES = tuple(EpochReport.__dataclass_fields__)
_PARTS: dict[str, Any] = {
    "facts": (dict,),
    **dict.fromkeys(_COUNTS, (int,)),
    "sums": {"loss": (Tensor,), "correct": (Tensor,), "count": (int,), "outputs": (list,)},
    "reports": [(dict,)],
    "best": (dict, type(None)),
    "callbacks": {str: {str: (Tensor,)}},
    "ended": (bool,),
}


class BestWeights:
    """Remembers the weights that training changes, as they were at one moment, in memory that is allocated once.

    Frozen weights are not copied. If more layers begin to train later, `before_training` copies them before they
    change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copies: dict[str, Tensor] | None = None  # None before `take`

    def take(self) -> None:
        """Copy the weights as they are now, over those copied before."""
        live, copies = trainable_state(self.model), self.copies or {}
        self.copies = {
            name: copies[name].copy_(value) if name in copies else value.clone() for name, value in live.items()
        }

    def before_training(self) -> None:
        """Copy weights that were frozen when the others were taken and no longer are."""
        if self.copies is not None:
            live = trainable_state(self.model)
            self.copies |= {name: value.clone() for name, value in live.items() if name not in self.copies}

    def load(self, copies: Mapping[str, Tensor] | None) -> None:
        """Take over the `copies` of another process."""
        live = self.model.state_dict()
        self.copies = None if copies is None else {name: copy.to(live[name].device) for name, copy in copies.items()}

    def restore(self) -> None:
        """Put the remembered weights back, if there are any."""
        write_values(self.copies or {}, self.model.state_dict())

    def average(self) -> None:
        """Put the mean of the remembered weights and of those in the model into the model."""
        live, copies = self.model.state_dict(), self.copies or {}
        floating = {name: copy for name, copy in copies.items() if copy.is_floating_point()}
        write_values(copies | {name: copy.lerp(live[name], 0.5) for name, copy in floating.items()}, live)


@dataclass(slots=True)
class Progress:
    """Where a run stands."""

    run: Run
    facts: dict[str, Any]  # what must be the same when it is resumed, by name
    first_step: int  # steps the trainer had made before it
    first_epoch: int  # epochs it had finished before it
    best: BestWeights  # those of the best epoch so far
    callbacks: CallbackList  # some have a state that a checkpoint holds
    sums: Sums  # loss and accuracy of the current epoch
    history: History = field(default_factory=History)  # the finished epochs
    batches: int = 0  # of the current epoch, trained on or skipped
    skipped: int = 0  # steps that were skipped because a number was not finite
    skipped_before: int = 0  # those of finished epochs
    ended: bool = False  # whether a callback ended it
    between_steps: bool = True  # whether weights, optimizer and the figures above belong together

    @property
    def epoch(self) -> int:
        """Number of the current epoch, in the life of the trainer."""
        return self.first_epoch + len(self.history.reports)

    @property
    def is_over(self) -> bool:
        """Whether a callback ended the run, or no epoch is left."""
        return self.ended or len(self.history.reports) >= self.run.num_epochs

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
        """Count an epoch that was trained and validated, and remember its weights if they may come back at the end."""
        self.history.reports.append(report)
        self.sums.clear()
        self.batches, self.skipped_before = 0, self.skipped
        if self.run.restore_best and self.history.best_epoch == len(self.history.reports) - 1:
            self.best.take()

    def state(self) -> dict[str, Any]:
        """Return all this as plain types and tensors that are not copies."""
        sums = {name: getattr(self.sums, name) for name in ("loss", "correct", "count")}
        return {
            **{name: getattr(self, name) for name in ("facts", *_COUNTS, "ended")},
            "sums": {**sums, "outputs": [list(output) for output in self.sums.outputs]},
            "reports": [dict(vars(report)) for report in self.history.reports],
            "best": self.best.copies,
            "callbacks": self.callbacks.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned in another process, already compared with `check_progress`."""
        for name in (*_COUNTS, "ended"):
            setattr(self, name, state[name])
        sums, device = state["sums"], self.sums.loss.device
        self.sums.loss.copy_(sums["loss"])
        self.sums.correct.copy_(sums["correct"])
        self.sums.count = sums["count"]
        self.sums.outputs = [(logits.to(device), targets.to(device)) for logits, targets in sums["outputs"]]
        self.history.reports[:] = map(report_of, state["reports"])
        self.best.load(state["best"])
        self.callbacks.load(state["callbacks"])


def check_progress(
    run: Any, facts: Mapping[str, Any], live: Mapping[str, Tensor], *, origin: str, but: Collection[str] = ()
) -> None:
    """Compare the run of a checkpoint with the call that is to resume it, before anything is assigned.

    `run` is that part of the checkpoint `origin`, `facts` are those of the call, `live` are the model's weights. The
    facts in `but` need not be equal. No run, or that of another call, is a `CheckpointError`; one on other data is a
    `DataChangedError`.
    """
    if run is None:
        raise CheckpointError(
            f"{origin} was not saved during a run, so there is none to resume. trainer.load({origin!r}) loads its "
            "weights; fit then starts a new run with them."
        )
    check_parts({"run": run}, {"run": _PARTS}, origin=origin)
    check_no_tensors(run["facts"], "run/facts")
    counts = {**run, "count": run["sums"]["count"]}
    check_ranges(counts, dict.fromkeys((*_COUNTS, "count"), (0, 2**63 - 1)), origin=f"the run of {origin}")
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
    best, sums, reports = run["best"] or {}, run["sums"], run["reports"]
    check_parts(best, {str: (Tensor,)}, origin=origin, place="run/best")
    if faults := differences({name: live[name] for name in best if name in live}, best, same_width=True):
        raise CheckpointError(f"{origin} holds best weights that do not fit the model: {faults}.")
    usable = (
        all({*_FIGURES} <= {*report} for report in reports)
        and all(isinstance(value, bool | int | float | None) for report in reports for value in report.values())
        and not any(sums[name].ndim for name in ("loss", "correct"))
        and all(isinstance(pair, list) and len(pair) == 2 for pair in sums["outputs"])
        and all(isinstance(part, Tensor) for pair in sums["outputs"] for part in pair)
        and all(len(logits) == len(targets) for logits, targets in sums["outputs"])
    )
    if not usable:
        raise CheckpointError(f"{origin} holds reports or sums of another form: expected those that fit writes.")


def report_of(figures: Mapping[str, Any]) -> EpochReport:
    """Return the report that a file holds as plain figures, those of metrics and callbacks included."""
    report = EpochReport(*(figures[name] for name in _FIGURES))
    vars(report).update(figures)
    return report


def _describe(data: object) -> str:
    if not isinstance(data, list) or len(data) != 2:
        return "none"
    return f"{shown(data[0])} images (digest {shown(data[1])[:8]})"
