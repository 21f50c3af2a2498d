"""Optuna's samplers and pruners over features that are computed once.

Run from a clone: python examples/embedding/optuna_search.py

Each trial is a call of `Trainer.fit`. All trials use the features of the first, and a pruned one ends after its epoch.
"""

import optuna
from subset import WEIGHTS, read_images

import transferkit as tk


def main() -> None:
    images, targets, classes = read_images("train", per_class=50)
    test_images, test_targets, _ = read_images("test", per_class=25)
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    first = tk.Trainer(tk.freeze_until(tk.attach_head(backbone, classes), "head"))

    def train(trial: optuna.Trial, *, pruned: bool = True) -> tuple[tk.Trainer, float]:
        hidden = trial.suggest_categorical("hidden", [0, 64])
        model = tk.attach_head(backbone, classes, hidden=(hidden,) if hidden else ())
        trainer = tk.Trainer(tk.freeze_until(model, "head"), lr=trial.suggest_float("lr", 1e-5, 1e-2, log=True))
        trainer.share_features(first)

        def report(_: tk.Trainer, epoch: tk.EpochReport) -> bool:
            trial.report(epoch.val_accuracy, epoch.epoch)
            return trial.should_prune()

        callbacks = [report] if pruned else []
        history = trainer.fit(
            (images, targets), validation_split=0.2, epochs=9, batch_size=32, callbacks=callbacks, verbose=0
        )
        if len(history.reports) < 9:
            raise optuna.TrialPruned
        return trainer, max(history["val_accuracy"])

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3),
    )
    study.optimize(lambda trial: train(trial)[1], n_trials=12)
    pruned = len(study.get_trials(states=[optuna.trial.TrialState.PRUNED]))
    print(f"best of {len(study.trials)}, {pruned} of them pruned: {study.best_params}, {study.best_value:.3f}")

    best, _ = train(optuna.trial.FixedTrial(study.best_params), pruned=False)
    print(f"accuracy {best.evaluate((test_images, test_targets))['accuracy']:.3f}")


if __name__ == "__main__":
    main()
