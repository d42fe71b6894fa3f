"""DQN that plays Atari from pixels, in one file.

    python dqn_atari.py --env-id ALE/Breakout-v5     # train; --help lists every option
    python dqn_atari.py --resume runs/<run>          # go on where a run was stopped
    python evaluate.py runs/<run>/model_<step>.pt    # play whole games with what was learnt

The algorithm is that of [Mnih 2015], "Human-level control through deep reinforcement learning"
(doi:10.1038/nature14236); --double-q makes it Double DQN, [van Hasselt 2016] (arXiv:1509.06461).
Differences from the former are marked `Nature:`, and listed in the README. A step is an agent step:
one action in one game, 4 frames. N games are stepped at once, so a vector step is N steps.

In reading order: Args; make_env and make_vec_env, what the network sees; ReplayBuffer; QNetwork;
linear_schedule, select_actions, td_loss; bad input; checkpoints; train, the loop.
"""

import copy
import dataclasses
import difflib
import os
import signal
import sys
import time
from collections import deque, namedtuple
from pathlib import Path
from typing import Literal, NoReturn

import ale_py
import cv2
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
    device: str = "auto"  # cpu, cuda, mps or auto: cuda, else mps, else cpu
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
    buffer_size: int = 1_000_000  # transitions in the replay buffer, 7,063 bytes each
    learning_starts: int = 50_000  # steps to collect before learning starts
    batch_size: int = 32  # transitions per gradient step
    train_frequency: int = 4  # steps per gradient step
    gamma: float = 0.99  # discount factor per step
    target_network_frequency: int = 10_000  # steps between syncs (Nature: 10,000 gradient steps)
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # rmsprop, as in Nature, or adam
    learning_rate: float = 2.5e-4  # of the optimizer; 1e-4 is usual for adam
    start_e: float = 1.0  # epsilon, the chance of a random action, at the start
    end_e: float = 0.1  # epsilon at the end of exploration and from then on
    exploration_steps: int = 1_000_000  # steps in which epsilon falls from start_e to end_e
    double_q: bool = False  # the next action is the online network's choice, not the target's


class AtariPreprocessing(gym.Wrapper):
    """For one game what ALE's vector environment does in C++ (see make_vec_env), to the last pixel:
    no-ops at the start, each action held for 4 frames, the maximum of the last two (the Atari draws
    some sprites in every other frame only), 84 x 84 in grayscale."""

    def __init__(self, env: gym.Env, noop_max: int, max_episode_frames: int):
        super().__init__(env)
        self.noop_max, self.max_episode_frames = noop_max, max_episode_frames
        self.observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)

    def reset(self, *, seed=None, options=None):
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.np_random.integers(max(self.noop_max, 1))):  # 0 to 29; Nature: to 30
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
        self.elapsed_frames = 0
        self.frames = [np.zeros_like(frame), frame]  # the last but one and the last
        return self._observation(), info

    def step(self, action):
        total_reward = 0.0
        for i in range(4):
            frame, reward, terminated, _, info = self.env.step(action)
            total_reward += reward
            self.elapsed_frames += 1
            truncated = self.elapsed_frames >= self.max_episode_frames and not terminated
            if terminated or truncated:
                break  # as in ALE, the frame on which a game ends is not shown
            if i >= 2:
                self.frames[i - 2] = frame
        return self._observation(), total_reward, terminated, truncated, info

    def _observation(self):
        self.frames[-1] = np.maximum(*self.frames)  # as in ALE: a game's ending shows it again
        return cv2.resize(self.frames[-1], (84, 84), interpolation=cv2.INTER_AREA)


def make_env(env_id: str, *, repeat_action_probability=0.25, noop_max=30,
             max_episode_frames=108_000, render_mode=None) -> gym.Env:
    """One game, to film or copy, not to train on: observations uint8 (4, 84, 84), raw rewards."""
    # ALE/*-v5 skips frames by itself, and has a frame limit: 1 and 0 leave both to the wrapper.
    env = gym.make(env_id, frameskip=1, max_num_frames_per_episode=0, obs_type="grayscale",
                   repeat_action_probability=repeat_action_probability, render_mode=render_mode)
    env = AtariPreprocessing(env, noop_max, max_episode_frames)
    return gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")


