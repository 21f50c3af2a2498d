"""Write the pretrained convolutions, and their features of given images, as numpy arrays for the Keras peer.

Runs in its own process, so that PyTorch does not count in the measured memory:
python benchmarks/peers/export_vgg16.py weights.pt images.npy output.npz (images float `(N, 3, H, W)`, preprocessed)
"""

import sys

import numpy as np
import torch
from torchvision.models.vgg import cfgs, make_layers


def main() -> None:
    weights_path, images_path, output_path = sys.argv[1:]
    everything = torch.load(weights_path, weights_only=True)
    state = {name: value.float() for name, value in everything.items() if name.startswith("features.")}
    body = make_layers(cfgs["D"], batch_norm=False)
    body.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    with torch.no_grad():
        features = body(torch.from_numpy(np.load(images_path)))
    np.savez(output_path, features=features.numpy(), **{name: value.numpy() for name, value in state.items()})


if __name__ == "__main__":
    main()
