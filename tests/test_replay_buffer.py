"""The ring of pictures against a naive list that keeps every transition whole."""

import math

import numpy as np
import pytest
import torch

import dqn_atari
from dqn_atari import ReplayBuffer


class Oracle:
    """Plays random episodes into a ReplayBuffer as train() would, and lists what really happened.

    Every picture is filled with its own number, so a stack can be read off as STACK numbers. A game
    ends in one of `mean_length` steps, and loses a life in as many; half the endings are terminal,
    the others cut the game off.
    """

    def __init__(self, capacity, num_envs, seed, mean_length=6):
        self.buffer = ReplayBuffer(capacity, num_envs)
        self.buffer.frames.fill_(255)  # what was not written must not be seen
        self.rng = np.random.default_rng(seed)
        self.mean_length = mean_length
        self.count, self.slots = 0, []
        self.stacks = np.zeros((num_envs, dqn_atari.STACK), int)
        self.show(np.ones(num_envs, bool))

    def show(self, starting):
        """Every game's next picture; before that of a game that starts there are zeros."""
        n = len(starting)
        self.stacks = np.where(starting[:, None], 0, np.roll(self.stacks, -1, axis=1))
        # As bytes, never 0: zeros are the padding.
        self.stacks[:, -1] = np.arange(self.count, self.count + n) % 251 + 1
        self.count += n

    def step(self, restart=False):
        n = self.buffer.num_envs
        actions = self.rng.integers(18, size=n)
        rewards = self.rng.integers(-1, 2, size=n).astype(np.float32)
        ended, lost_life, over = self.rng.random((3, n)) < [
            [1 / self.mean_length], [1 / self.mean_length], [0.5]
        ]  # fmt: skip
        terminal = np.where(ended, over, lost_life)
        obs = self.stacks
        frames = np.repeat(obs[:, -1], 84 * 84).reshape(n, 84, 84).astype(np.uint8)
        ended |= restart
        self.buffer.add(frames, actions, rewards, terminal, ended)
        self.show(ended)
        slot = []
        for i in np.flatnonzero(terminal | ~ended):  # the others were cut off
            next_obs = (*obs[i, 1:], self.stacks[i, -1])
            slot.append((tuple(obs[i]), actions[i], rewards[i], next_obs, terminal[i]))
        self.slots.append(slot)

    def transitions(self):
        """What may be sampled: not the newest slot, nor those that a full ring has overwritten or
        will overwrite next, nor the others whose stacks would reach there."""
        kept = self.slots[-(self.buffer.slots - dqn_atari.STACK + 1) : -1]
        return [transition for slot in kept for transition in slot]


def read(batch):
    """The batch as the oracle writes its transitions."""
    for frames in (batch.obs, batch.next_obs):
        assert frames.shape[1:] == (dqn_atari.STACK, 84, 84) and frames.dtype == torch.uint8
        assert (frames == frames[:, :, :1, :1]).all()
    assert (batch.actions.dtype, batch.rewards.dtype) == (torch.int64, torch.float32)
    assert batch.terminations.dtype == torch.bool
    return list(
        zip(
            map(tuple, batch.obs[:, :, 0, 0].tolist()),
            batch.actions.tolist(),
            batch.rewards.tolist(),
            map(tuple, batch.next_obs[:, :, 0, 0].tolist()),
            batch.terminations.tolist(),
        )
    )


