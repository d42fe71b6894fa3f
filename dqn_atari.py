# SPDX-License-Identifier: MIT
"""DQN that plays Atari from pixels, in one file.

    python dqn_atari.py --env-id ALE/Breakout-v5     # train; --help lists every option
    python dqn_atari.py --resume runs/<run>          # go on where a run was stopped
    python evaluate.py runs/<run>/model_<step>.pt    # play whole games with what was learnt

The algorithm is that of [Mnih 2015], doi:10.1038/nature14236 (`Nature:` marks differences). A
network Q(s, a) predicts the discounted return of an action. It learns from transitions
(s, a, r, s', terminated) to predict

    y = r + gamma * (1 - terminated) * max_a' Q_target(s', a').

Replay, drawing old steps at random, breaks their correlation; Q_target is a copy of Q, synced
rarely, so that targets don't chase themselves. A step is one action, held for 4 frames, in one of N
games. In reading order: Args; the games; ReplayBuffer; QNetwork; td_loss; train; plumbing."""

import copy
import dataclasses
import difflib
import os
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter

gym.register_envs(ale_py)


@dataclasses.dataclass
class Args:
    """Train DQN on an Atari game. Steps are agent steps."""
    # The run
    exp_name: str = "dqn_atari"  # a part of the run directory's name
    seed: int = 1  # of the games, the exploration, the sampling and the initial weights
    device: str = "auto"  # cpu, cuda, mps, xpu or auto: the accelerator there is, else cpu
    checkpoint_frequency: int = 100_000  # steps between checkpoints
    save_replay: bool = False  # for exact resuming; all games restart at every checkpoint then
    resume: Path | None = None  # run directory to go on with; options not given are taken from it
    paper: bool = False  # close to Nature's optimizer and exploration; in Python: train(PAPER)
    # The games
    env_id: str = "ALE/Breakout-v5"  # game: one of ALE/*-v5
    total_timesteps: int = 6_000_000  # steps in all (Nature: 50 million)
    num_envs: int = 16  # N, the games stepped at once (Nature: 1)
    repeat_action_probability: float = 0.25  # sticky actions: chance per frame (Nature: 0)
    terminal_on_life_loss: bool = True  # a lost life is terminal in the targets; the game goes on
    # The algorithm
    buffer_size: int = 1_000_000  # transitions in replay, 7,063 bytes each
    learning_starts: int = 20_000  # steps to collect before learning starts
    batch_size: int = 32  # transitions per gradient step
    train_frequency: int = 4  # steps per gradient step
    gamma: float = 0.99  # discount factor per step
    target_network_frequency: int = 10_000  # steps between syncs
    optimizer: Literal["adam", "rmsprop"] = "adam"  # adam, or nearly Nature's rmsprop
    learning_rate: float = 1e-4  # of the optimizer
    start_e: float = 1.0  # epsilon, the chance of a random action, at the start
    end_e: float = 0.01  # epsilon at the end of exploration and from then on
    exploration_steps: int = 250_000  # in which epsilon falls (Nature: from learning_starts on)
    double_q: bool = False  # Double DQN, against values that are too high: Q chooses a'


PAPER = Args(paper=True, optimizer="rmsprop", learning_rate=2.5e-4, learning_starts=50_000,
             end_e=0.1, exploration_steps=1_000_000)
STACK = 4  # pictures in an observation


class Lives(gym.vector.VectorWrapper):
    """Tells in infos["life_lost"] (N,) which games lost a life and go on. If the game has FIRE, it
    is pressed in the first two steps of a life, whatever the agent chooses: a rule of the game to
    it. Breakout waits for FIRE, and a sticky action may swallow one. Nature: no such rule."""

    def __init__(self, envs: gym.vector.VectorEnv, action_set: list):
        super().__init__(envs)
        fire = ale_py.Action.FIRE
        self.fire = action_set.index(fire) if fire in action_set else None

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        self.lives = infos["lives"]
        self.steps_in_life = np.zeros(self.num_envs, dtype=int)
        return obs, infos

    def step(self, actions):
        if self.fire is not None:
            actions = np.where(self.steps_in_life < 2, self.fire, actions)
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        ended = terminations | truncations  # there infos["lives"] is the next game's already
        infos["life_lost"] = (infos["lives"] < self.lives) & ~ended
        self.lives = infos["lives"]
        self.steps_in_life = np.where(infos["life_lost"] | ended, 0, self.steps_in_life + 1)
        return obs, rewards, terminations, truncations, infos


