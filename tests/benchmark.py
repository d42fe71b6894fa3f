# SPDX-License-Identifier: MIT
"""How fast, and with how much memory, the script learns. Run by hand; it is no test.

    python tests/benchmark.py                     # the default flags, on this machine
    python tests/benchmark.py --num-envs 64       # every flag of dqn_atari.py can be given
    pip install stable-baselines3 && python tests/benchmark.py --against-sb3

What is timed is the script's own train(), in a process of its own, with a replay buffer that is
full from the start, so that every step is one of the learning phase; the first quarter of the steps
is not counted. Machines are noisy: what is compared is measured in turns, and medians are printed.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_atari
from dqn_atari import Args, ReplayBuffer


@dataclasses.dataclass
class Options:
    """Measure the speed and the memory of dqn_atari.py."""

    args: tyro.conf.OmitArgPrefixes[Args]
    steps: int = 4_000
    """steps of each measurement"""
    turns: int = 3
    """measurements of each kind"""
    held: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """transitions in the replay buffer, for the cost of a step with each"""
    against_sb3: bool = False
    """measure Stable-Baselines3's DQN, in turns with ours"""


class FullBuffer(ReplayBuffer):
    """Holds as many transitions as it can from the start, of games that end every 200 steps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.frames[:] = torch.randint(0, 256, self.frames.shape[1:], dtype=torch.uint8)
        self.ended[:] = False
        self.ended[::200] = True
        self.terminations[::200] = True
        self.size = self.slots
        self.last.fill_(self.slots * self.num_envs - 1)
        self.drawable.fill_(len(self))
        rings = [ring for ring in vars(self).values() if isinstance(ring, torch.Tensor)]
        FullBuffer.bytes_each = sum(ring.nbytes for ring in rings) / self.ended.numel()


class Clock:
    """In place of train()'s list of signals: asked once a vector step, it takes the time."""

    def __init__(self, ticks: int):
        self.ticks, self.times = ticks, []

    def __bool__(self):
        self.times.append(time.perf_counter())
        return len(self.times) > self.ticks

    def seconds_per_tick(self) -> float:
        counted = self.times[len(self.times) // 4 :]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


def measure(args: Args, held: int, steps: int, parts: bool) -> dict:
    """Run train(); with `parts` time its parts too, on a GPU without the CUDA graph, and slower."""
    clock, spent = Clock(steps // args.num_envs), {}

    def timed(owner, name, part):
        function = getattr(owner, name)

        def wrapper(*a, **kw):
            start = time.perf_counter()
            result = function(*a, **kw)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if len(clock.times) >= clock.ticks // 4:
                spent[part] = spent.get(part, 0) + time.perf_counter() - start
            return result

        setattr(owner, name, wrapper)

    make_vec_env = dqn_atari.make_vec_env

    def make_timed(args):
        envs = make_vec_env(args)
        timed(envs, "step", "games")
        return envs

    dqn_atari.ReplayBuffer = FullBuffer
    if parts:
        # A CUDA graph has no parts to time.
        dqn_atari.captured = lambda learn, optimizer: iter(learn, None)
        dqn_atari.make_vec_env = make_timed
        timed(FullBuffer, "sample", "sample")
        timed(dqn_atari, "td_loss", "forward")
        timed(torch.Tensor, "backward", "backward")
        timed(torch.optim.Adam, "step", "optimizer")
        timed(FullBuffer, "add", "store")
    args = dataclasses.replace(
        args, total_timesteps=10**9, buffer_size=held, learning_starts=1, checkpoint_frequency=10**9
    )
    with tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as nowhere:
        os.chdir(directory)
        with contextlib.redirect_stdout(nowhere):
            dqn_atari.train(args, clock)
        os.chdir("/")
    seconds = clock.seconds_per_tick()
    counted = len(clock.times) - 1 - len(clock.times) // 4
    spent = {part: total / counted for part, total in spent.items()}
    spent["act, and the rest"] = seconds - sum(spent.values())
    return {
        "rate": args.num_envs / seconds,
        "parts": spent,
        "bytes_each": FullBuffer.bytes_each,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def measure_sb3(args: Args, held: int, steps: int) -> dict:
    """Stable-Baselines3: the same game, batch, network and steps per gradient step."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    envs, clock = args.train_frequency, Clock(steps // args.train_frequency)
    sticky = {"frameskip": 1, "repeat_action_probability": args.repeat_action_probability}

    class Tick(BaseCallback):
        def _on_step(self):
            return not clock

    model = DQN(
        "CnnPolicy",
        VecFrameStack(make_atari_env(args.env_id, envs, seed=1, env_kwargs=sticky), 4),
        buffer_size=held,
        batch_size=args.batch_size,
        train_freq=1,
        gradient_steps=1,
        learning_starts=steps // 8,
        learning_rate=args.learning_rate,
        target_update_interval=args.target_network_frequency,
        exploration_initial_eps=args.end_e,
        exploration_final_eps=args.end_e,
        device="auto" if args.device == "auto" else args.device,
    )
    model.learn(10**9, callback=Tick())
    return {"rate": envs / clock.seconds_per_tick()}


def apart(function, *args) -> dict:
    """Call it in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def spread(values) -> str:
    return f"{median(values):8.0f}   ({min(values):.0f} to {max(values):.0f})"


def main(options: Options) -> None:
    args, held, steps = options.args, options.held, options.steps
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()}/{os.cpu_count()} threads, {gpu}")
    print(
        f"{args.env_id}, N {args.num_envs}, batch {args.batch_size}, a gradient step per "
        f"{args.train_frequency} steps, {args.optimizer}, median of {options.turns} turns\n"
    )
    ours, theirs = [], []
    for _ in range(options.turns):
        ours.append(apart(measure, args, held[0], steps, False))
        if options.against_sb3:
            theirs.append(apart(measure_sb3, args, held[0], steps))
    rates = [result["rate"] for result in ours]
    print(f"steps per second, ours    {spread(rates)}")
    if options.against_sb3:
        their_rates = [result["rate"] for result in theirs]
        print(f"Stable-Baselines3         {spread(their_rates)}")
        print(f"ratio of the medians      {median(rates) / median(their_rates):8.2f}")

    parts = [apart(measure, args, held[0], steps, True)["parts"] for _ in range(options.turns)]
    updates = args.num_envs / args.train_frequency
    print(f"\nmilliseconds of a vector step ({args.num_envs} steps, {updates:g} gradient steps)")
    learning = ("sample", "forward", "backward", "optimizer")
    for part in (*learning, "act, and the rest", "games", "store"):
        milliseconds = 1000 * median(turn[part] for turn in parts)
        each = f"{milliseconds / updates:8.2f} a gradient step" if part in learning else ""
        print(f"{part:<25} {milliseconds:8.2f}   {each}")

    print("\ntransitions held    steps/s    ms/step    peak GB of the process    of the device")
    for size in held:
        turns = [apart(measure, args, size, steps, False) for _ in range(options.turns)]
        rate = median(turn["rate"] for turn in turns)
        peak = median(turn["peak"] for turn in turns) / 1e9
        on_device = median(turn["device_peak"] for turn in turns) / 1e9
        print(f"{size:>16,} {rate:>10.0f} {1000 / rate:>10.2f} {peak:>25.2f} {on_device:>16.2f}")
    print(f"\nbytes of a stored transition {ours[0]['bytes_each']:.0f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
