"""A transferkit model in a Hugging Face Accelerate loop.

Run from a clone: python examples/embedding/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from subset import WEIGHTS, read_images
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk


def main() -> None:
    set_seed(0)
    accelerator = Accelerator()  # handles device and precision, so tk.Device is not needed
    images, targets, classes = read_images("train", per_class=40)
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    preprocess = backbone.preprocess  # a prepared model may be wrapped and then has no .backbone
    model = tk.attach_head(backbone, classes, hidden=(256,), pooling="flatten")
    tk.freeze_until(model, "block5")
    frozen = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if not p.requires_grad}

    # pass every parameter: frozen ones have no gradient, and optimizers skip these
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    loader = DataLoader(TensorDataset(images, targets), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(3):
        model.train()  # the frozen blocks stay in eval mode
        for raw, labels in loader:
            loss = cross_entropy(model(preprocess(raw)), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}  loss {loss.item():.3f}")

    model.eval()
    test_images, test_targets, _ = read_images("test", per_class=20)
    test_loader = accelerator.prepare(DataLoader(TensorDataset(test_images, test_targets), batch_size=100))
    right = []
    for raw, labels in test_loader:
        with torch.no_grad():
            predicted = model(preprocess(raw)).argmax(dim=1)
        right.append(accelerator.gather_for_metrics(predicted == labels))
    after = dict(accelerator.unwrap_model(model).named_parameters())
    accelerator.print(f"frozen unchanged: {all(torch.equal(after[name].cpu(), frozen[name]) for name in frozen)}")
    accelerator.print(f"accuracy {torch.cat(right).float().mean().item():.3f}")


if __name__ == "__main__":
    main()
