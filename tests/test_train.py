"""The loop: every branch of it, what it learns, what it saves, and going on from there."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import Action
from catch import make_catch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_atari
from dqn_atari import Args, train

REPO = Path(__file__).parent.parent
TINY = Args(
    total_timesteps=960,
    num_envs=8,
    buffer_size=640,
    learning_starts=160,
    exploration_steps=500,
    target_network_frequency=200,
    checkpoint_frequency=320,
    device="cpu",
)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(run_dir, step):
    return torch.load(run_dir / f"model_{step}.pt", weights_only=True)


def same(a, b):
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def scalars(run_dir):
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_a_small_pixel_game_is_learnt(monkeypatch):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    run_dir = train(
        Args(
            total_timesteps=12_000,
            num_envs=8,
            buffer_size=5_000,
            learning_starts=500,
            end_e=0.02,
            exploration_steps=4_000,
            target_network_frequency=400,
            optimizer="adam",
            learning_rate=5e-4,
            device="cpu",
        )
    )
    returns = [event.value for event in scalars(run_dir)["charts/episodic_return"]]
    assert set(returns) == {-3.0, 3.0}  # raw, not clipped
    assert np.mean(returns[:200]) < 0 < 2.0 < np.mean(returns[-200:])


def test_a_run_reaches_every_branch(monkeypatch, capsys):
    """Updates, syncs, checkpoints and reports, each as often as the flags say."""
    calls = {"update": 0, "sync": 0}
    step, load = torch.optim.Adam.step, dqn_atari.QNetwork.load_state_dict
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda *a, **kw: (calls.update(update=calls["update"] + 1), step(*a, **kw)),
    )
    monkeypatch.setattr(
        dqn_atari.QNetwork,
        "load_state_dict",
        lambda *a, **kw: (calls.update(sync=calls["sync"] + 1), load(*a, **kw)),
    )
    run_dir = train(TINY)
    # At step 168 there are 160 transitions with a next frame; the last to learn is at step 952.
    assert calls == {"update": (952 - 160) // 4, "sync": 960 // 200}
    names = sorted(path.name for path in run_dir.iterdir() if path.suffix == ".pt")
    assert names == ["latest.pt", "model_320.pt", "model_640.pt", "model_960.pt"]
    assert not list(run_dir.glob("*.tmp"))
    assert run_dir.parent == Path("runs") and run_dir.name.startswith(
        "ALE-Breakout-v5__dqn_atari__1__"
    )
    saved = model(run_dir, 960)
    assert set(saved) == {"model", "args", "global_step"} and saved["global_step"] == 960
    assert saved["args"] == dataclasses.asdict(TINY)
    tags = scalars(run_dir)
    for tag in ("charts/SPS", "charts/epsilon", "losses/td_loss", "losses/q_values"):
        assert tags[tag][-1].step == 960
    assert tags["charts/epsilon"][-1].value == pytest.approx(0.1)
    assert "step 960 (100.0%)" in capsys.readouterr().out


def test_a_run_too_short_for_the_defaults_learns_all_the_same(monkeypatch, capsys):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    args = Args(total_timesteps=400, buffer_size=400, device="cpu")
    run_dir = train(args)
    assert "learning_starts=40, exploration_steps=200\n" in capsys.readouterr().out
    tags = scalars(run_dir)
    assert tags["losses/td_loss"][-1].step == 400
    assert tags["charts/epsilon"][-1].value == pytest.approx(0.1)
    assert model(run_dir, 400)["args"] == dataclasses.asdict(args)


class Scripted(gym.vector.VectorEnv):
    """One game after a table; has FIRE, as ALE's environment would say it."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    num_envs, single_action_space = 1, gym.spaces.Discrete(3)

    def __init__(self, table):
        self.table = table
        self.ale = SimpleNamespace(get_action_set=lambda: [Action.NOOP, Action.LEFT, Action.FIRE])

    def reset(self, *, seed=None, options=None):
        self.t = -1
        return self._obs(), {"lives": np.array([3])}

    def step(self, actions):
        self.t += 1
        lives, reward, terminated, truncated = self.table[self.t]
        return (
            self._obs(),
            np.array([reward]),
            np.array([terminated]),
            np.array([truncated]),
            {"lives": np.array([lives])},
        )

    def _obs(self):
        return np.full((1, 4, 84, 84), self.t + 2, np.uint8)


