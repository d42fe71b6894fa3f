"""evaluate.py with networks made by hand, so that what it must report is known."""

import contextlib
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import Action
from catch import NO_FIRE, Catch, make_catch
from small_network import SmallNetwork

import evaluate
from dqn_atari import Args, Lives, make_env
from evaluate import RANDOM_AND_HUMAN, Options, main

REPO = Path(__file__).parent.parent


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
    for epsilon in (0.0, 0.5):
        options = [Options((path,), episodes=2, epsilon=epsilon, seed=seed) for seed in (1, 1, 2)]
        runs = [evaluated(path, each)["games"] for each in options]
        assert runs[0] == runs[1] != runs[2]


def test_two_seeds_share_no_game_and_none_with_training(tmp_path, monkeypatch):
    """Game i of the N side by side is seeded with the number given to reset(), plus i."""
    bases = []

    class Seeded(Catch):
        def reset(self, *, seed=None, options=None):
            bases.append(seed)
            return super().reset(seed=seed)

    def make_seeded(args):
        envs = Lives(Seeded(args.num_envs), NO_FIRE.get_action_set())
        return gym.wrappers.vector.RecordEpisodeStatistics(envs)

    monkeypatch.setattr(evaluate, "make_vec_env", make_seeded)
    path = constant_network(tmp_path / "model_100.pt", [0.0, 1.0, 0.0])
    seeds = (0, 1, 2, 3, 17, 2**31 - 17, 2**31, 2**32 - 1)
    for seed in seeds:
        (result,) = main(Options((path,), episodes=16, seed=seed))
        assert result["seed"] == seed
    assert len(bases) == len(seeds)
    for seed in seeds:  # the first games of training
        bases.append(int(np.random.default_rng((seed, 0)).integers(2**30)))
    games = [base + i for base in bases for i in range(16)]
    assert len(set(games)) == len(games) and max(games) < 2**31


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


class Clockwork(gym.vector.VectorEnv):
    """Game i has 3 lives of i + 1 steps each, and a point at the end of each life."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs):
        self.num_envs, self.single_action_space = num_envs, gym.spaces.Discrete(2)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.life = np.arange(num_envs) + 1

    def reset(self, *, seed=None, options=None):
        self.t = np.zeros(self.num_envs, int)
        return self._obs(), {"lives": 3 - self.t // self.life}

    def step(self, actions):
        self.t = self.t + 1
        rewards = np.where(self.t % self.life == 0, 1, 0)
        ended = self.t == 3 * self.life
        self.t = np.where(ended, 0, self.t)
        infos = {"lives": 3 - self.t // self.life}
        return self._obs(), rewards, ended, np.zeros(self.num_envs, bool), infos

    def _obs(self):
        return np.zeros((self.num_envs, 4, 84, 84), np.uint8)


@pytest.mark.parametrize("terminal_on_life_loss", [True, False])
def test_games_are_dealt_evenly_and_returns_end_with_a_life(
    tmp_path, monkeypatch, terminal_on_life_loss
):
    def make(args):
        envs = Lives(Clockwork(args.num_envs), NO_FIRE.get_action_set())
        return gym.wrappers.vector.RecordEpisodeStatistics(envs)

    monkeypatch.setattr(evaluate, "make_vec_env", make)
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


def test_rows_of_several_runs_name_their_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "make_vec_env", make_catch)
    paths = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        paths.append(constant_network(tmp_path / run / "model_100.pt", [0.0, 1.0, 0.0]))
    main(Options(tuple(paths), episodes=1))
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[-1] for row in rows] == paths
    main(Options((paths[0], paths[0]), episodes=1))
    assert "model_100.pt" not in capsys.readouterr().out.splitlines()[-1]


def test_scores_of_a_million_have_all_their_digits(tmp_path, monkeypatch, capsys):
    """VideoPinball's. In the single games, the table and the film."""

    class Pinball(Catch):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            return obs, np.where(rewards != 0, 1_234_567.0, 0.0), *rest

    def make(args):
        envs = Lives(Pinball(args.num_envs), NO_FIRE.get_action_set())
        return gym.wrappers.vector.RecordEpisodeStatistics(envs)

    monkeypatch.setattr(evaluate, "make_vec_env", make)
    path = constant_network(tmp_path / "model_100.pt", [0.0, 1.0, 0.0])
    main(Options((path,), episodes=2))
    output = capsys.readouterr().out
    assert "game 1: 1234567 in 4 steps" in output
    row = output.splitlines()[-1].split()
    assert row[2:8] == ["1234567.00", "±", "0.00", "1234567.0", "1234567", "1234567"]

    def make_rich(*args, **kwargs):
        env = make_env(*args, **kwargs, max_episode_frames=100)
        return gym.wrappers.TransformReward(env, lambda reward: 1_234_567.0)

    monkeypatch.setattr(evaluate, "make_env", make_rich)
    texts, draw = [], evaluate.draw
    monkeypatch.setattr(evaluate, "draw", lambda *a: texts.append(a[1]) or draw(*a))
    path = constant_network(tmp_path / "model_200.pt", [1.0, 0.0, 0.0])
    main(Options((path,), episodes=0, video=str(tmp_path / "game.webm")))
    assert texts[1] == "score 1234567   lives 5"
    assert f"score {len(texts) * 1_234_567}" in capsys.readouterr().out


