"""What make_env shows, against tables of scripted frames, and against ALE's own environment; the
lives and FIRE, against tables."""

import gymnasium as gym
import numpy as np
import pytest
from ale_py import Action
from gymnasium.utils.env_checker import check_env
from scripted import Scripted

from dqn_atari import Args, Lives, make_env, make_vec_env


class ScriptedGame(gym.Env):
    """Frame number t is uniformly of grey level t; the game ends after `length` frames."""

    observation_space = gym.spaces.Box(0, 255, (210, 160), np.uint8)
    action_space = gym.spaces.Discrete(2)

    _frameskip = 1  # what Gymnasium's AtariPreprocessing asks of an Atari game

    def __init__(self, levels, length, max_frames):
        self.levels, self.length, self.max_frames = levels, length, max_frames
        self.ale = self

    def getScreenGrayscale(self, picture):
        picture[:] = self.levels[self.t]

    def lives(self):
        return 3

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros((210, 160), np.uint8), {}

    def step(self, action):
        self.t += 1
        over, truncated = self.t >= self.length, self.t >= self.max_frames
        return np.zeros((210, 160), np.uint8), 1.0 * self.t, over, truncated, {"t": self.t}


def play(levels, length, steps, max_frames):
    env = gym.wrappers.AtariPreprocessing(ScriptedGame(levels, length, max_frames), 0)
    rows = [(int(env.reset(seed=0)[0].max()), 0.0, False, False)]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(0)
        assert obs.shape == (84, 84) and obs.dtype == np.uint8
        assert obs.min() == obs.max()
        rows.append((int(obs.max()), reward, terminated, truncated))
    return rows


@pytest.mark.parametrize(
    "levels, length, max_frames, expected",
    [
        # The maximum of the last two of four frames, whichever is brighter; rewards summed.
        (
            [0, 9, 9, 1, 2, 9, 9, 6, 5],
            99,
            1000,
            [(0, 0, False, False), (2, 10, False, False), (6, 26, False, False)],
        ),
        # An ending in the first of the four frames leaves the picture of the step before.
        (
            [0, 9, 9, 1, 2, 7, 7, 7, 7],
            5,
            1000,
            [(0, 0, False, False), (2, 10, False, False), (2, 5, True, False)],
        ),
        # An ending in the last of the four: the third was kept already.
        (
            [0, 9, 9, 1, 2, 7, 7, 6, 7],
            8,
            1000,
            [(0, 0, False, False), (2, 10, False, False), (6, 26, True, False)],
        ),
        # The frame limit truncates; a game may end on the same frame.
        (
            [0, 9, 9, 1, 2, 7, 7, 6, 7],
            99,
            8,
            [(0, 0, False, False), (2, 10, False, False), (6, 26, False, True)],
        ),
        (
            [0, 9, 9, 1, 2, 7, 7, 6, 7],
            8,
            8,
            [(0, 0, False, False), (2, 10, False, False), (6, 26, True, True)],
        ),
    ],
)
def test_skip_max_and_endings(levels, length, max_frames, expected):
    assert play(levels, length, 2, max_frames) == expected


@pytest.mark.parametrize("game", ["Breakout", "Backgammon", "VideoCheckers"])
def test_no_ops_but_none_where_action_0_is_fire(game):
    env = make_env(f"ALE/{game}-v5")
    env.reset(seed=1)
    frames = {env.reset()[1]["episode_frame_number"] for _ in range(100)}
    if env.unwrapped.get_action_meanings()[0] == "NOOP":
        assert max(frames) - min(frames) == 29 and len(frames) > 20
    else:
        assert game != "Breakout" and len(frames) == 1


def test_stack_begins_with_zeros_and_keeps_the_newest_last():
    env = make_env("ALE/Pong-v5", repeat_action_probability=0.0, noop_max=0)
    obs, _ = env.reset(seed=1)
    assert obs.shape == (4, 84, 84) and obs.dtype == np.uint8
    assert not obs[:3].any() and obs[3].any()
    before = obs
    for _ in range(6):
        obs, *_ = env.step(0)
        np.testing.assert_array_equal(obs[:3], before[1:])
        before = obs


