"""Targets computed by hand, the schedule, the actions, the network."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from dqn_atari import Batch, QNetwork, linear_schedule, select_actions, td_loss


class Table(nn.Module):
    """Q-values looked up by the number that fills the observation."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, obs):
        return self.rows[obs[:, 0, 0, 0].long()]


def batch(obs, actions, rewards, next_obs, terminations):
    def stack(numbers):
        return torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 84, 84)

    return Batch(
        stack(obs),
        torch.tensor(actions),
        torch.tensor(rewards),
        stack(next_obs),
        torch.tensor(terminations),
    )


ONLINE = [[1.0, 2.0], [5.0, 4.0], [0.0, 0.5]]
TARGET = [[0.0, 0.0], [1.0, 3.0], [2.0, 8.0]]


@pytest.mark.parametrize(
    "double_q, targets",
    [
        # y = r + 0.9 max Q-(s'): max of (1, 3), ended, max of (2, 8)
        (False, [1 + 0.9 * 3.0, -1.0, 0.9 * 8.0]),
        # y = r + 0.9 Q-(s', argmax Q(s')): action 0 of (5, 4) is worth 1 in the target network
        (True, [1 + 0.9 * 1.0, -1.0, 0.9 * 8.0]),
    ],
)
def test_targets_and_loss(double_q, targets):
    online, target = Table(ONLINE), Table(TARGET)
    sample = batch([0, 0, 1], [0, 1, 1], [1.0, -1.0, 0.0], [1, 2, 2], [False, True, False])
    loss, q_pred = td_loss(online, target, sample, 0.9, double_q)
    assert q_pred.tolist() == [1.0, 2.0, 4.0]
    errors = [abs(q - y) for q, y in zip([1.0, 2.0, 4.0], targets)]
    huber = [0.5 * e * e if e < 1 else e - 0.5 for e in errors]
    assert loss.item() == pytest.approx(sum(huber) / 3, rel=1e-6)


@pytest.mark.parametrize("double_q", [False, True])
def test_only_the_action_taken_gets_a_gradient_and_the_target_network_none(double_q):
    online, target = Table(ONLINE), Table(TARGET)
    sample = batch([0, 0], [0, 0], [0.0, 0.0], [1, 2], [False, False])
    td_loss(online, target, sample, 0.9, double_q)[0].backward()
    assert target.rows.grad is None
    touched = online.rows.grad != 0
    assert touched.tolist() == [[True, False], [False, False], [False, False]]
    assert online.rows.grad.abs().max() <= 1  # errors above 1 are clipped


def test_schedule():
    values = [linear_schedule(1.0, 0.1, 100, t) for t in (0, 50, 100, 1000)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_network_takes_bytes_and_has_cleanrls_layers():
    network = QNetwork(6)
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    q_values = network(obs)
    assert q_values.shape == (3, 6) and q_values.dtype == torch.float32 and q_values.std() > 0
    torch.testing.assert_close(q_values, network.network(obs.float() / 255))
    layers = {name.split(".")[1] for name in network.state_dict()}
    assert layers == {"0", "2", "4", "7", "9"}
    assert sum(p.numel() for p in QNetwork(4).parameters()) == 1_686_180


def test_hidden_layers_begin_orthogonal():
    hidden = [layer for layer in QNetwork(6).network[:-1] if hasattr(layer, "weight")]
    assert len(hidden) == 4
    for layer in hidden:
        weight = layer.weight.flatten(1)  # (outputs, inputs)
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-4, rtol=0)
        assert (layer.bias == 0).all()


def test_greedy_and_random_actions():
    rng = np.random.default_rng(0)
    q_values = np.tile([[0.0, 1.0, 3.0, 2.0], [5.0, 1.0, 3.0, 2.0]], (500, 1))
    greedy = np.tile([2, 0], 500)
    assert (select_actions(q_values, 0.0, rng) == greedy).all()
    counts = np.bincount(select_actions(q_values, 1.0, rng), minlength=4)
    assert len(counts) == 4 and counts.min() > 180  # 250 each expected
    tenth = select_actions(q_values, 0.1, rng)
    assert 40 < (tenth != greedy).sum() < 120  # 3 of 4 random actions differ: 75 expected


def test_the_same_generator_gives_the_same_actions():
    rngs = map(np.random.default_rng, (1, 1, 2))
    first, second, other = (select_actions(np.zeros((50, 4)), 0.5, rng).tolist() for rng in rngs)
    assert first == second != other
