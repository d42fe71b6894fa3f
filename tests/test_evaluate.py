"""evaluate.py with networks made by hand, so that what it must report is known."""

import dataclasses
import json

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import Action
from catch import NO_FIRE, make_catch
from small_network import SmallNetwork

import evaluate
from dqn_atari import Args, QNetwork
from evaluate import RANDOM_AND_HUMAN, Options, main


def constant_network(path, q_values, args=Args(), step=100):
    """A checkpoint whose network says `q_values` whatever it sees."""
    network = evaluate.QNetwork(len(q_values))
    for parameter in network.parameters():
        parameter.data.zero_()
    network.network[-1].bias.data = torch.tensor(q_values)
    torch.save(
        {"model": network.state_dict(), "args": dataclasses.asdict(args), "global_step": step}, path
    )
    return str(path)


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setattr(evaluate, "QNetwork", SmallNetwork)


def evaluated(path, options):
    return evaluate.evaluate(evaluate.load(path, options), options)


def test_a_do_nothing_policy_plays_a_hundred_whole_games_of_sticky_breakout(
    tmp_path, capsys, small_network
):
    """The serve rule: without it Breakout waits for FIRE until the frame cap."""
    path = constant_network(tmp_path / "model_100.pt", [1.0, 0.0, 0.0, 0.0])
    results = main(Options((path,), episodes=100, json=str(tmp_path / "out.json")))
    (result,) = results
    assert result["episodes"] == len(result["games"]) == 100 and result["capped"] == 0
    assert result["repeat_action_probability"] == 0.25 and result["epsilon"] == 0.0
    assert max(game["length"] for game in result["games"]) < 1000
    scores = [game["return"] for game in result["games"]]
    assert result["mean"] == pytest.approx(np.mean(scores)) and 0 <= result["mean"] < 5
    assert result["human_normalised"] == pytest.approx((np.mean(scores) - 1.7) / (30.5 - 1.7))
    assert result["predicted_q"] == 1.0
    assert json.loads((tmp_path / "out.json").read_text()) == results
    output = capsys.readouterr().out
    assert output.count("  game ") == 100 and "game 100: " in output


def test_same_seed_same_games_and_other_seed_others(tmp_path, small_network):
    path = constant_network(tmp_path / "model_100.pt", [0.0, 0.0, 1.0, 0.0])
    checkpoint = evaluate.load(path, Options((path,), episodes=2))
    for epsilon in (0.0, 0.5):
        options = [Options((path,), episodes=2, epsilon=epsilon, seed=seed) for seed in (1, 1, 2)]
        runs = [evaluate.play(checkpoint, each)[0] for each in options]
        assert runs[0] == runs[1] != runs[2]


def test_stickiness_is_that_of_training_unless_told_otherwise(tmp_path, small_network):
    args = Args(repeat_action_probability=0.0)
    path = constant_network(tmp_path / "model_100.pt", [1.0, 0.0, 0.0, 0.0], args)
    for told, used in ((None, 0.0), (0.5, 0.5)):
        options = Options((path,), episodes=1, repeat_action_probability=told)
        assert evaluated(path, options)["repeat_action_probability"] == used


def test_the_realised_return_is_what_followed_every_state(tmp_path, monkeypatch):
    """In Catch: 4 states a game, a clipped reward of 1 or -1 behind the last."""
    monkeypatch.setattr(evaluate, "make_vec_env", make_catch)
    path = constant_network(tmp_path / "model_100.pt", [0.0, 0.5, 0.0], Args(gamma=0.9))
    result = evaluated(path, Options((path,), episodes=50))
    assert {game["return"] for game in result["games"]} == {-3.0, 3.0}
    assert {game["length"] for game in result["games"]} == {4}
    mean_sign = np.mean([np.sign(game["return"]) for game in result["games"]])
    discounts = np.mean([0.9**k for k in range(4)])
    assert result["realised_return"] == pytest.approx(mean_sign * discounts)
    assert result["predicted_q"] == 0.5