@pytest.mark.parametrize("terminal_on_life_loss", [True, False])
def test_what_is_stored_and_when_fire_is_pressed(monkeypatch, terminal_on_life_loss):
    """Lost lives, endings, truncations and the steps after them, row by row."""
    no, yes = False, True
    rows = [
        # What env.step gives: lives, reward, terminated, truncated.
        #                     Then what is stored: reward, terminal, game over, FIRE pressed.
        (3, 0, no, no, 0, no, no, yes),
        (3, 7, no, no, 1, no, no, yes),
        (3, 0, no, no, 0, no, no, no),
        (2, -4, no, no, -1, terminal_on_life_loss, no, no),  # a life is lost
        (2, 0, no, no, 0, no, no, yes),
        (2, 0, no, no, 0, no, no, yes),
        (1, 1, no, no, 1, terminal_on_life_loss, no, no),  # another
        (0, 2, yes, no, 1, yes, no, yes),  # and the last, with the game
        (3, 0, no, no, 0, no, yes, yes),  # the step after: no transition, a new game comes
        (3, 0, no, no, 0, no, no, yes),
        (3, 0, no, no, 0, no, no, yes),
        (3, 0, no, yes, 0, no, no, no),  # truncated, which bootstraps
        (2, 0, no, no, 0, no, yes, no),  # the new game has fewer lives: none was lost
        (2, 0, no, no, 0, no, no, yes),
        (2, 0, no, no, 0, no, no, yes),
        (2, 0, no, no, 0, no, no, no),
    ]
    stored, add = [], dqn_atari.ReplayBuffer.add

    def spy(buffer, frames, actions, rewards, terminations, over):
        stored.append((rewards[0], terminations[0], over[0], actions[0] == 2))
        assert (frames == len(stored)).all()  # the newest frame of what was acted on
        add(buffer, frames, actions, rewards, terminations, over)

    monkeypatch.setattr(dqn_atari.ReplayBuffer, "add", spy)
    monkeypatch.setattr(dqn_atari, "make_vec_env", lambda args: Scripted([row[:4] for row in rows]))
    monkeypatch.setattr(
        dqn_atari.QNetwork, "forward", lambda self, obs: torch.tensor([[1.0, 0.0, 0.0]])
    )
    train(
        dataclasses.replace(
            TINY,
            num_envs=1,
            total_timesteps=len(rows),
            learning_starts=15,
            exploration_steps=1,
            start_e=0.0,
            end_e=0.0,
            buffer_size=64,
            terminal_on_life_loss=terminal_on_life_loss,
        )
    )
    assert stored == [row[4:] for row in rows]


def test_gradient_steps_are_one_in_four_whatever_the_number_of_games(monkeypatch):
    for num_envs in (1, 3, 10):
        count = []
        step = torch.optim.Adam.step
        with monkeypatch.context() as patch:
            patch.setattr(dqn_atari, "make_vec_env", make_catch)
            patch.setattr(
                torch.optim.Adam, "step", lambda *a, **kw: (count.append(1), step(*a, **kw))
            )
            train(
                dataclasses.replace(
                    TINY,
                    num_envs=num_envs,
                    total_timesteps=300,
                    learning_starts=30,
                    exploration_steps=100,
                )
            )
        assert abs(len(count) - (300 - 30) / 4) <= num_envs


