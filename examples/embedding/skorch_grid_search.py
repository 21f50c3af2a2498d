"""A grid search over heads with scikit-learn.

Run from a clone: python examples/embedding/skorch_grid_search.py

The convolutions run once per image. The 18 fits of the search, and the final one, train heads on their output.
"""

import torch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from subset import WEIGHTS, read_images
from torch import nn

import transferkit as tk


def main() -> None:
    torch.manual_seed(0)
    images, targets, classes = read_images("train", per_class=50)
    test_images, test_targets, _ = read_images("test", per_class=25)
    device = tk.Device("auto")
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, classes), "head")
    features, labels = tk.cache_features(model, (images, targets), device=device).numpy()  # float32 (N, 3840), (N,)
    mean, std = torch.from_numpy(features.mean(axis=0)), torch.from_numpy(features.std(axis=0) + 1e-6)

    def build_head(hidden: tuple[int, ...], dropout: float) -> nn.Module:
        head = tk.attach_head(backbone, classes, hidden=hidden, dropout=dropout).head
        head.standardize.mean.copy_(mean)  # Trainer measures both by itself
        head.standardize.std.copy_(std)
        return head

    net = NeuralNetClassifier(
        build_head,
        module__hidden=(256,),
        module__dropout=0.0,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        max_epochs=10,
        batch_size=32,
        train_split=None,  # the search makes its own folds
        device=device.torch_device,
        verbose=0,
    )
    grid = {"lr": [1e-4, 1e-3, 1e-2], "module__dropout": [0.0, 0.5]}
    search = GridSearchCV(net, grid, cv=3, scoring="accuracy")
    search.fit(features, labels)
    print(f"best of {len(search.cv_results_['params'])}: {search.best_params_}, {search.best_score_:.3f} in 3 folds")

    # attach the best head to the backbone, and classify raw images
    best = tk.attach_head(backbone, classes, layers=model.layers, head=search.best_estimator_.module_)
    scores = tk.Trainer(best, device=device.torch_device).evaluate((test_images, test_targets))
    print(f"accuracy {scores['accuracy']:.3f}")


if __name__ == "__main__":
    main()