def test_an_interruption_keeps_what_was_played(two, tmp_path, monkeypatch, capsys):
    play, calls = evaluate.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return play(*args)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(Options(two, episodes=3, json=str(tmp_path / "out.json")))
    assert [r["global_step"] for r in json.loads((tmp_path / "out.json").read_text())] == [200_000]
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["200,000", "3"]


def test_a_bad_checkpoint_is_refused_before_the_first_game(two, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"hello")
    with pytest.raises(SystemExit):
        main(Options((*two, str(tmp_path / "bad.pt")), episodes=3))
    assert "game 1" not in capsys.readouterr().out


@contextlib.contextmanager
def small_files(size):
    """As on a full disk: so many bytes fit into a file. Not while pytest prints, perhaps to one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fails(capsys, words, *args):
    """In one line and with exit code 1; returns what was printed before."""
    with pytest.raises(SystemExit) as stopped:
        main(*args)
    output, error = capsys.readouterr()
    assert stopped.value.code == 1
    (line,) = error.splitlines()
    for word in words:
        assert word in line
    return output


def test_json_on_a_full_disk_keeps_the_old_file_and_the_table(two, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text("[]")
    options = Options(two, episodes=3, json=str(path))
    with small_files(100):
        output = fails(capsys, ["out.json: File too large"], options)
    assert path.read_text() == "[]" and not list(tmp_path.glob("*.tmp"))
    assert output.splitlines()[-1].split()[:2] == ["200,000", "3"]


def test_a_model_is_not_refused_for_a_flag_that_evaluation_does_not_use(tmp_path, small_network):
    odd = Args(num_envs=0, batch_size=-1, buffer_size=None, optimizer="sgd", learning_rate=7.0)
    odd.repeat_action_probability = 3.0
    path = constant_network(tmp_path / "model_100.pt", [1.0, 0.0, 0.0, 0.0], odd)
    options = Options((path,), episodes=1, repeat_action_probability=0.5)
    assert evaluated(path, options)["repeat_action_probability"] == 0.5


def test_the_models_of_the_results_can_be_played():
    paths = [str(path) for path in (REPO / "results").rglob("model.pt")]
    assert paths
    for path in paths:
        evaluate.load(path, Options((path,)))


@pytest.fixture
def short(monkeypatch):
    """Films of games that are stopped after 48 steps."""
    monkeypatch.setattr(
        evaluate, "make_env", lambda *a, **kw: make_env(*a, **kw, max_episode_frames=192, noop_max=0)
    )


def film(tmp_path, video=None, episodes=0, watch=False):
    path = constant_network(tmp_path / "model_100.pt", [1.0, 0.0, 0.0, 0.0])
    return main(Options((path,), episodes, watch=watch, video=video and str(video)))


def frames_of(path):
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    return frames


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_the_video_shows_a_whole_game_and_the_q_values(tmp_path, capsys, ending, small_network):
    film(tmp_path, tmp_path / f"game.{ending}", episodes=1)
    frames = frames_of(tmp_path / f"game.{ending}")
    output = capsys.readouterr().out
    assert f"game.{ending}: {len(frames)} pictures, score" in output and "game 1: " in output
    assert 100 < len(frames) < 1000 and frames[0].shape == (420, 560, 3)
    game, panel = frames[-1][:, :320], frames[-1][:, 320:]
    assert (game.max(2).astype(int) - game.min(2)).max() > 100  # in colour
    green = (panel[..., 1] > 120) & (panel[..., 0] < 110) & (panel[..., 2] < 110)
    assert green.sum() > 500  # the bar of the action chosen


def test_an_animation_holds_the_start_of_a_game(tmp_path, small_network):
    freeway = Args(env_id="ALE/Freeway-v5")  # 2,048 steps, of which 225 are filmed
    path = constant_network(tmp_path / "model_100.pt", [1.0, 0.0, 0.0], freeway)
    main(Options((path,), episodes=0, video=str(tmp_path / "game.webp")))
    success, animation = cv2.imreadanimation(str(tmp_path / "game.webp"))
    assert success and sum(animation.durations) == 225 * 66
    assert animation.frames[0].shape[:2] == (210, 280)


@pytest.mark.parametrize("name", ["game.mp4", "game.webm", "game.webp", "http:x.webm"])
def test_a_film_is_whole_or_an_error(tmp_path, monkeypatch, capsys, name, short):
    """FFmpeg would take http:x.webm for an address. Equal pictures are one in a .webp."""
    monkeypatch.chdir(tmp_path)
    film(tmp_path, name)
    assert f"{name}: 48 pictures, score" in capsys.readouterr().out
    options = Options((str(tmp_path / "model_100.pt"),), episodes=1, video=name)
    for _ in ("the older film is there", "it is not"):
        with small_files(3000):
            assert "pictures" not in fails(capsys, [name, "of 48 pictures", "disk"], options)
        Path(name).unlink(missing_ok=True)


class Window:
    """In place of OpenCV's: closed by `key`, or by its cross, while picture number `last` is shown."""

    def __init__(self, monkeypatch, key=-1, last=10**9):
        self.key, self.last, self.shown, self.open = key, last, [], False
        self.now = 0.0  # a clock that only waiting for a key moves on
        monkeypatch.setattr(evaluate.time, "monotonic", lambda: self.now)
        for name in ("namedWindow", "imshow", "waitKey", "getWindowProperty", "destroyAllWindows"):
            monkeypatch.setattr(cv2, name, getattr(self, name))
        done = subprocess.CompletedProcess([], 0)
        monkeypatch.setattr(evaluate.subprocess, "run", lambda *args, **kwargs: done)

    def namedWindow(self, name, flags):
        self.open = True

    def imshow(self, name, picture):
        assert self.open and picture.shape == (420, 560, 3)
        self.shown.append(self.now)

    def waitKey(self, milliseconds):
        assert milliseconds > 0  # 0 would wait for a key
        self.now += milliseconds / 1000
        return self.key if len(self.shown) == self.last else -1

    def getWindowProperty(self, name, what):
        if len(self.shown) == self.last and self.key < 0:
            raise cv2.error("NULL guiReceiver")  # Qt's, once its last window is closed
        return 1.0

    def destroyAllWindows(self):
        self.open = False


