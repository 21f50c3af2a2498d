"""Keras 3 on TensorFlow: `VGG16` and `fit` as in its transfer-learning guide, and with its fastest settings."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"  # read on import
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from job import BATCH_SIZE, HIDDEN, NUM_CLASSES, SEED, WEIGHTS, Data, Job, Record
from keras.applications.vgg16 import VGG16, preprocess_input

LARGEST_DIFFERENCE = 1e-3  # of the features from PyTorch's, relative
VALIDATION_BATCH_SIZE = 128


class Clock(keras.callbacks.Callback):
    """Records each epoch; Keras validates before `on_epoch_end`."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.record.begin_epoch()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.record.end_epoch((logs or {})["val_accuracy"])


def convert_weights(body: keras.Model, exported: dict[str, np.ndarray]) -> None:
    """Put PyTorch's weights into Keras's VGG16: kernels as HWIO, the first one's inputs flipped from RGB to BGR."""
    names = sorted({int(name.split(".")[1]) for name in exported if name.startswith("features.")})
    convolutions = [layer for layer in body.layers if isinstance(layer, keras.layers.Conv2D)]
    for place, (layer, name) in enumerate(zip(convolutions, names, strict=True)):
        kernel = exported[f"features.{name}.weight"].transpose(2, 3, 1, 0)
        layer.set_weights([kernel[:, :, ::-1] if place == 0 else kernel, exported[f"features.{name}.bias"]])


def exported_weights(images: np.ndarray, weights: str | Path) -> dict[str, np.ndarray]:
    """Return PyTorch's weights and, as `features`, its output for images in Keras's form: BGR, channels last."""
    with tempfile.TemporaryDirectory() as folder:
        images_path, output_path = Path(folder) / "images.npy", Path(folder) / "weights.npz"
        np.save(images_path, np.ascontiguousarray(images[..., ::-1].transpose(0, 3, 1, 2)))
        script = Path(__file__).with_name("export_vgg16.py")
        subprocess.run([sys.executable, script, weights, images_path, output_path], check=True)
        with np.load(output_path) as exported:
            return dict(exported)


def preprocess(images: np.ndarray, image_size: int) -> np.ndarray:
    """Return images resized and preprocessed for `VGG16`: BGR, 0..255, minus the mean."""
    resized = [
        tf.image.resize(part, (image_size, image_size), antialias=True).numpy()
        for part in np.array_split(images, -(-len(images) // 256))
    ]
    return preprocess_input(np.concatenate(resized))


def build_body(images: np.ndarray, *, weights: str | Path = WEIGHTS) -> keras.Model:
    """Return VGG16 after comparing its float32 features of some preprocessed images with PyTorch's."""
    shape = images.shape[1:]
    exported = exported_weights(images, weights)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    reference = VGG16(weights=None, include_top=False, input_shape=shape)
    convert_weights(reference, exported)
    expected = exported["features"].transpose(0, 2, 3, 1)
    difference = np.linalg.norm(reference(images).numpy() - expected) / np.linalg.norm(expected)
    if not difference < LARGEST_DIFFERENCE:
        raise RuntimeError(f"Keras's features differ from PyTorch's by {difference:.2g}, relative")
    keras.config.set_dtype_policy(policy)
    body = reference
    if policy.name != "float32":
        body = VGG16(weights=None, include_top=False, input_shape=shape)
        body.set_weights(reference.get_weights())
    return body


def build_model(job: Job, data: Data) -> keras.Model:
    """Return VGG16 with the head, not yet compiled."""
    keras.utils.set_random_seed(SEED)
    body = build_body(preprocess(data.train_images[:8], job.image_size))
    body.trainable = not job.frozen
    layers = [keras.layers.Dense(size, activation="relu") for size in HIDDEN]
    last = keras.layers.Dense(NUM_CLASSES, activation="softmax", dtype="float32")
    return keras.Sequential([body, keras.layers.Flatten(), *layers, last])


def one_hot(targets: np.ndarray) -> np.ndarray:
    return keras.utils.to_categorical(targets, NUM_CLASSES)


def default(job: Job, data: Data) -> Record:
    model = build_model(job, data)
    model.compile(keras.optimizers.Adam(job.lr), loss="categorical_crossentropy", metrics=["accuracy"])
    record = Record()
    model.fit(
        preprocess(data.train_images, job.image_size),
        one_hot(data.train_targets),
        validation_data=(preprocess(data.validation_images, job.image_size), one_hot(data.validation_targets)),
        batch_size=BATCH_SIZE,
        epochs=job.epochs,
        verbose=0,
        callbacks=[Clock(record)],
    )
    return record.end()


def best(job: Job, data: Data) -> Record:
    """Mixed bf16, no XLA (it took twice as long), preprocessed images in a prefetched tf.data pipeline."""
    if job.bf16:
        keras.config.set_dtype_policy("mixed_bfloat16")
    model = build_model(job, data)
    model.compile(
        keras.optimizers.Adam(job.lr), loss="categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    record = Record()
    train = tf.data.Dataset.from_tensor_slices(
        (preprocess(data.train_images, job.image_size), one_hot(data.train_targets))
    )
    validation = tf.data.Dataset.from_tensor_slices(
        (preprocess(data.validation_images, job.image_size), one_hot(data.validation_targets))
    )
    model.fit(
        train.shuffle(job.num_training).batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE),
        validation_data=validation.batch(VALIDATION_BATCH_SIZE).prefetch(tf.data.AUTOTUNE),
        epochs=job.epochs,
        verbose=0,
        callbacks=[Clock(record)],
    )
    return record.end()