@pytest.mark.parametrize("stack", [2, 4])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [3, 5, 17, 39, 40, 41, 100, 233])
def test_samples_are_exactly_the_oracles_transitions(monkeypatch, stack, num_envs, steps):
    """Before the ring is full, when it is just full, and wrapped around; with restarts."""
    monkeypatch.setattr(dqn_atari, "STACK", stack)
    oracle = Oracle(40 * num_envs + num_envs // 2, num_envs, seed=steps)
    for step in range(steps):
        oracle.step(restart=step % 16 == 15)
    assert len(oracle.buffer) == min(steps - 1, 40 - stack) * num_envs
    expected = set(oracle.transitions())
    assert expected
    seen = set()
    for _ in range(20):
        seen |= set(read(oracle.buffer.sample(128)))
    assert seen == expected  # none that should not be there, and none left out


@pytest.mark.parametrize(
    "terminal, ended, drawn",
    [
        # The step that showed 3, then 4: in the same game, after a lost life, ...
        (False, False, [((0, 1, 2, 3), (1, 2, 3, 4), False), ((1, 2, 3, 4), (2, 3, 4, 5), False)]),
        (True, False, [((0, 1, 2, 3), (1, 2, 3, 4), True), ((1, 2, 3, 4), (2, 3, 4, 5), False)]),
        # ... with the game's end, and where the game was cut off: 4 is another's.
        (True, True, [((0, 1, 2, 3), (1, 2, 3, 4), True), ((0, 0, 0, 4), (0, 0, 4, 5), False)]),
        (False, True, [((0, 0, 0, 4), (0, 0, 4, 5), False)]),
    ],
)
def test_lives_endings_and_cut_offs(terminal, ended, drawn):
    buffer = ReplayBuffer(10, 1)
    for picture in range(1, 6):
        flags = [picture == 3 and terminal], [picture == 3 and ended]
        buffer.add(np.full((1, 84, 84), picture, np.uint8), [0], [0.0], *flags)
    start = [((0, 0, 0, 1), (0, 0, 1, 2), False), ((0, 0, 1, 2), (0, 1, 2, 3), False)]
    sampled = set(read(buffer.sample(500)))
    assert sampled == {(obs, 0, 0.0, next_obs, end) for obs, next_obs, end in start + drawn}


def test_restarted_games_leave_no_transition_across_the_restart():
    oracle = Oracle(90, 3, seed=1, mean_length=1000)
    for step in range(70):
        oracle.step(restart=step % 7 == 6)
    sampled = set(read(oracle.buffer.sample(3000)))
    assert sampled == set(oracle.transitions())


@pytest.mark.parametrize("steps", [30, 100])
def test_sampling_is_uniform(steps):
    oracle = Oracle(120, 3, seed=2, mean_length=5)
    for _ in range(steps):
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
    tensors = [value for value in vars(buffer).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors if tensor.ndim) == 1600 * 7063
    assert buffer.frames.shape == (100, 16, 84, 84)


def test_sampling_nothing_is_an_error():
    buffer = ReplayBuffer(20, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            buffer.sample(4)
        buffer.add(np.zeros((2, 84, 84), np.uint8), [0, 0], [0.0, 0.0], [False] * 2, [False] * 2)
    assert len(buffer) == 2


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_batch_holds_no_cut_off_step_with_near_certainty(monkeypatch, batch_size):
    """With one of 4 slots cut off, as densely as they may be, fewer than one batch in 1e12 does."""
    oracle = Oracle(400, 1, seed=0, mean_length=10**9)
    for step in range(120):
        oracle.step(restart=step % 4 == 3)
    expected = set(oracle.transitions())
    assert all(set(read(oracle.buffer.sample(batch_size))) <= expected for _ in range(300))
    drawn, randint = [], torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda *a, **kw: drawn.append(randint(*a, **kw)) or drawn[-1]
    )
    oracle.buffer.sample(batch_size)
    draws = drawn[0].numel()
    chance = sum(
        math.comb(draws, k) * 0.25**k * 0.75 ** (draws - k)
        for k in range(draws - batch_size + 1, draws + 1)
    )
    assert chance < 1e-12


@pytest.mark.parametrize("steps", [1, 10, 40, 55])
def test_state_can_be_loaded_into_a_ring_as_large_or_larger(steps):
    """And goes on there as it would have here."""
    oracle = Oracle(120, 3, seed=4)
    for _ in range(steps):
        oracle.step()
    copies = [ReplayBuffer(120, 3)] + [ReplayBuffer(300, 3)] * (steps < 36)
    for copy in copies:
        copy.refill(vars(oracle.buffer))
        assert len(copy) == len(oracle.buffer)
        copy.add(np.full((3, 84, 84), 99, np.uint8), [0] * 3, [0.0] * 3, [False] * 3, [False] * 3)
    oracle.buffer.add(
        np.full((3, 84, 84), 99, np.uint8), [0] * 3, [0.0] * 3, [False] * 3, [False] * 3
    )
    torch.manual_seed(0)
    expected = oracle.buffer.sample(500)
    for copy in copies:
        torch.manual_seed(0)
        for ours, theirs in zip(copy.sample(500), expected):
            assert torch.equal(ours, theirs)