def test_skip_is_four_frames_and_not_sixteen():
    env = make_env("ALE/Pong-v5", noop_max=0)
    _, info = env.reset(seed=1)
    start = info["frame_number"]
    for _ in range(10):
        _, _, _, _, info = env.step(0)
    assert info["frame_number"] - start == 40


@pytest.mark.parametrize(
    "game, steps, max_episode_frames",
    [
        ("Breakout", 700, 108_000),  # FIRE and lives
        ("Pong", 1400, 108_000),  # FIRE, no lives
        ("SpaceInvaders", 700, 108_000),  # sprites in every other frame
        ("MsPacman", 700, 108_000),  # lives, no FIRE
        ("Freeway", 300, 402),  # neither; truncated in the middle of a step
        ("Seaquest", 500, 400),  # truncated at the end of a step
    ],
)
def test_equal_to_ales_vector_environment(game, steps, max_episode_frames, monkeypatch):
    """Pixels, rewards, endings and lives, through the ends of games, where the step that ends one
    shows the next; the single games are played after the FIRE rule as written here."""
    make = gym.make_vec
    options = {"noop_max": 0, "max_num_frames_per_episode": max_episode_frames}
    monkeypatch.setattr(gym, "make_vec", lambda *a, **kw: make(*a, **kw | options))
    args = Args(env_id=f"ALE/{game}-v5", num_envs=2, repeat_action_probability=0.0)
    envs = make_vec_env(args)
    singles = [
        make_env(
            args.env_id,
            repeat_action_probability=0.0,
            noop_max=0,
            max_episode_frames=max_episode_frames,
        )
        for _ in range(2)
    ]
    meanings = singles[0].unwrapped.get_action_meanings()
    lives, life_began = [0, 0], [0, 0]
    obs, infos = envs.reset(seed=7)
    for i, env in enumerate(singles):
        first, info = env.reset(seed=i)
        np.testing.assert_array_equal(obs[i], first)
        assert infos["lives"][i] == info["lives"]
        lives[i] = info["lives"]
    rng, endings, lost_lives = np.random.default_rng(3), 0, 0
    for t in range(steps):
        actions = rng.integers(envs.single_action_space.n, size=2)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        for i, env in enumerate(singles):
            serve = "FIRE" in meanings and t - life_began[i] < 2
            action = meanings.index("FIRE") if serve else int(actions[i])
            expected, reward, terminated, truncated, info = env.step(action)
            assert (rewards[i], terminations[i], truncations[i]) == (reward, terminated, truncated)
            life_lost = info["lives"] < lives[i] and not (terminated or truncated)
            assert infos["life_lost"][i] == life_lost
            lost_lives += life_lost
            if terminated or truncated:
                np.testing.assert_array_equal(infos["final_obs"][i], expected)
                expected, info = env.reset()
                endings += 1
            if terminated or truncated or life_lost:
                life_began[i] = t + 1
            lives[i] = info["lives"]
            np.testing.assert_array_equal(obs[i], expected)
            assert infos["lives"][i] == info["lives"]
    assert endings >= 2 and (lost_lives > 2 or game in ("Pong", "Freeway", "Seaquest"))


def test_every_option_of_the_vector_environment_is_passed(monkeypatch):
    """ALE's defaults are not ours, and may change."""
    seen = {}
    make = gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda *a, **kw: seen.update(kw) or make(*a, **kw))
    envs = make_vec_env(Args(num_envs=2, repeat_action_probability=0.125))
    assert seen == {
        "vectorization_mode": "vector_entry_point",
        "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP,
        "frameskip": 4,
        "maxpool": True,
        "grayscale": True,
        "img_height": 84,
        "img_width": 84,
        "stack_num": 4,
        "repeat_action_probability": 0.125,
        "noop_max": 30,
        "max_num_frames_per_episode": 108_000,
        "episodic_life": False,
        "life_loss_info": False,
        "use_fire_reset": False,
        "reward_clipping": False,
    }
    assert envs.num_envs == 2
    assert envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP


