# SPDX-License-Identifier: MIT
"""DQN that plays Atari from pixels, in one file.

    python dqn_atari.py --env-id ALE/Breakout-v5     # train; --help lists every option
    python dqn_atari.py --resume runs/<run>          # go on where a run was stopped
    python evaluate.py runs/<run>/model_<step>.pt    # play whole games with what was learnt

The algorithm is that of [Mnih 2015], doi:10.1038/nature14236 (`Nature:` marks differences); with
--double-q that of [van Hasselt 2016], arXiv:1509.06461. A network Q(s, a) predicts the discounted
return. Replay breaks the correlation of successive steps; targets come from a copy, Q⁻, synced
rarely, so that they don't chase themselves. A step is an action in one of N games, for 4 frames.
In reading order: Args; what the network sees; ReplayBuffer; QNetwork; td_loss; train; plumbing."""

import copy
import dataclasses
import difflib
import os
import signal
import sys
import threading
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
    exp_name: str = "dqn_atari"  # name of the experiment, a part of the run directory's name
    seed: int = 1  # of the games, the exploration, the sampling and the initial weights
    device: str = "auto"  # cpu, cuda, mps, xpu or auto: the accelerator there is, else cpu
    checkpoint_frequency: int = 100_000  # steps between checkpoints
    save_replay: bool = False  # for exact resuming; all games restart at every checkpoint then
    resume: str | None = None  # run directory to go on with; options not given are taken from it
    # The games
    env_id: str = "ALE/Breakout-v5"  # game: one of ALE/*-v5
    total_timesteps: int = 6_000_000  # steps in all (Nature: 50 million)
    num_envs: int = 16  # N, the games stepped at once (Nature: 1)
    repeat_action_probability: float = 0.25  # sticky actions: chance per frame (Nature: 0)
    terminal_on_life_loss: bool = True  # a lost life is terminal in the targets; the game goes on
    # The algorithm
    buffer_size: int = 1_000_000  # transitions in replay, 7,063 bytes each
    learning_starts: int = 50_000  # steps to collect before learning starts
    batch_size: int = 32  # transitions per gradient step
    train_frequency: int = 4  # steps per gradient step
    gamma: float = 0.99  # discount factor per step
    target_network_frequency: int = 10_000  # steps between syncs (Nature's paper: gradient steps)
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # rmsprop, nearly Nature's, or adam
    learning_rate: float = 2.5e-4  # of the optimizer; 1e-4 is usual for adam
    start_e: float = 1.0  # epsilon, the chance of a random action, at the start
    end_e: float = 0.1  # epsilon at the end of exploration and from then on
    exploration_steps: int = 1_000_000  # in which epsilon falls (Nature: from learning_starts on)
    double_q: bool = False  # Double DQN: Q, not Q⁻, chooses the next action


def make_env(env_id: str, *, repeat_action_probability=0.25, noop_max=30,
             max_episode_frames=108_000, render_mode=None) -> gym.Env:
    """One game, for films and for other code: observations uint8 (4, 84, 84), raw rewards.
    An action is held for 4 frames. The brighter of the last two (some sprites are drawn in every
    other frame only), grey, 84 x 84, is a picture; the last 4 pictures are an observation."""
    env = gym.make(
        env_id, obs_type="grayscale", render_mode=render_mode, frameskip=1,  # the wrapper skips 4
        repeat_action_probability=repeat_action_probability,
        max_num_frames_per_episode=max_episode_frames)
    has_noop = env.unwrapped.get_action_meanings()[0] == "NOOP"  # Backgammon: FIRE
    env = gym.wrappers.AtariPreprocessing(env, noop_max if has_noop else 0)
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


def make_vec_env(args: Args) -> gym.vector.VectorEnv:
    """N games in ALE's C++ threads, to train on: the same as make_env's, (N, 4, 84, 84), but for
    the step after a game's end, which ignores the action and shows the next game's first frame."""
    envs = gym.make_vec(
        args.env_id, args.num_envs, vectorization_mode="vector_entry_point",
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP, noop_max=30, frameskip=4, stack_num=4,
        repeat_action_probability=args.repeat_action_probability,
        max_num_frames_per_episode=108_000,  # half an hour of play, then the game is truncated
        episodic_life=False,  # it would start a new game at every lost life
        reward_clipping=False, life_loss_info=False, use_fire_reset=False)  # train() does these
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)  # last 100 games


