"""The ring of frames against a naive list that keeps every transition whole."""

import math

import numpy as np
import pytest
import torch

from dqn_atari import ReplayBuffer


class Oracle:
    """Plays random episodes into a ReplayBuffer as train() would, and lists what really happened.

    Every frame is filled with its own number, so a stack can be read off as 4 numbers.
    """

    def __init__(self, capacity, num_envs, seed, mean_length=6):
        self.buffer = ReplayBuffer(capacity, num_envs)
        self.buffer.frames.fill_(255)  # what was not written must not be seen
        self.rng = np.random.default_rng(seed)
        self.mean_length = mean_length
        self.count, self.slots = 0, []
        self.over = np.ones(num_envs, bool)
        self.stacks = np.zeros((num_envs, 4), int)
        self.truncated = np.zeros(num_envs, bool)
        self.begin(np.ones(num_envs, bool))

    def frame_numbers(self):
        n = self.buffer.num_envs
        numbers = np.arange(self.count + 1, self.count + n + 1)
        self.count += n
        return numbers % 251 + 1  # as bytes, never 0: zeros are the padding

    def begin(self, starting):
        """Show every game its next frame; those that are starting have zeros before it."""
        self.stacks = np.where(starting[:, None], 0, np.roll(self.stacks, -1, axis=1))
        self.stacks[:, -1] = self.frame_numbers()
        self.over = np.zeros_like(starting)

    def step(self, restart=False):
        n = self.buffer.num_envs
        actions = self.rng.integers(18, size=n)
        rewards = self.rng.integers(-1, 2, size=n).astype(np.float32)
        was_over = self.over
        ends = (self.rng.random(n) < 1 / self.mean_length) & ~was_over
        terminations = ends & (self.rng.random(n) < 0.5)  # the other ends are truncations
        rewards[was_over] = 0
        obs = self.stacks.copy()
        frames = np.repeat(obs[:, -1], 84 * 84).reshape(n, 84, 84).astype(np.uint8)
        self.buffer.add(frames, actions, rewards, terminations, was_over)
        if restart:
            self.buffer.end_games()
        self.begin(np.ones(n, bool) if restart else was_over)
        self.over = np.zeros(n, bool) if restart else ends
        real = ~was_over & (not restart)
        self.slots.append(
            [
                (tuple(obs[i]), actions[i], rewards[i], tuple(self.stacks[i]), terminations[i])
                if real[i]
                else None
                for i in range(n)
            ]
        )

    def transitions(self):
        """What may be sampled: not the newest slot, nor those that a full ring has overwritten or
        will overwrite next, nor the three whose stacks would reach there."""
        kept = self.slots[-(self.buffer.slots - 3) : -1]
        return [t for slot in kept for t in slot if t is not None]


def read(batch):
    """The batch as the oracle writes its transitions."""
    for frames in (batch.obs, batch.next_obs):
        assert frames.shape[1:] == (4, 84, 84) and frames.dtype == torch.uint8
        assert (frames == frames[:, :, :1, :1]).all()
    return list(
        zip(
            map(tuple, batch.obs[:, :, 0, 0].tolist()),
            batch.actions.tolist(),
            batch.rewards.tolist(),
            map(tuple, batch.next_obs[:, :, 0, 0].tolist()),
            batch.terminations.tolist(),
        )
    )


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [2, 5, 17, 39, 40, 41, 100, 333])
def test_samples_are_exactly_the_oracles_transitions(num_envs, steps):
    """Invariants 1 to 4, before the ring is full, when it is just full, and wrapped around."""
    oracle = Oracle(40 * num_envs, num_envs, seed=steps)
    for _ in range(steps):
        oracle.step()
    expected = set(oracle.transitions())
    assert expected
    seen = set()
    for _ in range(40):
        seen |= set(read(oracle.buffer.sample(64)))
    assert seen == expected  # none that should not be there, and none left out


