"""The contestants: each is a file `with_<name>.py`, with one function `(job, data)` per configuration."""

CONFIGURATIONS = {
    "transferkit": ("default", "uncached", "kept"),
    "pytorch": ("default", "autocast", "best"),
    "lightning": ("default", "best"),
    "fastai": ("default", "best"),
    "keras": ("default", "best"),
    "skorch": ("default", "best"),
}
PACKAGES = {  # packages that must be installed, and whose versions are recorded
    "transferkit": ("transferkit", "torch"),
    "pytorch": ("torch", "torchvision"),
    "lightning": ("lightning", "torch", "torchvision"),
    "fastai": ("fastai", "torch", "torchvision"),
    "keras": ("keras", "tensorflow", "torch"),
    "skorch": ("skorch", "torch", "torchvision"),
}
BEST_ENVIRONMENT = {  # glibc keeps freed memory, as jemalloc and tcmalloc do, which PyTorch's tuning guide suggests
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
}