def make_vec_env(args: Args) -> gym.vector.VectorEnv:
    """N games in ALE's C++ threads, to train on: uint8 (N, STACK, 84, 84), raw rewards."""
    envs = gym.make_vec(
        args.env_id, args.num_envs, vectorization_mode="vector_entry_point",
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,  # obs after a last step: the next game's
        frameskip=4,  # an action is held for 4 frames
        maxpool=True,  # the brighter of its last two: some sprites are drawn in every other frame
        grayscale=True, img_height=84, img_width=84,  # a picture
        stack_num=STACK,  # an observation: the last pictures, blank at first, show what moves
        repeat_action_probability=args.repeat_action_probability,  # in each frame
        noop_max=30,  # before a game 0 to 29 frames without action, so that games differ
        max_num_frames_per_episode=108_000,  # half an hour of play, then the game is truncated
        episodic_life=False,  # True would start a new game at every lost life
        life_loss_info=False,  # True would end the game there for the agent
        use_fire_reset=False,  # True would press FIRE once a game: Lives does more
        reward_clipping=False)  # True would clip scores, too: train() clips its own
    envs = Lives(envs, envs.unwrapped.ale.get_action_set())
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)  # last 100 games


def make_env(env_id: str, *, repeat_action_probability=0.25, noop_max=30,
             max_episode_frames=108_000, render_mode=None) -> gym.Env:
    """One game, for films and other code: make_vec_env's pictures, without the FIRE of Lives."""
    env = gym.make(
        env_id, obs_type="grayscale", render_mode=render_mode, frameskip=1,  # the wrapper skips 4
        repeat_action_probability=repeat_action_probability,
        max_num_frames_per_episode=max_episode_frames)
    has_noop = env.unwrapped.get_action_meanings()[0] == "NOOP"  # not in Backgammon
    env = gym.wrappers.AtariPreprocessing(env, noop_max if has_noop else 0)
    env = gym.wrappers.FrameStackObservation(env, STACK, padding_type="zero")
    env.metadata = env.metadata | {"render_fps": 15}  # 60 frames a second, 4 a step
    return env


# obs, next_obs uint8 (B, STACK, 84, 84); actions int64, rewards float32, terminations bool (B,)
Batch = namedtuple("Batch", "obs actions rewards next_obs terminations")