@pytest.mark.parametrize("terminated", [False, True])
def test_an_ending_leads_to_its_true_last_frame(terminated):
    """Frames 1, 2, 3 are a game that ends with 3, frames 4 and 5 the next one."""
    buffer = ReplayBuffer(10, 1)
    for frame, ends, over in [(1, 0, 0), (2, terminated, 0), (3, 0, 1), (4, 0, 0), (5, 0, 0)]:
        buffer.add(np.full((1, 84, 84), frame, np.uint8), [0], [0.0], [bool(ends)], [bool(over)])
    assert set(read(buffer.sample(500))) == {
        ((0, 0, 0, 1), 0, 0.0, (0, 0, 1, 2), False),
        ((0, 0, 1, 2), 0, 0.0, (0, 1, 2, 3), terminated),
        ((0, 0, 0, 4), 0, 0.0, (0, 0, 4, 5), False),
    }


def test_restarted_games_leave_no_transition_across_the_restart():
    oracle = Oracle(90, 3, seed=1, mean_length=1000)
    for step in range(70):
        oracle.step(restart=step % 7 == 6)
    sampled = set(read(oracle.buffer.sample(3000)))
    assert sampled == set(oracle.transitions())


def test_sampling_is_uniform():
    oracle = Oracle(120, 3, seed=2, mean_length=5)
    for _ in range(100):
        oracle.step()
    expected = oracle.transitions()
    assert len(expected) == len(set(expected))
    draws = 20_000
    torch.manual_seed(0)
    counts = dict.fromkeys(expected, 0)
    for _ in range(draws // 1000):
        for transition in read(oracle.buffer.sample(1000)):
            counts[transition] += 1
    share = draws / len(expected)
    chi2 = sum((count - share) ** 2 / share for count in counts.values())
    degrees = len(expected) - 1
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5


def test_bytes_of_a_transition():
    buffer = ReplayBuffer(1600, 16)
    rings = [ring for ring in vars(buffer).values() if isinstance(ring, torch.Tensor)]
    assert sum(ring.nbytes for ring in rings) == 1600 * 7063
    assert buffer.frames.shape == (100, 16, 84, 84)


def test_sampling_nothing_is_an_error():
    buffer = ReplayBuffer(20, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            buffer.sample(4)
        buffer.add(np.zeros((2, 84, 84), np.uint8), [0, 0], [0.0, 0.0], [False] * 2, [False] * 2)
    assert len(buffer) == 2


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_batch_holds_no_ending_with_near_certainty(monkeypatch, batch_size):
    """With a game ending in one of 50 rows, a batch is spoilt by fewer than one in 1e12."""
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **kw: drawn.append(a[1]) or randint(*a, **kw))
    oracle = Oracle(400, 1, seed=0)
    for _ in range(100):
        oracle.step()
    oracle.buffer.sample(batch_size)
    (draws,) = drawn[0]
    spare = draws - batch_size
    chance = sum(
        math.comb(draws, k) * 0.02**k * 0.98 ** (draws - k) for k in range(spare + 1, draws + 1)
    )
    assert chance < 1e-12


@pytest.mark.parametrize("steps", [10, 40, 55])
def test_state_can_be_loaded_into_a_ring_as_large_or_larger(steps):
    oracle = Oracle(120, 3, seed=4)
    for _ in range(steps):
        oracle.step()
    copy = ReplayBuffer(120, 3)
    copy.load_state_dict(vars(oracle.buffer))
    torch.manual_seed(0)
    expected = oracle.buffer.sample(500)
    torch.manual_seed(0)
    for ours, theirs in zip(copy.sample(500), expected):
        assert torch.equal(ours, theirs)
    if steps < 36:
        larger = ReplayBuffer(300, 3)
        larger.load_state_dict(vars(oracle.buffer))
        torch.manual_seed(0)
        for ours, theirs in zip(larger.sample(500), expected):
            assert torch.equal(ours, theirs)
