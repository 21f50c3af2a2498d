"""Keras in `quality.py`: VGG16 frozen, 4096-4096 on its flattened output, Adam at 1e-3, ten epochs."""

import keras
import numpy as np
from job import HIDDEN
from quality_task import BATCH_SIZE, TEST_BATCH_SIZE, Curve, Task, files, read_images
from torch.utils.data import Subset

from peers.with_keras import build_body, preprocess


def train_head(task: Task, train: Subset, test: Subset, *, once: bool) -> Curve:
    """Train the head on the network's output, computed in every epoch or once."""
    keras.utils.set_random_seed(task.seed)
    (paths, targets), (test_paths, test_targets) = files(train), files(test)
    test_inputs = preprocess(read_images(test_paths, task.image_size), task.image_size)
    body = build_body(test_inputs[:8], weights=task.weights)
    body.trainable = False
    if once:
        test_inputs = body.predict(test_inputs, batch_size=TEST_BATCH_SIZE, verbose=0)
    curve = Curve()
    inputs = preprocess(read_images(paths, task.image_size), task.image_size)
    if once:
        inputs = body.predict(inputs, batch_size=TEST_BATCH_SIZE, verbose=0)
    hidden = [keras.layers.Dense(size, activation="relu") for size in HIDDEN]
    last = keras.layers.Dense(len(train.dataset.classes), activation="softmax", dtype="float32")
    model = keras.Sequential([*([] if once else [body]), keras.layers.Flatten(), *hidden, last])
    model.compile(
        keras.optimizers.Adam(1e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False if once else "auto",
    )
    clock = keras.callbacks.LambdaCallback(
        on_test_begin=lambda _logs: curve.pause(), on_epoch_end=lambda _epoch, logs: curve.add(logs["val_accuracy"])
    )
    fit = {"batch_size": BATCH_SIZE, "epochs": task.epochs or 10, "verbose": 0, "callbacks": [clock]}
    model.fit(inputs, np.array(targets), validation_data=(test_inputs, np.array(test_targets)), **fit)
    return curve


def default(task: Task, train: Subset, test: Subset) -> Curve:
    return train_head(task, train, test, once=False)


def best(task: Task, train: Subset, test: Subset) -> Curve:
    """Mixed bf16, and the frozen network runs once, as in Keras's guide to feature extraction."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    return train_head(task, train, test, once=True)
