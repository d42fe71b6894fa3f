"""The loop: every branch of it, what it learns, what it saves, and going on from there."""

import contextlib
import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from catch import make_catch
from scripted import Scripted
from small_network import SmallNetwork
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_atari
from dqn_atari import PAPER, Args, Lives, train

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
# For the real network, a gradient step of which takes up to 0.1 s: 25 of them, of 4 transitions.
REAL = {"batch_size": 4, "train_frequency": 32}


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(autouse=True)
def in_an_empty_directory_with_a_small_network_and_game(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "real_network" not in request.keywords:
        monkeypatch.setattr(dqn_atari, "QNetwork", SmallNetwork)
    if "real_game" not in request.keywords:
        monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)


def model(run_dir, step):
    return torch.load(run_dir / f"model_{step}.pt", weights_only=True)


def saved_flags(args):
    flags = dataclasses.asdict(args)
    del flags["resume"]
    return flags


def same(a, b):
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def scalars(run_dir):
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_a_small_pixel_game_is_learnt():
    run_dir = train(
        Args(
            total_timesteps=12_000,
            num_envs=8,
            buffer_size=5_000,
            learning_starts=500,
            end_e=0.02,
            exploration_steps=4_000,
            target_network_frequency=400,
            learning_rate=5e-4,
            device="cpu",
        )
    )
    returns = [event.value for event in scalars(run_dir)["charts/episodic_return"]]
    assert set(returns) == {-3.0, 3.0}  # raw, not clipped
    assert np.mean(returns[:200]) < 0 < 2.0 < np.mean(returns[-200:])


@pytest.mark.real_game
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
    assert saved["args"] == saved_flags(TINY)
    tags = scalars(run_dir)
    losses = ("losses/td_loss", "losses/q_values", "losses/q_spread")
    for tag in ("charts/SPS", "charts/epsilon", *losses):
        assert [event.step for event in tags[tag]] == [320, 640, 960]
    assert tags["losses/q_spread"][-1].value > 0
    assert tags["charts/epsilon"][-1].value == pytest.approx(0.01)
    assert "step 960 (100.0%)" in capsys.readouterr().out


def test_a_run_too_short_for_the_defaults_learns_all_the_same(capsys):
    args = Args(total_timesteps=400, buffer_size=400, device="cpu")
    run_dir = train(args)
    assert "replay holds 40 steps, exploring until 200\n" in capsys.readouterr().out
    tags = scalars(run_dir)
    assert tags["losses/td_loss"][-1].step == 400 and tags["losses/td_loss"][-1].value > 0
    assert tags["charts/epsilon"][-1].value == pytest.approx(0.01)
    assert model(run_dir, 400)["args"] == saved_flags(args)  # as given, not as capped
    train(tiny(total_timesteps=160, exploration_steps=100))  # too short to learn alone
    assert "replay holds 16 steps, exploring until 80\n" in capsys.readouterr().out


def resumed(run_dir, **changes):
    """As the command line would: what is not given is taken from the run."""
    args = dqn_atari.load_checkpoint(run_dir / "latest.pt")["args"]
    train(dataclasses.replace(args, resume=str(run_dir), **changes))


def test_a_short_run_made_long_and_a_long_run_made_short(monkeypatch, capsys):
    """Each explores and learns as a run of its length does, and both keep the flags given."""
    durations, schedule = set(), dqn_atari.linear_schedule
    monkeypatch.setattr(
        dqn_atari, "linear_schedule", lambda *a: durations.add(a[2]) or schedule(*a)
    )
    short = train(tiny(total_timesteps=160))
    assert durations == {80} and "holds 16 steps" in capsys.readouterr().out
    durations.clear()
    resumed(short, total_timesteps=960)
    assert durations == {500} and "holds 160 steps" in capsys.readouterr().out
    assert model(short, 160)["args"] == saved_flags(tiny(total_timesteps=160))
    assert model(short, 960)["args"] == saved_flags(TINY)

    durations.clear()
    long = train(TINY, signals=[signal.SIGINT])
    assert durations == {500} and model(long, 8)["args"] == saved_flags(TINY)
    durations.clear()
    resumed(long, total_timesteps=400)  # too short to explore alone
    assert durations == {200} and "holds 40 steps" in capsys.readouterr().out
    assert model(long, 400)["args"] == saved_flags(tiny(total_timesteps=400))