def test_same_seed_same_weights_other_seed_others():
    first, second = train(TINY), train(dataclasses.replace(TINY, exp_name="again"))
    assert same(model(first, 960), model(second, 960))
    other = train(dataclasses.replace(TINY, seed=2))
    assert not same(model(first, 960), model(other, 960))


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_resuming_with_the_replay_is_bit_identical(optimizer, monkeypatch):
    """From each checkpoint of a run: one before the ring is full and one after."""
    save = dqn_atari.save_checkpoint

    def save_and_copy(checkpoint, path):
        save(checkpoint, path)
        if path.name == "latest.pt":
            shutil.copytree(path.parent, f"stopped_at_{checkpoint['global_step']}")

    args = dataclasses.replace(TINY, save_replay=True, optimizer=optimizer, buffer_size=480)
    with monkeypatch.context() as patch:
        patch.setattr(dqn_atari, "save_checkpoint", save_and_copy)
        whole = train(args)
    for stopped in ("stopped_at_320", "stopped_at_640"):
        assert not Path(stopped, "model_960.pt").exists()
        run_dir = train(dataclasses.replace(args, resume=stopped))
        assert run_dir == Path(stopped)
        assert same(model(run_dir, 960), model(whole, 960))


def test_a_finished_run_can_be_made_longer():
    args = dataclasses.replace(TINY, save_replay=True)
    run_dir = train(args)
    train(dataclasses.replace(args, resume=str(run_dir), total_timesteps=1280))
    assert same(
        model(run_dir, 1280), model(train(dataclasses.replace(args, total_timesteps=1280)), 1280)
    )


def test_events_from_after_the_checkpoint_are_replaced(monkeypatch):
    """As after a kill: TensorBoard was written further than latest.pt."""
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    run_dir = train(dataclasses.replace(TINY, total_timesteps=640))
    shutil.copy(run_dir / "latest.pt", "early.pt")
    train(dataclasses.replace(TINY, resume=str(run_dir)))
    shutil.copy("early.pt", run_dir / "latest.pt")
    train(dataclasses.replace(TINY, resume=str(run_dir)))
    assert [event.step for event in scalars(run_dir)["charts/epsilon"]] == [640, 960]


def test_resuming_without_the_replay_collects_before_it_learns(monkeypatch, capsys):
    part = train(dataclasses.replace(TINY, total_timesteps=640))
    count, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda *a, **kw: (count.append(1), step(*a, **kw))
    )
    epsilons, schedule = [], dqn_atari.linear_schedule
    monkeypatch.setattr(
        dqn_atari, "linear_schedule", lambda *a: epsilons.append(schedule(*a)) or epsilons[-1]
    )
    train(dataclasses.replace(TINY, resume=str(part), learning_rate=1e-5))
    assert "160 steps to refill it" in capsys.readouterr().out
    assert len(count) == (952 - 640 - 160) // 4
    assert epsilons[0] == pytest.approx(0.1)  # as at step 640, not as at step 0
    latest = torch.load(part / "latest.pt", weights_only=True)
    assert latest["optimizer"]["param_groups"][0]["lr"] == 1e-5  # flags given again win
    steps = [event.step for event in scalars(part)["charts/epsilon"]]
    assert steps == sorted(set(steps)) and steps[-1] == 960


def test_checkpoints_restart_the_games_only_where_the_replay_is_saved(monkeypatch):
    """Without it nothing is gained by a restart, and games longer than that would never end."""
    for save_replay, resets in ((False, 1), (True, 3)):
        seeds = []

        def make(args):
            envs = make_catch(args)
            reset = envs.reset
            envs.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
            return envs

        with monkeypatch.context() as patch:
            patch.setattr(dqn_atari, "make_vec_env", make)
            train(
                dataclasses.replace(TINY, save_replay=save_replay, exp_name=f"replay{save_replay}")
            )
        assert len(seeds) == len(set(seeds)) == resets


