"""The loop: every branch of it, what it learns, what it saves, and going on from there."""

import contextlib
import dataclasses
import resource
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
from small_network import SmallNetwork
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
# For the real network, a gradient step of which takes up to 0.1 s: 25 of them, of 4 transitions.
REAL = {"batch_size": 4, "train_frequency": 32}


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.fixture(autouse=True)
def in_an_empty_directory_with_a_small_network(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "real_network" not in request.keywords:
        monkeypatch.setattr(dqn_atari, "QNetwork", SmallNetwork)


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
    assert "learning from step 56, exploring until 200\n" in capsys.readouterr().out
    tags = scalars(run_dir)
    assert tags["losses/td_loss"][-1].step == 400
    assert tags["charts/epsilon"][-1].value == pytest.approx(0.1)
    shortened = dataclasses.replace(args, learning_starts=40, exploration_steps=200)
    assert model(run_dir, 400)["args"] == dataclasses.asdict(shortened)


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
    envs = gym.wrappers.vector.RecordEpisodeStatistics(Scripted([row[:4] for row in rows]))
    monkeypatch.setattr(dqn_atari, "make_vec_env", lambda args: envs)
    monkeypatch.setattr(
        dqn_atari.QNetwork, "forward", lambda self, obs: torch.tensor([[1.0, 0.0, 0.0]])
    )
    train(
        tiny(
            num_envs=1, total_timesteps=len(rows), learning_starts=15, exploration_steps=1,
            start_e=0.0, end_e=0.0, buffer_size=64, terminal_on_life_loss=terminal_on_life_loss,
        )
    )  # fmt: skip
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
                tiny(
                    num_envs=num_envs, total_timesteps=300, learning_starts=30,
                    exploration_steps=100,
                )
            )  # fmt: skip
        assert abs(len(count) - (300 - 30) / 4) <= num_envs


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


def test_events_from_after_the_checkpoint_are_replaced(monkeypatch):
    """As after a kill: TensorBoard was written further than latest.pt."""
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
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
    assert "learning from step 808," in capsys.readouterr().out
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
                tiny(save_replay=save_replay, exp_name=f"replay{save_replay}")
            )
        assert len(seeds) == len(set(seeds)) == resets


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


