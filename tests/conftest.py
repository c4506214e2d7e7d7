"""Tests never reach for a network: a model that is not on disk fails at once. Only those marked gpu see a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config) -> None:
    """Hide the GPUs, from this process and from those that tests start, unless their tests were asked for: -m gpu.

    All other tests compare with numbers of the CPU, or expect that there is no GPU.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