def make_vec_env(args: Args) -> gym.vector.VectorEnv:
    """N games in ALE's C++ threads, to train on: observations uint8 (N, 4, 84, 84), raw rewards.

    The step after a game ended ignores its action, and shows the next game's first observation.
    """
    envs = gym.make_vec(
        args.env_id, args.num_envs, vectorization_mode="vector_entry_point",
        noop_max=30, repeat_action_probability=args.repeat_action_probability,
        frameskip=4, stack_num=4, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
        max_num_frames_per_episode=108_000,  # half an hour of play, then the game is truncated
        reward_clipping=False,  # returns are reported raw; train() clips the rewards it stores
        episodic_life=False,  # it would start a new game at every lost life
        life_loss_info=False,  # train() reads infos["lives"]
        use_fire_reset=False,  # select_actions() presses FIRE
    )
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


# obs and next_obs uint8 (B, 4, 84, 84); actions int64, rewards float32, terminations bool (B,)
Batch = namedtuple("Batch", "obs actions rewards next_obs terminations")


class ReplayBuffer:
    """A ring of single frames, which are stacked when they are sampled.

    A slot holds one step of each of N games: the newest frame of the observation, the action taken
    in it, what came of it, and whether the game was over there, so that no action counted. The next
    frame is in the next slot. One game, its frames numbered, a game ending with frame 3:

        slot          0    1    2    3    4    5
        frame         1    2    3    4    5    6
        over          .    .    x    .    .    .       slot 2 is no transition: 4 is of another game
        obs in 4: the stack of slots 1 to 4, blank up to the game's last frame: (0, 0, 4, 5)

    Storing each frame once takes 7.06 GB for 1,000,000 transitions (7,063 bytes each); stacks would
    take 28.2 GB, and pairs of them 56.4 GB.
    """

    def __init__(self, capacity: int, num_envs: int, device: str = "cpu"):
        self.slots = capacity // num_envs
        self.num_envs = num_envs
        shape = (self.slots, num_envs)
        self.frames = torch.zeros((*shape, 84, 84), dtype=torch.uint8, device=device)
        self.actions = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(shape, dtype=torch.float32, device=device)
        self.terminations = torch.zeros(shape, dtype=torch.bool, device=device)
        self.over = torch.ones(shape, dtype=torch.bool, device=device)
        self.position = 0  # the slot to be written next
        self.size = 0  # how many were written

    def __len__(self) -> int:
        """How many steps can be drawn: not the newest, whose next frame is still to come, nor the
        four oldest slots of the ring, the first of which is the one to be written next."""
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
        """All games begin anew in the slot to be written next."""
        self.over[self.position - 1] = True

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement, while there are any: len(self) > 0."""
        device = self.frames.device
        # A game's last frame is no transition, but may be drawn. So draw more than are needed, sort
        # the transitions to the front (False before True), keep the first: no loop, no waiting.
        draws = 2 * batch_size + 32
        age = torch.randint(len(self) // self.num_envs, (draws,), device=device)
        slot = (self.position - 2 - age) % self.slots
        game = torch.randint(self.num_envs, (draws,), device=device)
        kept = self.over[slot, game].argsort(stable=True)[:batch_size]
        slot, game = slot[kept], game[kept]  # (B,)

        # The 4 frames of the observation and the next one, as rows of the frames laid end to end:
        # index_select takes rows ten times as fast as frames[slots, games].
        slots = (slot[:, None] + torch.arange(-3, 2, device=device)) % self.slots  # (B, 5)
        rows = slots * self.num_envs + game[:, None]  # (B, 5)
        frames = self.frames.flatten(0, 1).index_select(0, rows.flatten()).view(-1, 5, 84, 84)
        for i in range(3):  # a game that was over at frame i: it and those before are not ours
            frames[:, : i + 1] *= ~self.over[slots[:, i], game][:, None, None, None]
        return Batch(
            obs=frames[:, :4],
            actions=self.actions[slot, game].long(),
            rewards=self.rewards[slot, game],
            next_obs=frames[:, 1:],
            terminations=self.terminations[slot, game],
        )

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        """Take over what another ring of N games holds, oldest first."""
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
            nn.Linear(512, num_actions),  # (B, A)
        )

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.network(obs.to(memory_format=torch.channels_last) / 255.0)


def linear_schedule(start_e: float, end_e: float, duration: int, t: int) -> float:
    """Epsilon at step t: from start_e to end_e in `duration` steps, then end_e."""
    return start_e + (end_e - start_e) * min(t / duration, 1.0)


def find_fire(envs: gym.vector.VectorEnv) -> int | None:
    """The action FIRE, None in a game without it."""
    actions = envs.unwrapped.ale.get_action_set()
    return actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else None


def select_actions(q_values, epsilon, steps_in_life, fire, rng) -> np.ndarray:
    """Epsilon-greedy actions (N,) from q_values (N, A), but FIRE where a life is less than two
    steps old, by steps_in_life (N,). Nature: no such rule. Breakout waits for FIRE, forever if need
    be, and a sticky action may swallow one of the two."""
    num_envs, num_actions = q_values.shape
    explore = rng.random(num_envs) < epsilon
    actions = np.where(explore, rng.integers(num_actions, size=num_envs), q_values.argmax(1))
    return actions if fire is None else np.where(steps_in_life < 2, fire, actions)


def td_loss(q_network, target_network, batch: Batch, gamma: float, double_q: bool = False):
    """The Huber loss of the temporal-difference errors, mean over the batch, and Q(s, a) (B,)."""
    # y = r + γ (1 - terminated) max_a' Q⁻(s', a')   [Mnih 2015, Algorithm 1]
    # or, for the maximum, Q⁻(s', argmax_a' Q(s', a'))   [van Hasselt 2016]; Q⁻: target_network
    with torch.no_grad():
        next_q = target_network(batch.next_obs)  # (B, A)
        next_actions = (q_network(batch.next_obs) if double_q else next_q).argmax(1)  # (B,)
        next_value = next_q.gather(1, next_actions[:, None]).squeeze(1)  # (B,)
        td_target = batch.rewards + gamma * (~batch.terminations) * next_value  # (B,)
    q_pred = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # (B,)
    # Huber's gradient is the error clipped to [-1, 1], as in the paper.
    return nn.functional.smooth_l1_loss(q_pred, td_target), q_pred


def refuse(problem: str) -> NoReturn:
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def devices() -> dict[str, int]:
    """The devices there are, the best one last, and the bytes of memory to be had on each."""
    host = sys.maxsize  # outside Linux: not known, so no limit
    if sys.platform == "linux":
        host = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    mps = {"mps": host} if torch.backends.mps.is_available() else {}
    cuda = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    return {"cpu": host} | mps | cuda


def check(args: Args, learning_starts: int, device: str, saved: dict | None) -> None:
    """Refuse options that cannot work, here or with the checkpoint that is to be resumed."""
    games = [name for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5")]
    near = difflib.get_close_matches(args.env_id, games, cutoff=0.4) or ["ALE/Breakout-v5"]
    least = max(args.batch_size, learning_starts + 5 * args.num_envs)  # __len__, and rounding
    here = devices()
    counts = ("total_timesteps", "num_envs", "checkpoint_frequency", "buffer_size", "batch_size",
              "learning_starts", "train_frequency", "target_network_frequency", "exploration_steps")
    shares = ("repeat_action_probability", "gamma", "learning_rate", "start_e", "end_e")
    rules = [(name, getattr(args, name) >= 1, "must be at least 1") for name in counts]
    rules += [(name, 0 <= getattr(args, name) <= 1, "must be from 0 to 1") for name in shares]
    rules += [
        ("env_id", args.env_id in games, f"not one of ALE/*-v5; near it: {', '.join(near)}"),
        ("seed", 0 <= args.seed < 2**32, "must be from 0 to 2**32 - 1"),
        ("checkpoint_frequency", args.checkpoint_frequency > args.num_envs, "needs > --num-envs"),
        ("device", device in here, f"not available; there is {', '.join(here)}"),
        ("buffer_size", args.buffer_size >= least,
         f"--batch-size and --learning-starts need at least {least}"),
        ("buffer_size", min(args.buffer_size, args.total_timesteps) * 7063 <= here.get(device, 0),
         f"{device} has memory for {here.get(device, 0) // 7063}, at 7,063 bytes each"),
    ]
    if saved:
        done, fixed = saved["global_step"], ["env_id", "optimizer"]
        fixed += ["num_envs", "buffer_size"] if saved["replay"] else []
        rules += [(name, getattr(args, name) == getattr(saved["args"], name),
                   f"{args.resume} has {getattr(saved['args'], name)}") for name in fixed]
        rules += [("total_timesteps", args.total_timesteps > done, f"{done} are done already")]
    for name, holds, hint in rules:
        if not holds:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)}: {hint}")


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write to another name, then rename: a kill leaves the old file or the new one."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path | str) -> dict:
    """What train() saved, on the CPU, its args as Args; refuses what is missing or not ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint | {"args": Args(**checkpoint["args"])}
    except Exception as error:  # torch.load has a dozen ways to say it
        refuse(f"{path}: no whole checkpoint, {type(error).__name__} (--resume: a run directory)")