class ReplayBuffer:
    """A ring of single pictures, which are stacked when they are sampled: 1,000,000 transitions
    take 7.06 GB; as stacks they would take 28.2 GB, as pairs of stacks 56.4 GB.
    A slot holds a step of each of N games: the newest picture of the observation, the action taken,
    what came of it, and whether the game `ended` with it: the next slot's picture is another's.

        slot     0  1  2  3  4      Slot 4's obs is (blank, blank, d, e); slot 5 ends next_obs.
        picture  a  b  c  d  e      Slot 2's next_obs is (a, b, c, d), where d is another game's.
        ended          x            If slot 2 is terminal, no value is asked of d. If the game was
                                    cut off (truncated or restarted), slot 2 is never drawn."""

    def __init__(self, capacity: int, num_envs: int, device: str = "cpu"):
        self.slots, self.num_envs = capacity // num_envs, num_envs
        shape = (self.slots, num_envs)
        self.frames = torch.zeros((*shape, 84, 84), dtype=torch.uint8, device=device)
        self.actions = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(shape, device=device)  # float32
        self.terminations = torch.zeros(shape, dtype=torch.bool, device=device)
        self.ended = torch.ones(shape, dtype=torch.bool, device=device)  # unwritten slots, too
        self.position, self.size = 0, 0  # slot to write next; slots written
        # The newest step that can be drawn, and how many can: a CUDA graph would freeze numbers.
        self.last, self.drawable = torch.zeros(2, dtype=torch.long, device=device)

    def __len__(self) -> int:
        """Steps to draw from: without the newest slot, which has no next picture yet, and, in a
        full ring, the oldest STACK - 1, whose stacks began with what is overwritten."""
        return max(0, min(self.size - 1, self.slots - STACK)) * self.num_envs

    def add(self, frames, actions, rewards, terminations, ended) -> None:
        """Write one slot: frames uint8 (N, 84, 84), the others (N,)."""
        self.frames[self.position] = torch.as_tensor(frames)
        self.actions[self.position] = torch.as_tensor(actions)
        self.rewards[self.position] = torch.as_tensor(rewards)
        self.terminations[self.position] = torch.as_tensor(terminations)
        self.ended[self.position] = torch.as_tensor(ended)
        self.last.fill_(self.position * self.num_envs - 1)
        self.position = (self.position + 1) % self.slots
        self.size = min(self.size + 1, self.slots)
        self.drawable.fill_(len(self))

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement, while there are any: len(self) > 0."""
        # Steps are numbered slot by slot, so that a game's next step is N further on. A CUDA graph
        # has no loop to redraw those that were cut off: 2 B + 32 are drawn, these are sorted last,
        # and the first B kept. If one in 4 is cut off, too few remain with odds of 1e-17.
        device = self.frames.device
        ended, terminations = self.ended.flatten(), self.terminations.flatten()
        draws = torch.randint(2**62, (2 * batch_size + 32,), device=device)
        step = (self.last - draws % self.drawable) % len(ended)  # randint takes no tensor as bound
        cut_off = ended[step] & ~terminations[step]
        step = step[cut_off.argsort()[:batch_size]]  # (B,)
        # The stack and the next picture; index_select is faster than [].
        window = step[:, None] + self.num_envs * torch.arange(1 - STACK, 2, device=device)
        window %= len(ended)  # (B, STACK + 1)
        pictures = self.frames.flatten(0, 1).index_select(0, window.flatten())
        pictures = pictures.unflatten(0, window.shape)  # (B, STACK + 1, 84, 84)
        for i in range(STACK - 1):  # if a game ended with picture i, blank pictures 0 to i
            pictures[:, : i + 1] *= ~ended[window[:, i], None, None, None]
        return Batch(pictures[:, :STACK], self.actions.flatten()[step].long(),
                     self.rewards.flatten()[step], pictures[:, 1:], terminations[step])

    def refill(self, state: dict) -> None:
        """Add the slots of a saved ring of N games, oldest first; state is its vars()."""
        for i in range(state["position"] - state["size"], state["position"]):  # < 0: from the end
            self.add(state["frames"][i], state["actions"][i], state["rewards"][i],
                     state["terminations"][i], state["ended"][i])


class QNetwork(nn.Module):
    """Observations uint8 (B, STACK, 84, 84) to the values of actions, float (B, A) [Mnih 2015]."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, stride=4), nn.ReLU(),  # (B, 32, 20, 20)
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),  # (B, 64, 9, 9)
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),  # (B, 64, 7, 7)
            nn.Flatten(),  # (B, 3136)
            nn.Linear(3136, 512), nn.ReLU(),  # (B, 512)
            nn.Linear(512, num_actions))  # (B, A)
        # Nature: all random. With orthogonal hidden layers fewer units are off for good.
        for layer in self.network[:-1]:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.network(obs.to(memory_format=torch.channels_last) / 255.0)


def linear_schedule(start_e: float, end_e: float, duration: int, t: int) -> float:
    """Epsilon at step t: from start_e to end_e in `duration` steps, then end_e."""
    return start_e + (end_e - start_e) * min(t / duration, 1.0)