def test_both_columns_of_defaults():
    ours, paper = vars(Args()), vars(PAPER)
    assert {name: (ours[name], paper[name]) for name in ours if ours[name] != paper[name]} == {
        "paper": (False, True),
        "optimizer": ("adam", "rmsprop"),
        "learning_rate": (1e-4, 2.5e-4),
        "learning_starts": (20_000, 50_000),
        "end_e": (0.01, 0.1),
        "exploration_steps": (250_000, 1_000_000),
    }
    shared = {
        "total_timesteps": 6_000_000,
        "num_envs": 16,
        "repeat_action_probability": 0.25,
        "terminal_on_life_loss": True,
        "buffer_size": 1_000_000,
        "batch_size": 32,
        "train_frequency": 4,
        "gamma": 0.99,
        "target_network_frequency": 10_000,
        "start_e": 1.0,
        "double_q": False,
    }
    assert {name: ours[name] for name in shared} == shared


@pytest.mark.parametrize("terminal_on_life_loss", [True, False])
def test_what_is_stored(monkeypatch, terminal_on_life_loss):
    """Lost lives, endings, truncations and the steps after them, row by row."""
    no, yes = False, True
    rows = [
        # What env.step gives: lives, reward, terminated, truncated.
        #                     Then what is stored: reward, terminal, ended. And FIRE pressed.
        (3, 0, no, no, 0, no, no, yes),
        (3, 7, no, no, 1, no, no, yes),
        (3, 0, no, no, 0, no, no, no),
        (2, -4, no, no, -1, terminal_on_life_loss, no, no),  # a life is lost
        (2, 0, no, no, 0, no, no, yes),
        (2, 0, no, no, 0, no, no, yes),
        (1, 1, no, no, 1, terminal_on_life_loss, no, no),  # another
        (3, 2, yes, no, 1, yes, yes, yes),  # and the last, with the game; the next has 3
        (3, 0, no, no, 0, no, no, yes),
        (3, 0, no, no, 0, no, no, yes),
        (2, -1, no, yes, -1, no, yes, no),  # truncated, not terminal; the next game has fewer lives
        (2, 0, no, no, 0, no, no, yes),
        (2, 0, no, no, 0, no, no, yes),
        (2, 0, yes, yes, 0, yes, yes, no),  # both: it could not have gone on
        (2, 0, no, no, 0, no, no, yes),
    ]
    stored, add = [], dqn_atari.ReplayBuffer.add

    def spy(buffer, frames, actions, rewards, terminations, ended):
        stored.append((rewards[0], terminations[0], ended[0]))
        assert (frames == len(stored)).all()  # the newest picture of what was acted on
        assert actions[0] == 1  # the network's choice, whatever is pressed
        add(buffer, frames, actions, rewards, terminations, ended)

    monkeypatch.setattr(dqn_atari.ReplayBuffer, "add", spy)
    game = Scripted([row[:4] for row in rows])
    envs = gym.wrappers.vector.RecordEpisodeStatistics(Lives(game, game.ale.get_action_set()))
    monkeypatch.setattr(dqn_atari, "make_vec_env", lambda args: envs)
    monkeypatch.setattr(
        dqn_atari.QNetwork, "forward", lambda self, obs: torch.tensor([[0.0, 1.0, 0.0]])
    )
    train(
        tiny(
            num_envs=1, total_timesteps=len(rows), learning_starts=14, exploration_steps=1,
            start_e=0.0, end_e=0.0, buffer_size=64, terminal_on_life_loss=terminal_on_life_loss,
        )
    )  # fmt: skip
    assert stored == [row[4:7] for row in rows]
    assert game.actions == [[2 if row[7] else 1] for row in rows]


def test_gradient_steps_are_one_in_four_whatever_the_number_of_games(monkeypatch):
    for num_envs in (1, 3, 10):
        count = []
        step = torch.optim.Adam.step
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.optim.Adam, "step", lambda *a, **kw: (count.append(1), step(*a, **kw))
            )
            train(
                tiny(
                    num_envs=num_envs, total_timesteps=300, learning_starts=30,
                    exploration_steps=100,
                )
            )  # fmt: skip
        assert abs(len(count) - (300 - 30) / 4) <= num_envs


@pytest.mark.real_network
def test_the_first_layers_filters_sum_to_zero_once_it_learns():
    """Or the brightness of the picture switches them off."""

    def sums(run_dir, step):
        return model(run_dir, step)["model"]["network.0.weight"].sum((1, 2, 3)).abs()

    run_dir = train(tiny(checkpoint_frequency=40, **REAL))
    assert sums(run_dir, 40).max() > 0.1 and sums(run_dir, 960).max() < 1e-4


