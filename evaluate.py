# SPDX-License-Identifier: MIT
"""Play whole games with saved checkpoints, and report their raw scores.

    python evaluate.py runs/<run>/model_<step>.pt                     # 10 games, greedy
    python evaluate.py runs/<run>/model_*.pt                          # a table: the learning curve
    python evaluate.py runs/<run>/model_<step>.pt --video game.webm   # film one more game

Beside the scores stand the mean Q-value that was predicted at the states played and the mean
discounted, clipped return that really followed them, which is how van Hasselt et al. 2016
(arXiv:1509.06461) measure overestimation. Runs on the CPU. What was played is not lost: the table
and --json hold every finished checkpoint, after Ctrl-C, too."""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro

from dqn_atari import QNetwork, load_checkpoint, make_env, make_vec_env, refuse, select_actions

Paths = Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHECKPOINT ...")]
CODECS = {".webm": "VP80", ".mp4": "mp4v"}  # browsers play the one, desktop players the other


@dataclasses.dataclass
class Options:
    """Play whole games with saved checkpoints, and report their raw scores."""
    checkpoints: tyro.conf.Positional[Paths]  # model_<step>.pt or latest.pt of a run, one or more
    episodes: int = 10  # whole games to play with each checkpoint
    epsilon: float = 0.0  # chance of a random action; 0 is greedy
    seed: int = 1  # of the games and of the random actions
    repeat_action_probability: float | None = None  # sticky actions; None: as in training
    video: str | None = None  # film one more game to this .webm, .mp4 or .webp (an animation)
    json: str | None = None  # write all results, the single games too, to this file


def load(path: str, options: Options) -> dict:
    """A checkpoint with its network, and with its args as they are to be played."""
    checkpoint = load_checkpoint(path)
    args = checkpoint["args"]
    if options.repeat_action_probability is not None:
        args.repeat_action_probability = options.repeat_action_probability
    args.num_envs = min(options.episodes, 16)
    try:
        if not (0 <= args.repeat_action_probability <= 1 and 0 <= args.gamma <= 1):
            raise ValueError("repeat_action_probability or gamma is not from 0 to 1")
        one_game = make_vec_env(dataclasses.replace(args, num_envs=1))
        network = QNetwork(int(one_game.single_action_space.n))
        network.to(memory_format=torch.channels_last).load_state_dict(checkpoint["model"])
    except (gym.error.Error, RuntimeError, TypeError, ValueError) as error:
        refuse(f"{path}: holds no network for the actions of {args.env_id}: {error!r}")
    return checkpoint | {"path": path, "network": network}


@torch.no_grad()
def play(checkpoint: dict, options: Options) -> tuple[list[dict], list[dict]]:
    """Play options.episodes whole games; returns the games, and what was seen at every step. The
    games are dealt evenly to those played side by side: had the first to end been counted, short
    games would be too many."""
    args = checkpoint["args"]
    envs = make_vec_env(args)
    action_set = envs.unwrapped.ale.get_action_set()
    rng = np.random.default_rng(options.seed)
    obs, infos = envs.reset(seed=options.seed)
    lives = infos["lives"]
    over = np.zeros(args.num_envs, dtype=bool)
    steps_in_life = np.zeros(args.num_envs, dtype=int)
    each, more = divmod(options.episodes, args.num_envs)
    due = each + (np.arange(args.num_envs) < more)  # games still to be played, (N,)
    games, steps = [], []
    while due.any():
        q_values = checkpoint["network"](torch.as_tensor(obs)).numpy()
        actions = select_actions(q_values, options.epsilon, steps_in_life, action_set, rng)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        life_lost = (infos["lives"] < lives) & ~over
        ended = terminations | truncations
        steps.append({"predicted": q_values.max(1), "reward": np.sign(rewards),
                      "life_ends": ended | (life_lost & args.terminal_on_life_loss),
                      "counted": (due > 0) & ~over})
        for i in np.flatnonzero(ended & (due > 0)):
            due[i] -= 1
            score, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            games.append({"return": score, "length": length, "capped": bool(truncations[i])})
            capped = ", stopped at the frame cap" if truncations[i] else ""
            print(f"  game {len(games)}: {score:g} in {length} steps{capped}", flush=True)
        steps_in_life = np.where(life_lost | over, 0, steps_in_life + 1)
        lives = infos["lives"]
        over = ended
    envs.close()
    return games, steps


def overestimation(steps: list[dict], gamma: float) -> dict:
    """The mean Q-value predicted at the states played, and the mean return that followed them, up
    to the end of a life: discounted, of clipped rewards."""
    realised = []
    following = 0.0  # (N,), the return from the step after
    for step in reversed(steps):
        following = step["reward"] + gamma * ~step["life_ends"] * following
        realised.extend(following[step["counted"]])
    predicted = np.concatenate([step["predicted"][step["counted"]] for step in steps])
    return {"predicted_q": float(np.mean(predicted)), "realised_return": float(np.mean(realised))}