def select_actions(q_values: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Epsilon-greedy actions (N,) from q_values (N, A)."""
    num_envs, num_actions = q_values.shape
    explore = rng.random(num_envs) < epsilon
    return np.where(explore, rng.integers(num_actions, size=num_envs), q_values.argmax(1))


def td_loss(q_network, target_network, batch: Batch, gamma: float, double_q: bool = False):
    """The Huber loss of the temporal-difference errors, mean over the batch, and Q(s, a) (B,)."""
    with torch.no_grad():
        next_q = target_network(batch.next_obs)  # (B, A)
        if double_q:
            # y = r + γ (1 - terminated) Q_target(s', argmax_a Q(s', a))   [van Hasselt 2016]
            next_action = q_network(batch.next_obs).argmax(1, keepdim=True)  # (B, 1)
            next_value = next_q.gather(1, next_action).squeeze(1)  # (B,)
        else:
            # y = r + γ (1 - terminated) max_a' Q_target(s', a')   [Mnih 2015, Algorithm 1]
            next_value = next_q.amax(1)  # (B,)
        td_target = batch.rewards + gamma * ~batch.terminations * next_value  # (B,)
    q_pred = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # (B,)
    # Huber's gradient is the error clipped to [-1, 1], as in the paper.
    return nn.functional.smooth_l1_loss(q_pred, td_target), q_pred


def train(args: Args, signals=()) -> Path:
    """Train until the steps are done or `signals` holds something; return the run directory.
    Bad input is a SystemExit after a line on stderr, a file that can't be written an OSError."""
    saved = load_checkpoint(Path(args.resume, "latest.pt")) if args.resume else None
    # To be saved: the flags before a short run caps them, and no NumPy numbers, for torch.load.
    flags = {k: v.item() if isinstance(v, np.generic) else v for k, v in vars(args).items()}
    args = dataclasses.replace(args, **flags)
    del flags["resume"]
    total = args.total_timesteps
    if args.learning_starts >= total or args.exploration_steps > total:  # a short run: cap both
        args.learning_starts = min(args.learning_starts, total // 10 or 1)
        args.exploration_steps = min(args.exploration_steps, total // 2 or 1)
    args.buffer_size = min(args.buffer_size, total + 16 * args.num_envs)  # more is never filled
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best.type if args.device == "auto" else args.device
    check(args, device, best.type, saved)
    torch.manual_seed(args.seed)  # for the initial weights
    envs = make_vec_env(args)
    num_actions = int(envs.single_action_space.n)
    q_network = QNetwork(num_actions).to(device, memory_format=torch.channels_last)  # faster
    target_network = copy.deepcopy(q_network)
    # RMSprop is Adam without momentum, but for a bias correction; only Adam has a fused form.
    # Nature: centred, with an eps of about 0.1 / 32 in these terms: little is learnt with it.
    betas = (0.0, 0.95) if args.optimizer == "rmsprop" else (0.9, 0.999)
    eps = 1e-5  # with PyTorch's 1e-8 ever more units go off while no reward comes, as in Enduro
    optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, betas, eps, fused=True)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, device)
    step = saved["global_step"] if saved else 0
    if saved:
        q_network.load_state_dict(saved["model"])
        target_network.load_state_dict(saved["target"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # it keeps what it is given
        optimizer.param_groups[0]["lr"] = args.learning_rate  # may be given anew
        if saved["buffer"]:
            buffer.refill(saved["buffer"])
    del saved  # all is copied; held, the mapped file would keep its disk space
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.6f}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{name}")
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # a new run never shares one
    writer = SummaryWriter(run_dir, purge_step=step + 1)  # drops what came after the save
    writer.add_text("hyperparameters", str(args), step)
    print(f"{run_dir}: {args.env_id} on {device}, learning once replay holds "
          f"{args.learning_starts:,} steps, exploring until {args.exploration_steps:,}")

    def learn():  # one gradient step; nothing but tensors may change in it, see captured()
        batch = buffer.sample(args.batch_size)
        loss, q_pred = td_loss(q_network, target_network, batch, args.gamma, args.double_q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Nature: no such step. The picture's brightness, times the sum of a filter's weights, can
        # hold its output below zero in every state, for good, as in Pong: so they sum to zero.
        with torch.no_grad():
            filters = q_network.network[0].weight  # (32, STACK, 8, 8)
            filters -= filters.mean((1, 2, 3), keepdim=True)
        return loss.detach(), q_pred.detach()

    if device == "cuda":
        learn = captured(learn, optimizer).__next__  # the next value of a generator

    def count_passed(every: int) -> int:  # how many multiples of it the last N steps reached
        return step // every - (step - args.num_envs) // every

    last_step, last_time = step, time.monotonic()
    loss = q_pred = torch.zeros(1)  # until learning starts
    restart, finished = True, False
    while not finished:  # until all steps are done or a signal came
        if restart:
            # All games begin anew at the start and after each checkpoint with replay, seeded with a
            # hash of (seed, step): to go on exactly, nothing of the games need be saved.
            rng = np.random.default_rng((args.seed, step))
            obs, _ = envs.reset(seed=int(rng.integers(2**30)))  # game i takes it + i, an int32
            torch.manual_seed(rng.integers(2**32))

        # act
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_steps, step)
        with torch.no_grad():
            q_values = q_network(torch.as_tensor(obs, device=device))  # (N, A)
        actions = select_actions(q_values.cpu().numpy(), epsilon, rng)

        # learn, before the games are stepped: a GPU computes on while they play
        if len(buffer) >= args.learning_starts:
            for _ in range(count_passed(args.train_frequency)):
                loss, q_pred = learn()

        # step
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        step += args.num_envs
        finished = step >= total or bool(signals)
        save = finished or count_passed(args.checkpoint_frequency) > 0
        restart = save and args.save_replay  # cuts all games off

        # store; a truncated game is not terminal, it could have gone on: its last step is cut off
        terminal = terminations | (infos["life_lost"] & args.terminal_on_life_loss)
        ended = terminations | truncations
        clipped = np.sign(rewards)  # -1, 0 or 1
        buffer.add(obs[:, -1], actions, clipped, terminal, ended | restart)
        obs = next_obs

        # sync: Q_target becomes a copy of Q
        if count_passed(args.target_network_frequency):
            target_network.load_state_dict(q_network.state_dict())

        # report
        for i in np.flatnonzero(ended):
            game_step = step - args.num_envs + 1 + i  # TensorBoard keeps one value a step
            writer.add_scalar("charts/episodic_return", infos["episode"]["r"][i], game_step)
            writer.add_scalar("charts/episodic_length", infos["episode"]["l"][i], game_step)
        if save:  # first, since printing may block
            checkpoint = {"model": q_network.state_dict(), "args": flags, "global_step": step}
            save_checkpoint(checkpoint, run_dir / f"model_{step}.pt")
            checkpoint["target"] = target_network.state_dict()
            checkpoint["optimizer"] = optimizer.state_dict()
            checkpoint["buffer"] = vars(buffer) if args.save_replay else None
            save_checkpoint(checkpoint, run_dir / "latest.pt")
        if save or count_passed(10_000):
            sps = (step - last_step) / (time.monotonic() - last_time)
            hours = max(total - step, 0) / sps / 3600
            last_step, last_time = step, time.monotonic()
            writer.add_scalar("charts/SPS", sps, step)
            writer.add_scalar("charts/epsilon", epsilon, step)
            writer.add_scalar("losses/td_loss", loss.item(), step)
            writer.add_scalar("losses/q_values", q_pred.mean().item(), step)
            writer.add_scalar("losses/q_spread", q_pred.std(correction=0).item(), step)  # ~0: dead
            returns = envs.return_queue or [np.nan]  # of the last 100 games
            print(f"step {step:,} ({min(step / total, 1):.1%})  SPS {sps:.0f}  ETA {hours:.2f} h  "
                  f"epsilon {epsilon:.3f}  episodes {envs.episode_count}  "
                  f"return {np.mean(returns):.1f} (max {max(returns):.0f}, last 100)  "
                  f"loss {loss.item():.4f}  buffer {buffer.size / buffer.slots:.0%}")
    writer.close()
    if step < total:
        print(f"stopped; to go on: python dqn_atari.py --resume {run_dir}")
    return run_dir


# Plumbing: CUDA, bad input, checkpoints, the command line
def captured(learn, optimizer):
    """Yields what learn() returns, from the fourth time on by a CUDA graph, which keeps to the same
    tensors: its more than 100 kernels take longer to launch one by one than to run. What learn()
    does in Python is done once, when it is recorded: numbers stay as they were then."""
    for _ in range(3):  # CUDA's libraries and the optimizer set themselves up
        yield learn()
    optimizer.param_groups[0]["capturable"] = True  # without it Adam can't be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        results = learn()
    while True:
        graph.replay()
        yield results


def refuse(what: str, code: int = 2):
    """One line on stderr, and out: with 2 for bad input, with 1 where a run can't go on."""
    print(f"error: {what}", file=sys.stderr)
    sys.exit(code)


def check(args: Args, device: str, best: str, saved: dict | None) -> None:
    """Refuse what can't work here, or in the run to be resumed."""
    def require(holds: bool, name: str, hint: str) -> None:
        if not holds:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)}: {hint}")

    games = [name for name in gym.registry if name.startswith("ALE/")]  # all end in -v5
    near = difflib.get_close_matches(args.env_id, games, cutoff=0)  # 3 of them
    require(args.env_id in games, "env_id", f"not one of ALE/*-v5; try {near}")
    least = {"total_timesteps": 1, "num_envs": 1, "learning_starts": 1, "exploration_steps": 1,
             "batch_size": 1, "train_frequency": 1, "target_network_frequency": 1, "seed": 0,
             "checkpoint_frequency": 4 * args.num_envs,  # one step in 4 may be cut off, see sample
             "buffer_size": args.learning_starts + 16 * args.num_envs}
    for name, low in least.items():
        require(low <= getattr(args, name) < 2**32, name, f"must be from {low} to 2**32 - 1")
    for name in ("repeat_action_probability", "gamma", "learning_rate", "start_e", "end_e"):
        require(0 <= getattr(args, name) <= 1, name, "must be from 0 to 1")
    require(device in ("cpu", best), "device", f"best here is {best}")
    if saved:
        for name in ("env_id", "paper", "optimizer", "num_envs"):
            old = getattr(saved["args"], name)
            require(getattr(args, name) == old, name, f"{args.resume} has {old}")
        require(args.total_timesteps > saved["global_step"], "total_timesteps", "done already")
    if device == "cpu" and sys.platform == "linux":  # Linux grants too much, and kills later
        free = 1024 * int(Path("/proc/meminfo").read_text().split()[7])  # MemAvailable
        most = int(free - 5e8) // 7063  # the process itself takes half a GB
        require(args.buffer_size <= most, "buffer_size", f"there is memory for {most}")


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write to another name, then rename: a kill leaves the old file or the new one."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides the system's error in its own
        partial.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: {reason}")


def load_checkpoint(path: Path | str) -> dict:
    """What train() saved, on the CPU, its args as Args: a flag that the file doesn't have takes its
    default, one that is unknown here is passed over."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        known = {name: saved["args"][name] for name in vars(Args()) if name in saved["args"]}
        return saved | {"args": Args(**known)}
    except Exception as error:  # torch.load has a dozen ways to say it
        refuse(f"{path}: no whole checkpoint of this version: {error!r}")


if __name__ == "__main__":
    # Lines appear at once, through pipes, too, and letters that the terminal hasn't as "?".
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    args = tyro.cli(Args, default=PAPER if "--paper" in sys.argv else Args())
    if args.resume:  # the saved options are the defaults then
        args = tyro.cli(Args, default=load_checkpoint(Path(args.resume, "latest.pt"))["args"])
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: signals.append(number))
    try:
        train(args, signals)
        sys.exit(128 + signals[0] if signals else 0)
    except (OSError, torch.OutOfMemoryError) as error:  # a full disk, too large a buffer
        refuse(str(error), 1)