def launch(*flags):
    return subprocess.Popen(
        [sys.executable, str(REPO / "dqn_atari.py"), "--device", "cpu", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def flags_of(args):
    changed = {name: value for name, value in vars(args).items() if value != getattr(Args(), name)}
    return [
        word
        for name, value in changed.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def wait_for(pattern, process):
    for _ in range(600):
        if found := list(Path("runs").glob(pattern)):
            return found[0].parent
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError(f"{pattern} did not come")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, code):
    args = dataclasses.replace(TINY, total_timesteps=10**6)
    process = launch(*[w for w in flags_of(args)])
    run_dir = wait_for("*/model_320.pt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"python dqn_atari.py --resume {run_dir}" in output and "Traceback" not in output
    latest = torch.load(run_dir / "latest.pt", weights_only=True)
    assert (run_dir / f"model_{latest['global_step']}.pt").exists()
    last = max(int(p.stem.split("_")[1]) for p in run_dir.glob("model_*.pt"))
    assert latest["global_step"] == last


def test_resuming_after_sigkill_is_bit_identical():
    args = dataclasses.replace(TINY, save_replay=True)
    whole = train(dataclasses.replace(args, exp_name="whole"))
    process = launch(*flags_of(dataclasses.replace(args, save_replay=False)), "--save-replay")
    run_dir = wait_for("ALE-Breakout-v5__dqn_atari__*/model_640.pt", process)
    process.kill()
    process.communicate()
    for path in run_dir.glob("model_960.pt"):
        path.unlink()
    process = launch("--resume", str(run_dir))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert same(model(run_dir, 960), model(whole, 960))


def test_the_replay_holds_what_the_real_game_showed(monkeypatch):
    """Every transition of a short run of Breakout: its stacks, action, reward and lost lives."""
    shown, buffers, make_vec_env = [], [], dqn_atari.make_vec_env

    def make(args):
        envs = make_vec_env(args)
        reset, step = envs.reset, envs.step

        def spy_reset(seed):
            obs, infos = reset(seed=seed)
            shown.append((obs.copy(), None, None, infos["lives"].copy(), np.zeros(4, bool)))
            return obs, infos

        def spy_step(actions):
            obs, rewards, terminations, truncations, infos = step(actions)
            shown.append(
                (obs.copy(), actions, rewards, infos["lives"].copy(), terminations | truncations)
            )
            return obs, rewards, terminations, truncations, infos

        envs.reset, envs.step = spy_reset, spy_step
        return envs

    def spy_init(buffer, *args):
        init(buffer, *args)
        buffers.append(buffer)

    init = dqn_atari.ReplayBuffer.__init__
    monkeypatch.setattr(dqn_atari, "make_vec_env", make)
    monkeypatch.setattr(dqn_atari.ReplayBuffer, "__init__", spy_init)
    train(
        dataclasses.replace(
            TINY,
            num_envs=4,
            total_timesteps=2400,
            learning_starts=2390,
            buffer_size=2600,
            checkpoint_frequency=10**6,
        )
    )
    (buffer,), slots = buffers, len(shown) - 1
    rows = torch.arange(4 * (slots - 1))
    draws = iter([slots - 2 - rows // 4, rows % 4])  # of ages, then of games
    monkeypatch.setattr(torch, "randint", lambda *a, **kw: next(draws))
    batch, checked, ends = buffer.sample(len(rows)), 0, 0
    transitions = [divmod(row, 4) for row in rows.tolist()]
    transitions = [(t, game) for t, game in transitions if not shown[t][4][game]]  # not over there
    for row, (t, game) in enumerate(transitions):
        obs, actions, rewards, lives, over = shown[t + 1]
        assert (batch.obs[row].numpy() == shown[t][0][game]).all()
        assert (batch.next_obs[row].numpy() == obs[game]).all()
        assert batch.actions[row] == actions[game] and batch.rewards[row] == np.sign(rewards[game])
        assert batch.terminations[row] == (lives[game] < shown[t][3][game])
        checked, ends = checked + 1, ends + int(over[game])
    assert checked > 2000 and ends > 4