def evaluate(checkpoint: dict, options: Options) -> dict:
    """Scores, statistics and the protocol of one loaded checkpoint, JSON-ready."""
    args = checkpoint["args"]
    games, steps = play(checkpoint, options)
    scores = np.array([game["return"] for game in games])
    random, human = RANDOM_AND_HUMAN.get(args.env_id[4:-3], (np.nan, np.nan))
    normalised = (scores.mean() - random) / (human - random)
    return {
        "checkpoint": checkpoint["path"], "global_step": checkpoint["global_step"],
        "env_id": args.env_id, "repeat_action_probability": args.repeat_action_probability,
        "epsilon": options.epsilon, "seed": options.seed,
        "episodes": len(games), "capped": sum(game["capped"] for game in games),
        "mean": scores.mean(), "std": scores.std(), "median": float(np.median(scores)),
        "min": scores.min(), "max": scores.max(),
        "human_normalised": None if np.isnan(normalised) else normalised,
        **overestimation(steps, args.gamma), "games": games}


def table(results: list[dict]) -> str:
    """A row per checkpoint."""
    lines = [f"{'step':>12} {'games':>5}  {'mean ± std':>19} {'median':>9} {'min':>9} {'max':>9} "
             f"{'capped':>6} {'human':>7} {'Q predicted':>11} {'realised':>8}"]
    for r in results:
        human = "-" if r["human_normalised"] is None else f"{r['human_normalised']:.1%}"
        spread = f"{r['mean']:.2f} ± {r['std']:.2f}"
        lines.append(f"{r['global_step']:>12,} {r['episodes']:>5}  {spread:>19} {r['median']:>9g} "
                     f"{r['min']:>9g} {r['max']:>9g} {r['capped']:>6} {human:>7} "
                     f"{r['predicted_q']:>11.3f} {r['realised_return']:>8.3f}")
    return "\n".join(lines)