@pytest.mark.real_game
def test_same_seed_same_weights_other_seed_others():
    first, second = train(tiny(num_envs=4)), train(tiny(num_envs=4, exp_name="again"))
    assert same(model(first, 960), model(second, 960))
    other = train(tiny(num_envs=4, seed=2))
    assert not same(model(first, 960), model(other, 960))


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_resuming_with_the_replay_is_bit_identical(optimizer, monkeypatch):
    """From each checkpoint of a run: one before the ring is full and one after."""
    save = dqn_atari.save_checkpoint

    def save_and_copy(checkpoint, path):
        save(checkpoint, path)
        if path.name == "latest.pt":
            shutil.copytree(path.parent, f"stopped_at_{checkpoint['global_step']}")

    args = tiny(num_envs=4, save_replay=True, optimizer=optimizer, buffer_size=480)
    with monkeypatch.context() as patch:
        patch.setattr(dqn_atari, "save_checkpoint", save_and_copy)
        whole = train(args)
    for stopped in ("stopped_at_320", "stopped_at_640"):
        assert not Path(stopped, "model_960.pt").exists()
        run_dir = train(dataclasses.replace(args, resume=stopped))
        assert run_dir == Path(stopped)
        assert same(model(run_dir, 960), model(whole, 960))


def test_a_finished_run_can_be_made_longer():
    args = tiny(num_envs=4, save_replay=True)
    run_dir = train(args)
    train(dataclasses.replace(args, resume=str(run_dir), total_timesteps=1280))
    assert same(
        model(run_dir, 1280), model(train(dataclasses.replace(args, total_timesteps=1280)), 1280)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_checkpoint_that_a_run_went_on_from_is_let_go(monkeypatch):
    """latest.pt is mapped into memory: held, it would take its disk space after its replacement."""
    args = tiny(num_envs=4, save_replay=True)
    run_dir, held = train(args), []
    latest = str((run_dir / "latest.pt").resolve())  # other tests' may still be mapped
    monkeypatch.setattr(
        dqn_atari,
        "save_checkpoint",
        lambda *a: held.append(latest in Path("/proc/self/maps").read_text()),
    )
    train(dataclasses.replace(args, resume=str(run_dir), total_timesteps=1280))
    assert held == [False, False]


def test_events_from_after_the_checkpoint_are_replaced():
    """As after a kill: TensorBoard was written further than latest.pt."""
    run_dir = train(tiny(total_timesteps=640))
    shutil.copy(run_dir / "latest.pt", "early.pt")
    train(tiny(resume=str(run_dir)))
    shutil.copy("early.pt", run_dir / "latest.pt")
    train(tiny(resume=str(run_dir)))
    assert [event.step for event in scalars(run_dir)["charts/epsilon"]] == [320, 640, 960]


def test_resuming_without_the_replay_collects_before_it_learns(monkeypatch, capsys):
    part = train(tiny(total_timesteps=640))
    count, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda *a, **kw: (count.append(1), step(*a, **kw))
    )
    epsilons, schedule = [], dqn_atari.linear_schedule
    monkeypatch.setattr(
        dqn_atari, "linear_schedule", lambda *a: epsilons.append(schedule(*a)) or epsilons[-1]
    )
    train(tiny(resume=str(part), learning_rate=1e-5))
    assert "once replay holds 160 steps" in capsys.readouterr().out
    assert len(count) == (952 - 640 - 160) // 4
    assert epsilons[0] == pytest.approx(0.01)  # as at step 640, not as at step 0
    latest = torch.load(part / "latest.pt", weights_only=True)
    assert latest["optimizer"]["param_groups"][0]["lr"] == 1e-5  # flags given again win
    steps = [event.step for event in scalars(part)["charts/epsilon"]]
    assert steps == sorted(set(steps)) and steps[-1] == 960