ENDLESS = tiny(num_envs=4, total_timesteps=10**6, learning_starts=9 * 10**4, buffer_size=10**5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(number):
    process = launch(*flags_of(ENDLESS))
    run_dir = wait_for("*/model_320.pt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"python dqn_atari.py --resume {run_dir}" in output and "Traceback" not in output
    assert_saved(run_dir)


def test_a_closed_pipe_behind_stdout_costs_no_checkpoint():
    """As with `| tee log` on Ctrl-C, where tee dies first, and with `| head -1`; and under nohup,
    which ignores SIGHUP, the terminal may be closed."""

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
    assert process.stderr.read() == "" and process.returncode == 130
    assert_saved(run_dir)


def test_a_full_device_behind_stdout_ends_no_run(monkeypatch):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    full = open("/dev/full", "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        run_dir = train(tiny(total_timesteps=320))
    with contextlib.suppress(OSError):
        full.close()
    assert (run_dir / "model_320.pt").exists()


def test_runs_started_at_the_same_time_have_directories_of_their_own(monkeypatch):
    """Two in one microsecond: the second is refused rather than mixed with the first."""
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    first, second = train(tiny(total_timesteps=64)), train(tiny(total_timesteps=64))
    assert first != second
    monkeypatch.setattr(time, "time", lambda: 1.5)
    train(tiny(total_timesteps=64))
    with pytest.raises(FileExistsError):
        train(tiny(total_timesteps=64))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before():
    """The limit on a file's size stands for the disk's: with the optimizer's state it is reached."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**7, 2 * 10**7))

    args = tiny(total_timesteps=10**6, learning_starts=400, buffer_size=10**4, **REAL)
    process = launch(*flags_of(args), preexec_fn=limit, stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=120)
    (line,) = error.splitlines()
    (run_dir,) = Path("runs").iterdir()
    assert f"{run_dir}/latest.pt: [Errno 27] File too large" in line and process.returncode == 1
    assert f"python dqn_atari.py --resume {run_dir}" in line
    assert torch.load(run_dir / "latest.pt", weights_only=True)["global_step"] == 320
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("limit", [600, 5_000, 100_000, 6_747_000])
def test_a_save_that_does_not_fit_names_the_systems_reason(limit):
    """Wherever it stops: torch.save says some of them in words of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="x.pt: .*File too large; to go on: .* --resume ."):
            dqn_atari.save_checkpoint({"model": torch.zeros(1_686_500)}, Path("x.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("where", ["a file", "removed", "too long"])
def test_a_place_that_cannot_be_written_is_an_oserror_with_its_name(monkeypatch, where):
    if where == "a file":
        Path("runs").write_text("")
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
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


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(monkeypatch, capsys):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    loss = dqn_atari.td_loss
    calls = []

    def spoilt(*args):
        calls.append(1)
        value, q_pred = loss(*args)
        return (value * np.nan if len(calls) > 80 else value), q_pred

    monkeypatch.setattr(dqn_atari, "td_loss", spoilt)
    with pytest.raises(SystemExit) as stopped:
        train(TINY)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "loss nan at step 640" in line
    (run_dir,) = Path("runs").iterdir()
    assert torch.load(run_dir / "latest.pt", weights_only=True)["global_step"] == 320


def test_a_run_with_no_room_to_learn_says_so(monkeypatch, capsys):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    run_dir = train(tiny(total_timesteps=480, learning_starts=479, exploration_steps=480, buffer_size=10**4))
    assert "too short to learn" in capsys.readouterr().out.splitlines()[0]
    assert {event.value for event in scalars(run_dir)["losses/td_loss"]} == {0.0}
    train(tiny(total_timesteps=480, learning_starts=440, exploration_steps=480, buffer_size=10**4))
    assert "learning from step 448," in capsys.readouterr().out.splitlines()[0]


def test_nothing_past_the_end_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    train(Args(total_timesteps=1, device="cpu"))
    output = capsys.readouterr().out
    assert "step 16 (100.0%)" in output and "ETA 0.00 h" in output and "--resume" not in output


def test_rmsprop_is_torchs_once_the_bias_correction_is_gone():
    torch.manual_seed(0)
    start = torch.randn(50)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    adam = torch.optim.Adam([ours], 2.5e-4, betas=(0.0, 0.95), fused=True)
    rmsprop = torch.optim.RMSprop([theirs], 2.5e-4, alpha=0.95, eps=1e-8)
    for step in range(300):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = torch.randn(50)
        theirs.grad = ours.grad.clone()
        adam.step()
        rmsprop.step()
    moved = ours.detach() - before[0]
    torch.testing.assert_close(moved, theirs.detach() - before[1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name, betas", [("rmsprop", (0.0, 0.95)), ("adam", (0.9, 0.999))])
def test_the_optimizers_differ_in_their_betas_alone(monkeypatch, name, betas):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    run_dir = train(tiny(total_timesteps=64, optimizer=name))
    group = torch.load(run_dir / "latest.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert (group["betas"], group["eps"], group["lr"]) == (betas, 1e-8, 2.5e-4)


@pytest.mark.real_network
def test_resuming_after_sigkill_is_bit_identical():
    args = tiny(num_envs=4, save_replay=True, **REAL)
    whole = train(dataclasses.replace(args, exp_name="whole"))
    process = launch(*flags_of(args))
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
    draws = iter([slots - 2 - rows // 4, rows % 4])  # of ages, then of games
    monkeypatch.setattr(torch, "randint", lambda *a, **kw: next(draws))
    batch, checked, ends = buffer.sample(len(rows)), 0, 0
    order = buffer.over.flatten()[: len(rows)].argsort()  # as sample sorts them
    transitions = [divmod(row, 4) for row in order.tolist()]
    transitions = [(t, game) for t, game in transitions if not shown[t][4][game]]  # not over there
    for row, (t, game) in enumerate(transitions):
        obs, actions, rewards, lives, over = shown[t + 1]
        assert (batch.obs[row].numpy() == shown[t][0][game]).all()
        assert (batch.next_obs[row].numpy() == obs[game]).all()
        assert batch.actions[row] == actions[game] and batch.rewards[row] == np.sign(rewards[game])
        assert batch.terminations[row] == (lives[game] < shown[t][3][game])
        checked, ends = checked + 1, ends + int(over[game])
    assert checked > 2000 and ends > 4