class Lives(gym.vector.VectorEnv):
    """Game i has 3 lives of i + 1 steps each, and a point at the end of each life."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    ale = NO_FIRE

    def __init__(self, num_envs):
        self.num_envs, self.single_action_space = num_envs, gym.spaces.Discrete(2)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.life = np.arange(num_envs) + 1

    def reset(self, *, seed=None, options=None):
        self.t, self.over = np.zeros(self.num_envs, int), np.zeros(self.num_envs, bool)
        return self._obs(), self._infos()

    def step(self, actions):
        self.t = np.where(self.over, 0, self.t + 1)
        rewards = np.where((self.t % self.life == 0) & (self.t > 0), 1, 0)
        self.over = self.t == 3 * self.life
        return self._obs(), rewards, self.over.copy(), np.zeros(self.num_envs, bool), self._infos()

    def _obs(self):
        return np.zeros((self.num_envs, 4, 84, 84), np.uint8)

    def _infos(self):
        return {"lives": 3 - self.t // self.life}


@pytest.mark.parametrize("terminal_on_life_loss", [True, False])
def test_games_are_dealt_evenly_and_returns_end_with_a_life(
    tmp_path, monkeypatch, terminal_on_life_loss
):
    monkeypatch.setattr(
        evaluate,
        "make_vec_env",
        lambda args: gym.wrappers.vector.RecordEpisodeStatistics(Lives(args.num_envs)),
    )
    args = Args(gamma=0.5, terminal_on_life_loss=terminal_on_life_loss)
    path = constant_network(tmp_path / "model_100.pt", [0.0, 1.0], args)
    result = evaluated(path, Options((path,), episodes=40))
    lengths = [game["length"] for game in result["games"]]
    assert len(lengths) == 40
    shares = [lengths.count(3 * (i + 1)) for i in range(16)]
    assert shares == [3] * 8 + [2] * 8  # 40 games of 16: not as many as come first
    followed = []
    for i, share in enumerate(shares):
        for t in range(3 * (i + 1)):
            last = (t // (i + 1) + 1) * (i + 1) if terminal_on_life_loss else 3 * (i + 1)
            ends = [s for s in range(t + 1, last + 1) if s % (i + 1) == 0]
            followed += [sum(0.5 ** (s - t - 1) for s in ends)] * share
    assert result["realised_return"] == pytest.approx(np.mean(followed))


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two checkpoints of Catch, whose names sort the other way round than their steps."""
    monkeypatch.setattr(evaluate, "make_vec_env", make_catch)
    return tuple(
        constant_network(tmp_path / f"model_{step}.pt", [0.0, 1.0, 0.0], step=step)
        for step in (1_000_000, 200_000)
    )


def test_a_table_has_a_row_per_checkpoint_in_the_order_of_their_steps(two, capsys):
    main(Options(two, episodes=3))
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert rows[0].split()[:2] == ["step", "games"]
    assert [row.split()[:2] for row in rows[1:]] == [["200,000", "3"], ["1,000,000", "3"]]


def test_an_interruption_keeps_what_was_played(two, tmp_path, monkeypatch, capsys):
    play = evaluate.play
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return play(*args)

    monkeypatch.setattr(evaluate, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(Options(two, episodes=3, json=str(tmp_path / "out.json")))
    assert [r["global_step"] for r in json.loads((tmp_path / "out.json").read_text())] == [200_000]
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["200,000", "3"]


def test_a_bad_checkpoint_is_refused_before_the_first_game(two, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"hello")
    with pytest.raises(SystemExit):
        main(Options((*two, str(tmp_path / "bad.pt")), episodes=3))
    assert "game 1" not in capsys.readouterr().out


def test_the_largest_seed_plays(two):
    main(Options(two, episodes=17, seed=2**31 - 17))


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_the_video_shows_a_whole_game_and_the_q_values(tmp_path, capsys, ending):
    path = constant_network(tmp_path / "model_100.pt", [1.0, 0.0, 0.0, 0.0])
    main(Options((path,), episodes=1, video=str(tmp_path / f"game.{ending}")))
    assert f"game.{ending}: a game of" in capsys.readouterr().out
    video = cv2.VideoCapture(str(tmp_path / f"game.{ending}"))
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    assert len(frames) > 50 and frames[0].shape == (420, 560, 3)
    game, panel = frames[-1][:, :320], frames[-1][:, 320:]
    assert (game.max(2).astype(int) - game.min(2)).max() > 100  # in colour
    green = (panel[..., 1] > 120) & (panel[..., 0] < 110) & (panel[..., 2] < 110)
    assert green.sum() > 500  # the bar of the action chosen


def test_an_animation_holds_the_start_of_a_game(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    freeway = Args(env_id="ALE/Freeway-v5")  # 2,048 steps, of which 225 are filmed
    path = constant_network(tmp_path / "model_100.pt", [1.0, 0.0, 0.0], freeway)
    evaluate.film(evaluate.load(path, Options((path,))), Options((path,), video="game.webp"))
    success, animation = cv2.imreadanimation("game.webp")
    assert success and len(animation.frames) == 113
    assert animation.frames[0].shape[:2] == (210, 280)


def test_drawing_marks_the_chosen_action():
    frame = np.zeros((210, 160, 3), np.uint8)
    for actions in (4, 18):
        q_values, names = np.linspace(-1, 1, actions), [Action.FIRE] * actions
        pictures = [evaluate.draw(frame, q_values, a, names, "") for a in range(actions)]
        assert all((pictures[0] != other).any() for other in pictures[1:])


def test_the_57_games_of_the_human_scores_exist():
    assert len(RANDOM_AND_HUMAN) == 57
    for game in RANDOM_AND_HUMAN:
        assert f"ALE/{game}-v5" in gym.registry