def train(args: Args, signals=()) -> Path:
    """Train until the steps are done or `signals` has something in it; return the run directory."""
    device = [*devices()][-1] if args.device == "auto" else args.device
    saved = load_checkpoint(Path(args.resume, "latest.pt")) if args.resume else None
    total, num_envs = args.total_timesteps, args.num_envs
    learning_starts, exploration_steps = args.learning_starts, args.exploration_steps
    if learning_starts >= total or exploration_steps > total:  # no room to learn in
        learning_starts = min(learning_starts, total // 10 or 1)
        exploration_steps = min(exploration_steps, total // 2 or 1)
    check(args, learning_starts, device, saved)

    torch.manual_seed(args.seed)  # for the initial weights
    envs = make_vec_env(args)
    num_actions, fire = int(envs.single_action_space.n), find_fire(envs)
    q_network = QNetwork(num_actions).to(device, memory_format=torch.channels_last)  # is faster
    target_network = copy.deepcopy(q_network)
    # RMSprop is Adam without momentum, in one pass over memory where torch's own takes a dozen
    # (Adam's bias correction, which RMSprop has not, is gone after 100 steps).
    # Nature: centred, and eps 0.01 under the root, with which nothing was learnt in 400,000 steps.
    betas = (0.0, 0.95) if args.optimizer == "rmsprop" else (0.9, 0.999)
    optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, betas, fused=True)
    buffer = ReplayBuffer(min(args.buffer_size, total + 4 * num_envs), num_envs, device)
    step = saved["global_step"] if saved else 0
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{name}")
    if saved:
        q_network.load_state_dict(saved["model"])
        target_network.load_state_dict(saved["target_network"])
        groups = optimizer.state_dict()["param_groups"]  # with the learning rate of this run
        optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
        if saved["replay"]:
            buffer.load_state_dict(saved["replay"])
        else:
            print(f"no saved replay: {learning_starts} steps to refill it, then learning")
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("hyperparameters", str(args), step)
    print(f"{run_dir}: {args.env_id} on {device}, {learning_starts=}, {exploration_steps=}")

    def due(every: int) -> int:
        """How many multiples of `every` the last vector step reached: in (step - N, step]."""
        return step // every - (step - num_envs) // every

    def restart():
        """Begin all games and seed all generators from (seed, step): none of them need be saved."""
        seed = int(np.random.SeedSequence((args.seed, step)).generate_state(1)[0] >> 2)
        torch.manual_seed(seed)
        obs, infos = envs.reset(seed=seed)  # game i takes seed + i, an int32
        buffer.end_games()
        over, steps_in_life = np.zeros(num_envs, dtype=bool), np.zeros(num_envs, dtype=int)
        return np.random.default_rng(seed), obs, infos["lives"], over, steps_in_life

    rng, obs, lives, over, steps_in_life = restart()
    returns, episodes, loss, finished = deque(maxlen=100), 0, None, False
    last_step, last_time = step, time.monotonic()
    while not finished:
        # act
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, step)
        with torch.no_grad():
            q_values = q_network(torch.as_tensor(obs, device=device)).cpu().numpy()  # (N, A)
        actions = select_actions(q_values, epsilon, steps_in_life, fire, rng)

        # learn: a GPU does it while the games are stepped
        updates = due(args.train_frequency) if len(buffer) >= learning_starts else 0
        for _ in range(updates):
            batch = buffer.sample(args.batch_size)
            loss, q_pred = td_loss(q_network, target_network, batch, args.gamma, args.double_q)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        # step: where obs is a game's last (over), the action is ignored and next_obs starts a game
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        life_lost = (infos["lives"] < lives) & ~over
        step += num_envs

        # store: a row for a game's last frame, too, which sample() leaves out
        terminal = terminations | (life_lost & args.terminal_on_life_loss)
        buffer.add(obs[:, -1], actions, np.sign(rewards), terminal, over)
        steps_in_life = np.where(life_lost | over, 0, steps_in_life + 1)
        obs, lives, over = next_obs, infos["lives"], terminations | truncations

        # sync
        if due(args.target_network_frequency):
            target_network.load_state_dict(q_network.state_dict())

        # report
        finished = step >= total or bool(signals)
        for i in np.flatnonzero(infos.get("_episode", [])):
            episodes += 1
            returns.append(infos["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", infos["episode"]["r"][i], step)
            writer.add_scalar("charts/episodic_length", infos["episode"]["l"][i], step)
        if due(10_000) or finished:
            sps = (step - last_step) / (time.monotonic() - last_time)
            last_step, last_time = step, time.monotonic()
            writer.add_scalar("charts/SPS", sps, step)
            writer.add_scalar("charts/epsilon", epsilon, step)
            if loss is not None:
                writer.add_scalar("losses/td_loss", loss.item(), step)
                writer.add_scalar("losses/q_values", q_pred.mean().item(), step)
            print(f"step {step:,} ({step / total:.1%})  SPS {sps:.0f}  "
                  f"ETA {(total - step) / sps / 3600:.2f} h  epsilon {epsilon:.3f}  "
                  f"episodes {episodes}  return {np.mean(returns or [np.nan]):.1f} "
                  f"(max {max(returns, default=np.nan):.0f}, last 100)  "
                  f"loss {np.nan if loss is None else loss.item():.4f}  "
                  f"buffer {buffer.size / buffer.slots:.0%}", flush=True)
        if due(args.checkpoint_frequency) or finished:
            checkpoint = {"model": q_network.state_dict(), "args": vars(args), "global_step": step}
            save_checkpoint(checkpoint, run_dir / f"model_{step}.pt")
            checkpoint |= {"target_network": target_network.state_dict(),
                           "optimizer": optimizer.state_dict(),
                           "replay": buffer.state_dict() if args.save_replay else None}
            save_checkpoint(checkpoint, run_dir / "latest.pt")
            if args.save_replay and not finished:
                rng, obs, lives, over, steps_in_life = restart()

    envs.close()
    writer.close()
    return run_dir


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume:  # the saved options are the defaults then
        args = tyro.cli(Args, default=load_checkpoint(Path(args.resume, "latest.pt"))["args"])
    signals = []
    for signum in (signal.SIGINT, signal.SIGTERM):  # finish the step and save, then exit
        signal.signal(signum, lambda number, frame: signals.append(number))
    run_dir = train(args, signals)
    if signals:
        print(f"stopped; to go on: python dqn_atari.py --resume {run_dir}")
        sys.exit(128 + signals[0])