def test_watching_shows_a_game_at_its_own_speed_and_plays_no_other(
    tmp_path, monkeypatch, capsys, short, small_network
):
    window = Window(monkeypatch)
    assert film(tmp_path, episodes=None, watch=True) == []
    assert len(window.shown) == 48 and not window.open
    assert window.shown[-1] - window.shown[0] == pytest.approx(47 / 15, abs=0.05)
    (line,) = capsys.readouterr().out.splitlines()
    assert "model_100.pt: 48 pictures, score" in line


@pytest.mark.parametrize("key", [ord("q"), 27, -1])
def test_closing_the_window_ends_the_game_and_its_film(
    tmp_path, monkeypatch, capsys, key, short, small_network
):
    window = Window(monkeypatch, key, last=5)
    (result,) = film(tmp_path, tmp_path / "game.webm", episodes=1, watch=True)
    assert len(window.shown) == len(frames_of(tmp_path / "game.webm")) == 5 and not window.open
    output = capsys.readouterr().out
    assert output.index("game.webm: 5 pictures") < output.index("game 1: ")  # at once, and then


@pytest.mark.skipif(sys.platform != "linux", reason="others have a display always")
@pytest.mark.parametrize("lacking", ["display", "windows"])
def test_watching_without_a_window_is_refused(tmp_path, monkeypatch, capsys, lacking):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if lacking == "windows":
        (tmp_path / "cv2.py").write_text("def namedWindow(*args): raise RuntimeError('headless')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(SystemExit) as stopped:
        film(tmp_path, watch=True)
    output, error = capsys.readouterr()
    assert stopped.value.code == 2 and output == ""
    (line,) = error.splitlines()
    assert "--watch" in line and "display" in line and "headless" in line


def test_drawing_marks_the_chosen_action():
    frame = np.zeros((210, 160, 3), np.uint8)
    for actions in (4, 18):
        q_values, names = np.linspace(-1, 1, actions), [Action.FIRE] * actions
        pictures = [evaluate.draw(frame, "", q_values, a, names) for a in range(actions)]
        assert all((pictures[0] != other).any() for other in pictures[1:])


def test_the_57_games_of_the_human_scores_exist():
    assert len(RANDOM_AND_HUMAN) == 57
    for game in RANDOM_AND_HUMAN:
        assert f"ALE/{game}-v5" in gym.registry