NO, YES = False, True
# What a step gives: lives, reward, terminated, truncated. Then: FIRE in this step, life_lost.
ONE_GAME = [
    (3, 0, NO, NO, YES, NO),
    (3, 0, NO, NO, YES, NO),
    (3, 0, NO, NO, NO, NO),
    (2, 0, NO, NO, NO, YES),
    (2, 0, NO, NO, YES, NO),
    (2, 0, NO, NO, YES, NO),
    (3, 0, NO, NO, NO, NO),  # an extra life
    (3, 0, NO, NO, NO, NO),
    (2, 0, NO, NO, NO, YES),
    (1, 0, NO, NO, YES, YES),  # lost while FIRE is pressed
    (1, 0, NO, NO, YES, NO),
    (1, 0, NO, NO, YES, NO),
    (3, 0, YES, NO, NO, NO),  # the last life and the game, whose successor has 3
]
ANOTHER = [
    (3, 0, NO, NO, YES, NO),
    (3, 0, NO, NO, YES, NO),
    (2, 0, NO, YES, NO, NO),  # truncated; that the next game has fewer lives is no lost one
    (2, 0, NO, NO, YES, NO),
    (2, 0, NO, YES, YES, NO),
    (2, 0, NO, NO, YES, NO),
    (2, 0, NO, NO, YES, NO),
    (1, 0, YES, NO, NO, NO),  # terminated, the same
    (1, 0, NO, NO, YES, NO),
    (1, 0, NO, NO, YES, NO),
    (1, 0, NO, NO, NO, NO),
    (0, 0, NO, NO, NO, YES),  # Boxing and others end long after
    (0, 0, NO, NO, YES, NO),
]


@pytest.mark.parametrize("has_fire", [True, False])
def test_lives_and_fire_step_by_step(has_fire):
    games = Scripted([row[:4] for row in ONE_GAME], [row[:4] for row in ANOTHER])
    envs = Lives(games, [Action.NOOP, Action.LEFT, Action.FIRE if has_fire else Action.UP])
    for _ in range(2):  # a reset begins games anew, whatever came before
        envs.reset(seed=1)
        games.actions.clear()
        for t, rows in enumerate(zip(ONE_GAME, ANOTHER)):
            infos = envs.step(np.array([0, 1]))[-1]
            fire = [2 if has_fire and row[4] else own for own, row in enumerate(rows)]
            assert games.actions[t] == fire, t
            assert infos["life_lost"].tolist() == [row[5] for row in rows], t
            assert infos["lives"].tolist() == [row[0] for row in rows]


@pytest.mark.parametrize("game", ["Breakout", "Pong", "MsPacman", "Backgammon"])
def test_both_environments_have_the_same_actions(game):
    envs = make_vec_env(Args(env_id=f"ALE/{game}-v5", num_envs=1))
    env = make_env(f"ALE/{game}-v5")
    action_set = envs.unwrapped.ale.get_action_set()
    assert action_set == env.unwrapped.ale.getMinimalActionSet()
    assert len(action_set) == envs.single_action_space.n == env.action_space.n


@pytest.mark.parametrize("game", ["Breakout", "MsPacman"])
def test_gymnasium_accepts_and_rebuilds_the_environment(game):
    env = make_env(f"ALE/{game}-v5", noop_max=7)
    check_env(env, skip_render_check=True)
    again = gym.make(env.spec)
    for seed in (1, 2):
        first, second = env.reset(seed=seed)[0], again.reset(seed=seed)[0]
        for _ in range(20):
            np.testing.assert_array_equal(first, second)
            first, second = env.step(2)[0], again.step(2)[0]


def test_films_are_as_fast_as_the_game():
    env = make_env("ALE/Breakout-v5", render_mode="rgb_array")
    assert env.metadata["render_fps"] == 15 and "rgb_array" in env.metadata["render_modes"]
