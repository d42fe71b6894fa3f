"""Parts of the file run in another script, with nothing but the file's imports."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCE = Path(__file__).parent.parent / "dqn_atari.py"


def cut_out(*names):
    """The namespace of a script that has the imports and these definitions."""
    kept = []
    for node in ast.parse(SOURCE.read_text()).body:
        defined = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            defined = [target.id for target in node.targets]
        registers = ast.unparse(node) == "gym.register_envs(ale_py)"
        if isinstance(node, (ast.Import, ast.ImportFrom)) or registers or set(defined) & set(names):
            kept.append(node)
    namespace = {}
    exec(compile(ast.Module(kept, []), "cut_out", "exec"), namespace)
    return [namespace[name] for name in names]


@pytest.mark.parametrize("double_q", [False, True])
def test_the_buffer_the_network_and_the_loss(double_q):
    *_, ReplayBuffer, QNetwork, td_loss = cut_out(
        "STACK", "Batch", "ReplayBuffer", "QNetwork", "td_loss"
    )
    buffer = ReplayBuffer(40, 2)
    for step in range(10):
        frames = np.full((2, 84, 84), step, np.uint8)
        buffer.add(frames, [0, 1], [1.0, 0.0], [False, step == 5], [False, step == 6])
    network = QNetwork(2)
    loss, q_pred = td_loss(network, QNetwork(2), buffer.sample(4), 0.99, double_q)
    loss.backward()
    assert q_pred.shape == (4,) and torch.isfinite(loss)


def test_the_environments():
    *_, Args, make_vec_env, make_env = cut_out(
        "STACK", "Lives", "Args", "make_vec_env", "make_env"
    )
    envs = make_vec_env(Args(num_envs=2))
    obs, _ = envs.reset(seed=1)
    assert obs.shape == envs.step(np.array([0, 0]))[0].shape == (2, 4, 84, 84)
    env = make_env("ALE/Pong-v5")
    obs, _ = env.reset(seed=1)
    assert obs.shape == env.step(0)[0].shape == (4, 84, 84)
