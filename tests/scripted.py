"""Games after a table, to put in place of ALE's."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from ale_py import Action


class Scripted(gym.vector.VectorEnv):
    """Row t of a game's table is what step t gives: lives, reward, terminated, truncated. The lives
    of a step that ends a game are those of the next, as ALE gives them. The pictures are numbered
    through; the actions are written down."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    single_action_space = gym.spaces.Discrete(3)
    ale = SimpleNamespace(get_action_set=lambda: [Action.NOOP, Action.LEFT, Action.FIRE])

    def __init__(self, *tables):
        self.num_envs, self.tables, self.actions = len(tables), tables, []

    def reset(self, *, seed=None, options=None):
        self.t = -1
        return self._obs(), {"lives": np.full(self.num_envs, 3)}

    def step(self, actions):
        self.t += 1
        self.actions.append(actions.tolist())
        lives, *rest = map(np.array, zip(*(table[self.t] for table in self.tables)))
        return self._obs(), *rest, {"lives": lives}

    def _obs(self):
        return np.full((self.num_envs, 4, 84, 84), self.t + 2, np.uint8)