def test_checkpoints_restart_the_games_only_where_the_replay_is_saved(monkeypatch):
    """Without it nothing is gained by a restart, and games longer than that would never end. The
    games that are cut off, here in the first step of a game, are marked."""
    for save_replay, resets, cut_off in ((False, 1, []), (True, 3, [40, 81, 119])):
        seeds, buffers = [], []

        def make(args):
            envs = make_catch(args)
            reset = envs.reset
            envs.reset = lambda seed: seeds.append(seed) or reset(seed=seed)
            return envs

        class Buffer(dqn_atari.ReplayBuffer):
            def __init__(self, *args):
                super().__init__(*args)
                buffers.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(dqn_atari, "make_vec_env", make)
            patch.setattr(dqn_atari, "ReplayBuffer", Buffer)
            train(tiny(save_replay=save_replay, checkpoint_frequency=328, buffer_size=1000))
        assert len(seeds) == len(set(seeds)) == resets
        (buffer,) = buffers
        marked = (buffer.ended & ~buffer.terminations)[: buffer.size]
        assert marked.all(1).nonzero().flatten().tolist() == cut_off
        assert marked.sum() == 8 * len(cut_off)


def launch(*flags, **kwargs):
    """The script as a process; SIGINT and SIGHUP as in a terminal, whatever runs the tests."""

    def as_in_a_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    kwargs = {"preexec_fn": as_in_a_terminal} | kwargs
    return subprocess.Popen(
        [sys.executable, str(REPO / "dqn_atari.py"), "--device", "cpu", *flags],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | kwargs,
    )


def flags_of(args):
    changed = {name: value for name, value in vars(args).items() if value != getattr(Args(), name)}
    words = []
    for name, value in changed.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def wait_for(pattern, process):
    for _ in range(1200):
        if found := list(Path("runs").glob(pattern)):
            return found[0].parent
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError(f"{pattern} did not come")


def assert_saved(run_dir):
    """latest.pt is of the step of the newest model."""
    latest = torch.load(run_dir / "latest.pt", weights_only=True)
    last = max(int(p.stem.split("_")[1]) for p in run_dir.glob("model_*.pt"))
    assert latest["global_step"] == last > 320
    assert not list(run_dir.glob("*.tmp"))


ENDLESS = tiny(num_envs=4, total_timesteps=10**6, learning_starts=30_000, buffer_size=40_000)


