"""One thread a process: two would wait for each other wherever other work shares the cores."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "real_network: with QNetwork, not its small stand-in")
    config.addinivalue_line("markers", "real_game: with ALE's game, not its small stand-in")