# obs and next_obs uint8 (B, 4, 84, 84); actions int64, rewards float32, terminations bool (B,)
Batch = namedtuple("Batch", "obs actions rewards next_obs terminations")


class ReplayBuffer:
    """A ring of single frames, which are stacked when they are sampled: 1,000,000 transitions take
    7.06 GB; as stacks they would take 28.2 GB, as pairs of stacks 56.4 GB.
    A slot holds one step of each of N games: the newest frame of the observation, the action taken,
    what came of it, and `over`: whether this frame is its game's last. The next slot holds the next
    frame. A game of 3 frames (`terminations` is set in slot 1, whose action ended it), and another:

        slot    0  1  2  3  4     Slot 2 is no transition: d is another game's. Nor is slot 4 yet:
        frame   a  b  c  d  e     its next frame is to come. The observation of slot 4 is
        over          x           (blank, blank, d, e): frames up to an `over` are not its own"""

    def __init__(self, capacity: int, num_envs: int, device: str = "cpu"):
        self.slots, self.num_envs = shape = (capacity // num_envs, num_envs)
        self.frames = torch.zeros((*shape, 84, 84), dtype=torch.uint8, device=device)
        self.actions = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(shape, device=device)  # float32
        self.terminations = torch.zeros(shape, dtype=torch.bool, device=device)
        self.over = torch.ones(shape, dtype=torch.bool, device=device)  # unwritten: shown as blank
        self.position, self.size = 0, 0  # slot to write next; slots written

    def __len__(self) -> int:
        """Steps to draw from: not the newest slot's nor, in a full ring, the 3 oldest slots'."""
        return max(0, min(self.size - 1, self.slots - 4)) * self.num_envs

    def add(self, frames, actions, rewards, terminations, over) -> None:
        """Write one slot: frames uint8 (N, 84, 84), the others (N,)."""
        self.frames[self.position] = torch.as_tensor(frames)
        self.actions[self.position] = torch.as_tensor(actions)
        self.rewards[self.position] = torch.as_tensor(rewards)
        self.terminations[self.position] = torch.as_tensor(terminations)
        self.over[self.position] = torch.as_tensor(over)
        self.position = (self.position + 1) % self.slots
        self.size = min(self.size + 1, self.slots)

    def end_games(self) -> None:
        """All games begin anew in the next slot: the newest frame is its game's last."""
        self.over[self.position - 1] = True

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement, while there are any: len(self) > 0."""
        # A slot with `over` is no transition; few have it. Draw more than 2 B, sort the `over` ones
        # to the end, keep the first B: to draw again in a loop would make the CPU wait for the GPU.
        device = self.frames.device
        draws = 2 * batch_size + 32
        age = torch.randint(len(self) // self.num_envs, (draws,), device=device)
        slot = (self.position - 2 - age) % self.slots
        game = torch.randint(self.num_envs, (draws,), device=device)
        kept = self.over[slot, game].argsort()[:batch_size]
        slot, game = slot[kept], game[kept]  # (B,)
        # The 4 frames and the next one, as rows: index_select is faster than frames[window, game].
        window = (slot[:, None] + torch.arange(-3, 2, device=device)) % self.slots  # (B, 5)
        rows = window * self.num_envs + game[:, None]  # (B, 5)
        stack = self.frames.flatten(0, 1).index_select(0, rows.flatten()).view(-1, 5, 84, 84)
        for i in range(3):  # over at frame i: frames up to i aren't this game's
            stack[:, : i + 1] *= ~self.over[window[:, i], game][:, None, None, None]
        return Batch(stack[:, :4], self.actions[slot, game].long(), self.rewards[slot, game],
                     stack[:, 1:], self.terminations[slot, game])

    def load_state_dict(self, state: dict) -> None:
        """Add the slots of another ring of N games, oldest first; state is its vars()."""
        for i in range(state["position"] - state["size"], state["position"]):  # < 0: from the end
            self.add(state["frames"][i], state["actions"][i], state["rewards"][i],
                     state["terminations"][i], state["over"][i])


class QNetwork(nn.Module):
    """Observations uint8 (B, 4, 84, 84) to the value of each action, float (B, A) [Mnih 2015]."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),  # (B, 32, 20, 20)
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),  # (B, 64, 9, 9)
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),  # (B, 64, 7, 7)
            nn.Flatten(),  # (B, 3136)
            nn.Linear(3136, 512), nn.ReLU(),  # (B, 512)
            nn.Linear(512, num_actions))  # (B, A)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.network(obs.to(memory_format=torch.channels_last) / 255.0)