def test_a_signal_saves_and_says_how_to_go_on():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    processes = [launch(*flags_of(ENDLESS), "--exp-name", number.name) for number in numbers]
    for number, process in zip(numbers, processes):
        run_dir = wait_for(f"*__{number.name}__*/model_320.pt", process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output
        assert f"python dqn_atari.py --resume {run_dir}" in output and "Traceback" not in output
        assert_saved(run_dir)


def test_a_closed_pipe_behind_stdout_costs_no_checkpoint():
    """As with `| tee log` on Ctrl-C, where tee dies first; and under nohup, which ignores SIGHUP,
    the terminal may be closed."""

    def under_nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = launch(*flags_of(ENDLESS), preexec_fn=under_nohup, stderr=subprocess.PIPE)
    wait_for("*/model_320.pt", process)
    process.send_signal(signal.SIGHUP)
    run_dir = wait_for("*/model_640.pt", process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert "error: [Errno 32] Broken pipe\n" in process.stderr.read()
    assert_saved(run_dir)


def test_runs_started_at_the_same_time_have_directories_of_their_own(monkeypatch):
    """Two in one microsecond: the second is refused rather than mixed with the first."""
    first, second = train(tiny(total_timesteps=64)), train(tiny(total_timesteps=64))
    assert first != second
    monkeypatch.setattr(time, "time", lambda: 1.5)
    train(tiny(total_timesteps=64))
    with pytest.raises(FileExistsError):
        train(tiny(total_timesteps=64))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before():
    """A limit on a file's size stands for the disk's: with the optimizer's state it is reached."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**7, 2 * 10**7))

    args = tiny(total_timesteps=10**6, learning_starts=400, buffer_size=10**4, **REAL)
    process = launch(*flags_of(args), preexec_fn=limit, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=120)
    (line,) = error.splitlines()
    (run_dir,) = Path("runs").iterdir()
    assert f"{run_dir}/latest.pt: [Errno 27] File too large" in line and process.returncode == 1
    assert torch.load(run_dir / "latest.pt", weights_only=True)["global_step"] == 320
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("limit", [600, 5_000, 100_000, 6_747_000])
def test_a_save_that_does_not_fit_names_the_systems_reason(limit):
    """Wherever it stops: torch.save says some of them in words of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="x.pt: .*File too large"):
            dqn_atari.save_checkpoint({"model": torch.zeros(1_686_500)}, Path("x.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path().iterdir())


@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's, when it is removed
@pytest.mark.parametrize("where", ["a file", "removed", "too long"])
def test_a_place_that_cannot_be_written_is_an_oserror_with_its_name(monkeypatch, where):
    if where == "a file":
        Path("runs").write_text("")
    save = dqn_atari.save_checkpoint
    remove = lambda c, path: (shutil.rmtree(path.parent), save(c, path))  # noqa: E731
    if where == "removed":
        monkeypatch.setattr(dqn_atari, "save_checkpoint", remove)
    with pytest.raises(OSError) as caught:
        train(tiny(exp_name="x" * 300 if where == "too long" else "x"))
    assert "runs/" in str(caught.value)


def test_a_failed_save_leaves_the_old_file_and_no_other(monkeypatch):
    dqn_atari.save_checkpoint({"a": 1}, Path("latest.pt"))
    before = Path("latest.pt").read_bytes()

    def no_space(checkpoint, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save says it

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="latest.pt: .*No space left on device"):
        dqn_atari.save_checkpoint({"a": 2}, Path("latest.pt"))
    assert Path("latest.pt").read_bytes() == before and len(list(Path().iterdir())) == 1


def etas(output):
    return re.findall(r"ETA (.*?)  epsilon", output)


def test_nothing_past_the_end_is_shown(capsys):
    train(Args(total_timesteps=1, device="cpu"))
    output = capsys.readouterr().out
    assert "step 16 (100.0%)" in output and len(etas(output)) == 1 and "--resume" not in output


def test_a_captured_step_runs_three_times_is_recorded_once_and_replayed(monkeypatch):
    """With a stand-in for CUDA's graph; what a real one computes needs a GPU."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    def learn():
        calls.append("learn")
        return len(calls), torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    optimizer = torch.optim.Adam([torch.zeros(1)])
    step = dqn_atari.captured(learn, optimizer).__next__
    assert [step()[0] for _ in range(3)] == [1, 2, 3]
    assert not optimizer.param_groups[0]["capturable"]
    assert [step()[0] for _ in range(3)] == [4, 4, 4] and optimizer.param_groups[0]["capturable"]
    assert calls == ["learn"] * 4 + ["replay"] * 3


def test_every_game_is_logged_at_a_step_of_its_own():
    """Those of Catch end at once; TensorBoard shows one value a step."""
    run_dir = train(tiny(total_timesteps=320))
    tags = scalars(run_dir)
    steps = [event.step for event in tags["charts/episodic_return"]]
    assert steps == [32 * game - 7 + i for game in range(1, 11) for i in range(8)]
    assert [event.step for event in tags["charts/episodic_length"]] == steps
    assert {event.value for event in tags["charts/episodic_length"]} == {4.0}
    train(tiny(total_timesteps=640, resume=str(run_dir)))
    again = [event.step for event in scalars(run_dir)["charts/episodic_return"]]
    assert again[: len(steps)] == steps and len(again) == len(set(again)) == 160


def test_a_flag_that_a_reader_adds_has_no_range_until_he_gives_it_one():
    fields = [("temperature", float, 5.0), ("layers", int, -3), ("noisy", bool, True)]
    fields = [(name, kind, dataclasses.field(default=value)) for name, kind, value in fields]
    more = dataclasses.make_dataclass("More", fields, bases=(Args,))
    run_dir = train(more(**vars(tiny(total_timesteps=64))))
    assert model(run_dir, 64)["args"]["temperature"] == 5.0
    args = dqn_atari.load_checkpoint(run_dir / "latest.pt")["args"]
    assert args == tiny(total_timesteps=64)  # which knows none of them


NUMBERS = {
    "seed": np.int64(3), "gamma": np.float64(0.9), "save_replay": np.bool_(True),
    "env_id": np.str_("ALE/Pong-v5"), "total_timesteps": np.int64(320), "num_envs": np.int64(4),
    "learning_rate": np.float64(1e-3),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_and_a_path_from_another_script(name):
    """What is saved can be loaded, though a pickled NumPy number could not be."""
    args = tiny(**{"total_timesteps": 320, name: NUMBERS[name]})
    run_dir = train(args)
    saved = model(run_dir, 320)["args"]
    assert saved == saved_flags(args)
    assert {type(saved[name]) for name in saved} == {int, float, str, bool}
    train(dataclasses.replace(args, resume=Path(run_dir), total_timesteps=640))
    assert model(run_dir, 640)["args"] == saved_flags(args) | {"total_timesteps": 640}


def test_processes_that_save_in_one_directory_use_names_of_their_own(monkeypatch):
    names, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda c, f: names.append(Path(f.name).name) or save(c, f))
    for pid in (71, 72):
        monkeypatch.setattr(os, "getpid", lambda: pid)
        dqn_atari.save_checkpoint({"a": pid}, Path("latest.pt"))
    assert len(set(names)) == 2 and all(name.endswith(".tmp") for name in names)
    assert [path.name for path in Path().iterdir()] == ["latest.pt"]


OPTIMIZERS = {"adam": (0.9, 0.999), "rmsprop": (0.0, 0.95)}  # betas


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_differ_in_their_betas_alone(name):
    run_dir = train(tiny(total_timesteps=64, optimizer=name, learning_rate=3e-4))
    group = torch.load(run_dir / "latest.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["betas"] == OPTIMIZERS[name] and group["lr"] == 3e-4 and group["eps"] == 1e-5
    assert group["weight_decay"] == 0 and not group["amsgrad"] and not group["maximize"]


def test_rmsprop_is_torchs_once_the_bias_correction_is_gone():
    torch.manual_seed(0)
    start = torch.randn(50)
    betas = OPTIMIZERS["rmsprop"]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    adam = torch.optim.Adam([ours], 2.5e-4, betas, fused=True)
    rmsprop = torch.optim.RMSprop([theirs], 2.5e-4, alpha=betas[1])
    for step in range(300):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = torch.randn(50)
        theirs.grad = ours.grad.clone()
        adam.step()
        rmsprop.step()
    moved = ours.detach() - before[0]
    torch.testing.assert_close(moved, theirs.detach() - before[1], rtol=1e-3, atol=1e-7)


@pytest.mark.real_network
@pytest.mark.real_game
def test_resuming_after_sigkill_is_bit_identical():
    args = tiny(num_envs=4, save_replay=True, **REAL)
    process = launch(*flags_of(args))
    run_dir = wait_for("*/model_640.pt", process)
    process.kill()
    process.communicate()
    for path in run_dir.glob("model_960.pt"):
        path.unlink()
    process = launch("--resume", str(run_dir))
    whole = train(args)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert same(model(run_dir, 960), model(whole, 960))


@pytest.mark.real_game
def test_the_replay_holds_what_the_real_game_showed(monkeypatch):
    """Every transition of a short run of Breakout: its stacks, action, reward and lost lives."""
    shown, buffers, make_vec_env = [], [], dqn_atari.make_vec_env

    def make(args):
        envs = make_vec_env(args)
        reset, step = envs.reset, envs.step

        def spy_reset(seed):
            obs, infos = reset(seed=seed)
            shown.append((obs.copy(), None, None, infos["lives"].copy(), None))
            return obs, infos

        def spy_step(actions):
            obs, rewards, terminations, truncations, infos = step(actions)
            shown.append((obs.copy(), actions, rewards, infos["lives"].copy(), terminations))
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
        tiny(
            num_envs=4,
            total_timesteps=2400,
            learning_starts=2390,
            buffer_size=2600,
            checkpoint_frequency=10**6,
        )
    )
    (buffer,), slots = buffers, len(shown) - 1
    rows = torch.arange(4 * (slots - 1))
    draws = iter([rows.flip(0)])  # of ages
    monkeypatch.setattr(torch, "randint", lambda *a, **kw: next(draws))
    batch, ends, lost_lives = buffer.sample(len(rows)), 0, 0
    order = torch.zeros(len(rows), dtype=torch.bool).argsort()  # as sample sorts: none is cut off
    assert len(order) > 2000
    for row, (t, game) in enumerate(divmod(row, 4) for row in order.tolist()):
        obs, actions, rewards, lives, over = (x[game] for x in shown[t + 1])
        before, lives_before = shown[t][0][game], shown[t][3][game]
        assert (batch.obs[row].numpy() == before).all()
        assert (batch.next_obs[row, :3].numpy() == before[1:]).all()
        assert (batch.next_obs[row, 3].numpy() == obs[3]).all()  # of the next game, where over
        assert over or (batch.next_obs[row].numpy() == obs).all()
        assert batch.actions[row] == actions and batch.rewards[row] == np.sign(rewards)
        lost = lives < lives_before and not over
        assert batch.terminations[row] == (over or lost)
        ends, lost_lives = ends + int(over), lost_lives + int(lost)
    assert ends > 4 and lost_lives > 10
