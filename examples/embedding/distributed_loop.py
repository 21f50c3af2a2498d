"""A loop of your own in several processes: DistributedDataParallel or FSDP2 around what trains, features from a cache.

Run from a clone: torchrun --standalone --nproc-per-node=2 examples/embedding/distributed_loop.py ddp head
The first word is ddp or fsdp2; the second is where training begins: head, block5, ...
"""

import sys

import torch
from subset import WEIGHTS, read_images
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import transferkit as tk


def main() -> None:
    kind, boundary = sys.argv[1:]
    device = tk.Device("auto")  # under torchrun each process takes a GPU of its own
    distributed.init_process_group("nccl" if device.torch_device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # the same head in each process
    images, targets, classes = read_images("train", per_class=25)
    test = read_images("test", per_class=10)[:2]
    backbone = tk.load_backbone("vgg16", weights=WEIGHTS, preprocessing="IMAGENET1K_FEATURES", image_size=32)
    model = tk.freeze_until(tk.attach_head(backbone, classes, hidden=(64,)), "head")
    rows, _ = tk.cache_features(model, (images, targets), device=device).numpy()  # each computes a part, all have all
    model.head.standardize.mean.copy_(torch.from_numpy(rows.mean(axis=0)))
    model.head.standardize.std.copy_(torch.from_numpy(rows.std(axis=0) + 1e-6))

    tk.freeze_until(model, boundary)
    features = tk.cache_features(model, (images, targets), device=device)  # those of the layers that stay frozen
    frozen, suffix = model.split()  # only what trains is wrapped: no find_unused_parameters, no frozen weight is sent
    before = [value.clone() for value in frozen.state_dict().values()]
    suffix.to(memory_format=torch.contiguous_format)  # FSDP2 refuses convolutions that are channels-last
    wrapped = fully_shard(suffix) if kind == "fsdp2" else DistributedDataParallel(suffix)
    lr = 1e-3 if boundary == "head" else 1e-4
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=lr)  # after wrapping: fsdp2 replaces the parameters
    sampler = DistributedSampler(features, seed=0)
    loader = DataLoader(features, batch_size=32 // distributed.get_world_size(), sampler=sampler)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        wrapped.train()  # what freeze_until froze stays in eval mode
        for inputs, labels in device.batches(loader):
            with device.autocast():
                loss = cross_entropy(wrapped(inputs), labels)
            device.step(loss, optimizer, clip_grad_norm=1.0)

    wrapped.eval()
    with torch.no_grad(), device.autocast():
        correct = (wrapped(frozen(backbone.preprocess(device.move(test[0])))).argmax(dim=1).cpu() == test[1]).sum()
    parameters = sum(p.numel() for p in wrapped.parameters())
    if distributed.get_rank() == 0:
        same = all(map(torch.equal, before, (value.cpu() for value in frozen.state_dict().values())))
        print(f"trained {parameters:,} parameters; frozen layers unchanged: {same}")
        print(f"accuracy {correct.item() / len(test[1]):.3f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
