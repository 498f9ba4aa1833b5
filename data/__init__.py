"""How the CPU's libraries work. They read it when torch is loaded, so every script imports this package first.

In a notebook, too, import it (or `sample`, or `train`) before torch.
"""
import os

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "10000")  # it compiles a kernel for each shape: keep all
# OpenMP's threads wait for each other in a loop: 1000 rounds (microseconds) instead of 300,000, then they give the core
# away. Alone a run is as fast. Beside a training, sample.py takes 0.8 s instead of 48 s, and does not slow it as much.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