def linear_schedule(start_e: float, end_e: float, duration: int, t: int) -> float:
    """Epsilon at step t: from start_e to end_e in `duration` steps, then end_e."""
    return start_e + (end_e - start_e) * min(t / duration, 1.0)


def select_actions(q_values, epsilon, steps_in_life, action_set, rng) -> np.ndarray:
    """Epsilon-greedy actions (N,) from q_values (N, A); but FIRE, if the action_set has it, in the
    first two steps of a life, by steps_in_life (N,). Nature: no such rule. Breakout waits for FIRE,
    forever if need be, and a sticky action may swallow one of the two."""
    num_envs, num_actions = q_values.shape
    explore = rng.random(num_envs) < epsilon
    actions = np.where(explore, rng.integers(num_actions, size=num_envs), q_values.argmax(1))
    if ale_py.Action.FIRE not in action_set:
        return actions
    return np.where(steps_in_life < 2, action_set.index(ale_py.Action.FIRE), actions)


def td_loss(q_network, target_network, batch: Batch, gamma: float, double_q: bool = False):
    """The Huber loss of the temporal-difference errors, mean over the batch, and Q(s, a) (B,)."""
    with torch.no_grad():
        next_q = target_network(batch.next_obs)  # (B, A)
        # y = r + γ (1 - terminated) max_a' Q⁻(s', a')   [Mnih 2015, Algorithm 1]
        next_value = next_q.amax(1)  # (B,)
        if double_q:
            # y = r + γ (1 - terminated) Q⁻(s', argmax_a' Q(s', a'))   [van Hasselt 2016]
            next_action = q_network(batch.next_obs).argmax(1, keepdim=True)  # (B, 1)
            next_value = next_q.gather(1, next_action).squeeze(1)  # (B,)
        td_target = batch.rewards + gamma * ~batch.terminations * next_value  # (B,)
    q_pred = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # (B,)
    # Huber's gradient is the error clipped to [-1, 1], as in the paper.
    return nn.functional.smooth_l1_loss(q_pred, td_target), q_pred


