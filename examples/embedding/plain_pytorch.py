"""The parts of transferkit in a plain PyTorch loop, without its Trainer.

Run from a clone: python examples/embedding/plain_pytorch.py
"""

import torch
from subset import WEIGHTS, read_images
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import transferkit as tk


def main() -> None:
    torch.manual_seed(0)
    images, targets, classes = read_images("train", per_class=50)
    test_images, test_targets, _ = read_images("test", per_class=25)

    device = tk.Device("auto")  # CUDA, MPS or the CPU, in bf16 where the hardware supports it
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    model = tk.attach_head(backbone, classes, hidden=(256,))
    tk.freeze_until(model, "head")  # stays frozen through model.train() below
    before = backbone.fingerprint  # a digest of all weights and the preprocessing

    # the convolutions run once per image; every epoch trains on their output
    features = tk.cache_features(model, (images, targets), device=device)
    rows, _ = features.numpy()  # Trainer measures mean and deviation; your own loop must do it
    model.head.standardize.mean.copy_(torch.from_numpy(rows.mean(axis=0)))
    model.head.standardize.std.copy_(torch.from_numpy(rows.std(axis=0) + 1e-6))
    loader = DataLoader(features, batch_size=32, shuffle=True)
    _, suffix = model.split()  # the trainable part, here the head
    optimizer = torch.optim.Adam(suffix.parameters(), lr=1e-3)
    for epoch in range(10):
        model.train()
        for inputs, labels in device.batches(loader):  # copies one batch ahead
            with device.autocast():
                loss = cross_entropy(suffix(inputs), labels)
            device.step(loss, optimizer, clip_grad_norm=1.0)  # scales gradients in fp16, and clears them
        print(f"epoch {epoch + 1}  loss {loss.item():.3f}")

    # the head was trained in place, so the whole model now classifies raw images of any size
    model.eval()
    with torch.no_grad(), device.autocast():
        logits = model(backbone.preprocess(device.move(test_images)))
    accuracy = (logits.argmax(dim=1) == device.move(test_targets)).float().mean().item()
    print(f"frozen layers unchanged: {backbone.fingerprint == before}")
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