def draw(frame, q_values, action, action_set, text) -> np.ndarray:
    """A frame RGB (H, 160, 3), doubled, and a bar per action beside it: BGR (2 H, 560, 3)."""
    doubled = frame[:, :, ::-1].repeat(2, axis=0).repeat(2, axis=1)
    picture = np.pad(doubled, ((0, 0), (0, 240), (0, 0)), constant_values=24)
    font, white, grey, green = cv2.FONT_HERSHEY_SIMPLEX, (255,) * 3, (110,) * 3, (60, 150, 60)
    cv2.putText(picture, text, (332, 24), font, 0.5, white, 1, cv2.LINE_AA)
    low, high = min(q_values.min(), 0.0), max(q_values.max(), 1e-6)
    pitch = min(40, 370 // len(q_values))
    for i, (value, button) in enumerate(zip(q_values, action_set)):
        top, colour = 44 + i * pitch, green if i == action else grey
        right = 420 + int(130 * (value - low) / (high - low))
        cv2.rectangle(picture, (420, top), (max(right, 421), top + pitch // 2), colour, -1)
        cv2.putText(picture, button.name, (332, top + 12), font, 0.36, colour, 1, cv2.LINE_AA)
        cv2.putText(picture, f"{value:.2f}", (424, top + 12), font, 0.36, white, 1, cv2.LINE_AA)
    return picture


@torch.no_grad()
def pictures(checkpoint: dict, options: Options):
    """Play one game in make_env's wrappers; yields a picture (BGR) and the score at every step."""
    args = checkpoint["args"]
    sticky = args.repeat_action_probability
    env = make_env(args.env_id, repeat_action_probability=sticky, render_mode="rgb_array")
    action_set = env.unwrapped.ale.getMinimalActionSet()
    rng = np.random.default_rng(options.seed)
    obs, info = env.reset(seed=options.seed)
    score = 0.0
    steps_in_life = np.zeros(1, dtype=int)
    terminated = truncated = False
    while not terminated and not truncated:
        q_values = checkpoint["network"](torch.as_tensor(obs)[None]).numpy()  # (1, A)
        action = select_actions(q_values, options.epsilon, steps_in_life, action_set, rng)[0]
        text = f"score {score:g}   lives {info['lives']}"
        picture = draw(env.render(), q_values[0], action, action_set, text)
        lives = info["lives"]
        obs, reward, terminated, truncated, info = env.step(action)
        score += reward
        steps_in_life = np.zeros(1, dtype=int) if info["lives"] < lives else steps_in_life + 1
        yield picture, score


def film(checkpoint: dict, options: Options) -> None:
    """Write a game as a video, at the game's own speed; as .webp its first 15 s, at half size."""
    played = pictures(checkpoint, options)
    if options.video.endswith(".webp"):
        animation = cv2.Animation()
        shown = list(itertools.islice(played, 0, 225, 2))  # of 15 pictures a second every other one
        animation.frames = [cv2.resize(picture, None, fx=0.5, fy=0.5) for picture, _ in shown]
        animation.durations = np.full(len(shown), 133)  # milliseconds
        cv2.imwriteanimation(options.video, animation, [cv2.IMWRITE_WEBP_QUALITY, 60])
        print(f"{options.video}: the start of a game")
        return
    picture, _ = next(played)
    codec = cv2.VideoWriter_fourcc(*CODECS[Path(options.video).suffix])
    writer = cv2.VideoWriter(options.video, codec, 15, picture.shape[1::-1])
    writer.write(picture)
    for picture, score in played:
        writer.write(picture)
    writer.release()
    print(f"{options.video}: a game of {score:g} points")


def check(options: Options) -> None:
    """Refuse what can be refused before the first game."""
    if not options.checkpoints:
        refuse("CHECKPOINT: give at least one model_<step>.pt")
    if options.episodes < 1:
        refuse(f"--episodes {options.episodes}: must be at least 1")
    if not 0 <= options.seed < 2**31 - 16:  # game i is seeded with seed + i, an int32
        refuse(f"--seed {options.seed}: must be from 0 to 2**31 - 17")
    for name in ("epsilon", "repeat_action_probability"):
        if not 0 <= (getattr(options, name) or 0) <= 1:
            refuse(f"--{name.replace('_', '-')} {getattr(options, name)}: must be from 0 to 1")
    if options.video and Path(options.video).suffix not in (*CODECS, ".webp"):
        refuse(f"--video {options.video}: must end in .webm, .mp4 or .webp")
    for name, target in (("video", options.video), ("json", options.json)):
        if target and (Path(target).is_dir() or not os.access(Path(target).parent, os.W_OK)):
            refuse(f"--{name} {target}: can't be written")


def main(options: Options) -> list[dict]:
    """Check, load, play, print and write; returns what evaluate() gave for each checkpoint."""
    check(options)
    checkpoints = [load(path, options) for path in options.checkpoints]
    checkpoints.sort(key=lambda checkpoint: checkpoint["global_step"])
    results = []
    try:
        for checkpoint in checkpoints:
            print(checkpoint["path"])
            results.append(evaluate(checkpoint, options))
            if options.json:
                temporary = Path(f"{options.json}.tmp")  # whole or not at all
                temporary.write_text(json.dumps(results, indent=1) + "\n")
                temporary.replace(options.json)
    finally:  # after Ctrl-C, too
        if results:
            games = ", ".join(dict.fromkeys(result["env_id"] for result in results))
            sticky = results[0]["repeat_action_probability"]
            print(f"{games}, sticky actions {sticky:g}, epsilon {options.epsilon:g}")
            print(table(results))
    if options.video:
        film(checkpoints[-1], options)
    return results


# The 0 and the 1 of the human-normalised score. Source: github.com/google-deepmind/dqn_zoo
RANDOM_AND_HUMAN = {
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3), "Asteroids": (719.1, 47388.7), "Atlantis": (12850.0, 29028.1),
    "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5), "BeamRider": (363.9, 16926.5),
    "Berzerk": (123.7, 2630.4), "Bowling": (23.1, 160.7), "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5), "Centipede": (2090.9, 12017.0), "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4), "Defender": (2874.5, 18688.9),
    "DemonAttack": (152.1, 1971.0), "DoubleDunk": (-18.6, -16.4), "Enduro": (0.0, 860.5),
    "FishingDerby": (-91.7, -38.7), "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5), "Gravitar": (173.0, 3351.4), "Hero": (1027.0, 30826.4),
    "IceHockey": (-11.2, 0.9), "Jamesbond": (29.0, 302.8), "Kangaroo": (52.0, 3035.0),
    "Krull": (1598.0, 2665.5), "KungFuMaster": (258.5, 22736.3), "MontezumaRevenge": (0.0, 4753.3),
    "MsPacman": (307.3, 6951.6), "NameThisGame": (2292.3, 8049.0), "Phoenix": (761.4, 7242.6),
    "Pitfall": (-229.4, 6463.7), "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0), "Riverraid": (1338.5, 17118.0), "RoadRunner": (11.5, 7845.0),
    "Robotank": (2.2, 11.9), "Seaquest": (68.4, 42054.7), "Skiing": (-17098.1, -4336.9),
    "Solaris": (1236.3, 12326.7), "SpaceInvaders": (148.0, 1668.7), "StarGunner": (664.0, 10250.0),
    "Surround": (-10.0, 6.5), "Tennis": (-23.8, -8.3), "TimePilot": (3568.0, 5229.2),
    "Tutankham": (11.4, 167.6), "UpNDown": (533.4, 11693.2), "Venture": (0.0, 1187.5),
    "VideoPinball": (16256.9, 17667.9), "WizardOfWor": (563.5, 4756.5),
    "YarsRevenge": (3092.9, 54576.9), "Zaxxon": (32.5, 9173.3)}


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # ± where the terminal has only ASCII
    try:
        main(tyro.cli(Options))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}", code=1)
