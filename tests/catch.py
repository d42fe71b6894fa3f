"""Catch, a game small enough to be learnt in a test, to put in place of make_vec_env.

A ball falls in a random column of a 5 x 5 board, a paddle moves along the lowest row. After 4 steps
the game ends: +3 for the ball caught, -3 for a ball missed (so that clipping shows). A random
policy catches about one in three. The stack, the endings and the infos are those of ALE's
environment: the step that ends a game returns the first observation of the next.
"""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from ale_py import Action

from dqn_atari import Lives

# For ALE in a stand-in for its environment.
NO_FIRE = SimpleNamespace(get_action_set=lambda: [Action.LEFT, Action.NOOP, Action.RIGHT])


class Catch(gym.vector.VectorEnv):
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    ale = NO_FIRE

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.single_action_space = gym.spaces.Discrete(3)
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.stacks = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        self.row, self.ball, self.paddle = (np.zeros(self.num_envs, int) for _ in range(3))
        return self._observe(np.ones(self.num_envs, bool)), self._infos()

    def step(self, actions):
        self.paddle = np.clip(self.paddle + actions - 1, 0, 4)
        self.row = self.row + 1
        ended = self.row == 4
        rewards = np.where(ended, np.where(self.ball == self.paddle, 3, -3), 0)
        return self._observe(ended), rewards, ended, np.zeros(self.num_envs, bool), self._infos()

    def _infos(self):
        return {"lives": np.zeros(self.num_envs, np.int32)}

    def _observe(self, starting):
        """Deal new games where they start, and draw the newest picture of every stack."""
        for i in range(self.num_envs):
            if starting[i]:
                self.row[i], (self.ball[i], self.paddle[i]) = 0, self.rng.integers(5, size=2)
                self.stacks[i] = 0
            self.stacks[i, :-1] = self.stacks[i, 1:].copy()
            board = np.zeros((5, 5), np.uint8)
            board[self.row[i], self.ball[i]] = 255
            board[4, self.paddle[i]] = 128
            self.stacks[i, -1] = np.pad(board.repeat(16, 0).repeat(16, 1), 2)
        return self.stacks.copy()


def make_catch(args):
    envs = Catch(args.num_envs)
    envs = Lives(envs, envs.ale.get_action_set())
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)