def train(args: Args, signals=()) -> Path:
    """Train until the steps are done or `signals` holds something; return the run directory.
    Bad input is a SystemExit after a line on stderr, a file that can't be written an OSError."""
    saved = args.resume and load_checkpoint(Path(args.resume, "latest.pt"), whole=True)
    total = args.total_timesteps
    if args.learning_starts >= total or args.exploration_steps > total:  # a short run: cap both
        args = dataclasses.replace(
            args, learning_starts=min(args.learning_starts, total // 10 or 1),
            exploration_steps=min(args.exploration_steps, total // 2 or 1))
    device = check(args, saved)
    torch.manual_seed(args.seed)  # for the initial weights
    envs = make_vec_env(args)
    action_set = envs.unwrapped.ale.get_action_set()
    q_network = QNetwork(len(action_set)).to(device, memory_format=torch.channels_last)  # faster
    target_network = copy.deepcopy(q_network)
    # RMSprop is Adam without momentum, but for a bias correction gone after 100 updates. Of the two
    # only Adam has a fused form, one pass over memory. Nature: centred, eps 0.01 under the root.
    betas = (0.0, 0.95) if args.optimizer == "rmsprop" else (0.9, 0.999)
    optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, betas, fused=True)
    capacity = min(args.buffer_size, total + 4 * args.num_envs)  # 4 slots are not drawn
    buffer = ReplayBuffer(capacity, args.num_envs, device)
    step = saved["global_step"] if saved else 0
    if saved:
        q_network.load_state_dict(saved["model"])
        target_network.load_state_dict(saved["target"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        optimizer.param_groups[0]["lr"] = args.learning_rate  # may be given anew
        if saved["replay"]:
            buffer.load_state_dict(saved["replay"])
    del saved  # all is copied; held, the mapped file would keep its disk space
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.6f}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{name}")
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # a new run never shares one
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("hyperparameters", str(args), step)
    first = step + max(args.learning_starts - (buffer.size - 1) * args.num_envs, 0)  # see __len__
    when = f"learning from step {first:,}" if first < total else "too short to learn"
    say(f"{run_dir}: {args.env_id} on {device}, {when}, exploring until {args.exploration_steps:,}")

    def due(every: int) -> int:  # how many multiples of it the last N steps passed
        return step // every - (step - args.num_envs) // every

    last_step, last_time = step, time.monotonic()
    loss = q_pred = torch.zeros(1)  # until learning starts
    restart, finished = True, False
    while not finished:  # until all steps are done or a signal came
        if restart:
            # All games begin, from a hash of (seed, step): nothing of their state need be saved.
            seed = int(np.random.SeedSequence((args.seed, step)).generate_state(1)[0] >> 2)
            torch.manual_seed(seed)
            rng = np.random.default_rng(seed)
            obs, infos = envs.reset(seed=seed)  # game i takes seed + i, an int32, hence >> 2
            lives = infos["lives"]
            over = np.zeros(args.num_envs, dtype=bool)  # is obs a game's last?
            steps_in_life = np.zeros(args.num_envs, dtype=int)
            buffer.end_games()

        # act
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_steps, step)
        with torch.no_grad():
            q_values = q_network(torch.as_tensor(obs, device=device)).cpu().numpy()  # (N, A)
        actions = select_actions(q_values, epsilon, steps_in_life, action_set, rng)

        # learn, before the games are stepped: a GPU computes on while they play
        updates = due(args.train_frequency) if len(buffer) >= args.learning_starts else 0
        for _ in range(updates):
            batch = buffer.sample(args.batch_size)
            loss, q_pred = td_loss(q_network, target_network, batch, args.gamma, args.double_q)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        # step; where a game was over, the action is ignored and next_obs is the next game's first
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        life_lost = (infos["lives"] < lives) & ~over  # over: lives of a new game, maybe fewer
        step += args.num_envs
        finished = step >= total or bool(signals)

        # store; a truncated game is not terminal: it could have gone on, so its target still has
        # the value of next_obs. `over` is still that of obs: whether obs was its game's last.
        terminal = terminations | (life_lost & args.terminal_on_life_loss)
        buffer.add(obs[:, -1], actions, np.sign(rewards), terminal, over)  # rewards -1, 0 or 1
        steps_in_life = np.where(life_lost | over, 0, steps_in_life + 1)
        over = terminations | truncations
        lives = infos["lives"]
        obs = next_obs
        # sync: Q⁻ becomes a copy of Q
        if due(args.target_network_frequency):
            target_network.load_state_dict(q_network.state_dict())

        # report
        for i in np.flatnonzero(infos.get("_episode", [])):
            writer.add_scalar("charts/episodic_return", infos["episode"]["r"][i], step)
            writer.add_scalar("charts/episodic_length", infos["episode"]["l"][i], step)
        save = finished or due(args.checkpoint_frequency)
        restart = save and args.save_replay
        if not (save or due(10_000)):
            continue
        if not loss.isfinite():
            refuse(f"loss {loss.item()} at step {step:,}, not saved", 1)
        if save:  # first, since printing may block
            checkpoint = {"model": q_network.state_dict(), "args": vars(args), "global_step": step}
            save_checkpoint(checkpoint, run_dir / f"model_{step}.pt")
            checkpoint["target"] = target_network.state_dict()
            checkpoint["optimizer"] = optimizer.state_dict()
            checkpoint["replay"] = vars(buffer) if args.save_replay else None
            save_checkpoint(checkpoint, run_dir / "latest.pt")
        sps = (step - last_step) / (time.monotonic() - last_time)
        last_step, last_time = step, time.monotonic()
        writer.add_scalar("charts/SPS", sps, step)
        writer.add_scalar("charts/epsilon", epsilon, step)
        writer.add_scalar("losses/td_loss", loss.item(), step)
        writer.add_scalar("losses/q_values", q_pred.mean().item(), step)
        left = max(total - step, 0)
        returns = envs.return_queue or [np.nan]  # of the last 100 games
        say(f"step {step:,} ({1 - left / total:.1%})  SPS {sps:.0f}  "
            f"ETA {left / sps / 3600:.2f} h  epsilon {epsilon:.3f}  episodes {envs.episode_count}  "
            f"return {np.mean(returns):.1f} (max {max(returns):.0f}, last 100)  "
            f"loss {loss.item():.4f}  buffer {buffer.size / buffer.slots:.0%}")
    writer.close()
    if step < total:
        say(f"stopped; to go on: python dqn_atari.py --resume {run_dir}")
    return run_dir


# Plumbing: bad input, checkpoints, the command line
def refuse(what: str, code: int = 2):
    """One line on stderr, and out: with 2 for bad input, with 1 where a run can't go on."""
    print(f"error: {what}", file=sys.stderr)
    sys.exit(code)


def say(line: str) -> None:
    """Print; a closed pipe or a full disk behind stdout silences a run, but does not end it."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def check(args: Args, saved: dict | None) -> str:
    """Refuse what can't work here, or in the run to be resumed; return the device."""
    def require(holds: bool, name: str, hint: str) -> None:
        if not holds:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)}: {hint}")

    games = [name for name in gym.registry if name.startswith("ALE/")]  # all end in -v5
    near = difflib.get_close_matches(args.env_id, games, cutoff=0.4) or ["ALE/Breakout-v5"]
    require(args.env_id in games, "env_id", f"not one of ALE/*-v5; try {near}")
    least = {"seed": 0, "checkpoint_frequency": 4 * args.num_envs,  # at most a restart in 4 slots
             "buffer_size": args.learning_starts + 5 * args.num_envs}  # 4 slots undrawn, 1 rounding
    for name, value in vars(args).items():
        if type(value) is int:
            low = least.get(name, 1)
            require(low <= value < 2**32, name, f"must be from {low} to 2**32 - 1")
        if type(value) is float:
            require(0 <= value <= 1, name, "must be from 0 to 1")
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best.type if args.device == "auto" else args.device
    require(device in ("cpu", best.type), "device", f"best here is {best.type}")
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else sys.maxsize
    if device == "cpu" and sys.platform == "linux":
        free = 1024 * int(Path("/proc/meminfo").read_text().split()[7])  # MemAvailable
    held = min(args.buffer_size, args.total_timesteps)
    require(held * 7063 <= free, "buffer_size", f"{device} has memory for {free // 7063}")
    if saved:
        for name in ["env_id", "optimizer"] + ["num_envs"] * bool(saved["replay"]):
            old = getattr(saved["args"], name)
            require(getattr(args, name) == old, name, f"{args.resume} has {old}")
        require(args.total_timesteps > saved["global_step"], "total_timesteps", "done already")
    return device


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write to another name, then rename: a kill leaves the old file or the new one."""
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides the system's error in its own
        partial.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: {reason}; to go on: python dqn_atari.py --resume {path.parent}")


def load_checkpoint(path: Path | str, whole: bool = False) -> dict:
    """What train() saved, on the CPU, its args as Args; refuse what is damaged or not `whole`."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        needed = {"target", "optimizer", "replay"} if whole else set()
        missing = needed - set(saved) | set(vars(Args())) - set(saved["args"])
        if missing:
            raise ValueError(f"without {missing}")
        if not all(weight.isfinite().all() for weight in saved["model"].values()):
            raise ValueError("weights not finite")
        return saved | {"args": Args(**saved["args"]), "global_step": int(saved["global_step"])}
    except Exception as error:  # torch.load has a dozen ways to say it
        refuse(f"{path}: no whole checkpoint of this version: {error!r}")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume is not None:  # the saved options are the defaults then
        args = tyro.cli(Args, default=load_checkpoint(Path(args.resume, "latest.pt"))["args"])
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: signals.append(number))
    threading.excepthook = lambda error: None  # TensorBoard's thread; train() gets its error, too
    try:
        train(args, signals)
        sys.exit(128 + signals[0] if signals else 0)
    except OSError as error:  # a full disk, a place that can't be written
        refuse(str(error), 1)
