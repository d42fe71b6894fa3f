"""Play whole games with saved checkpoints, and report their raw scores.

    python evaluate.py runs/<run>/model_<step>.pt                    # 10 games, greedy
    python evaluate.py runs/<run>/model_*.pt                         # a table: the learning curve
    python evaluate.py runs/<run>/model_<step>.pt --video game.mp4   # film one more game

Beside the scores stand the mean Q-value that was predicted at the states played and the mean
discounted, clipped return that really followed them, which is how van Hasselt et al. 2016
(arXiv:1509.06461) measure overestimation. Runs on the CPU.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import tyro

from dqn_atari import (
    Args,
    QNetwork,
    find_fire,
    load_checkpoint,
    make_env,
    make_vec_env,
    refuse,
    select_actions,
)

# Scores of a random policy and of a human tester, the 0 and the 1 of the human-normalised score:
# DQN Zoo, atari_data.py (github.com/google-deepmind/dqn_zoo).
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
    "Krull": (1598.0, 2665.5), "KungFuMaster": (258.5, 22736.3),
    "MontezumaRevenge": (0.0, 4753.3), "MsPacman": (307.3, 6951.6),
    "NameThisGame": (2292.3, 8049.0), "Phoenix": (761.4, 7242.6), "Pitfall": (-229.4, 6463.7),
    "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455.0),
    "Riverraid": (1338.5, 17118.0), "RoadRunner": (11.5, 7845.0), "Robotank": (2.2, 11.9),
    "Seaquest": (68.4, 42054.7), "Skiing": (-17098.1, -4336.9), "Solaris": (1236.3, 12326.7),
    "SpaceInvaders": (148.0, 1668.7), "StarGunner": (664.0, 10250.0), "Surround": (-10.0, 6.5),
    "Tennis": (-23.8, -8.3), "TimePilot": (3568.0, 5229.2), "Tutankham": (11.4, 167.6),
    "UpNDown": (533.4, 11693.2), "Venture": (0.0, 1187.5), "VideoPinball": (16256.9, 17667.9),
    "WizardOfWor": (563.5, 4756.5), "YarsRevenge": (3092.9, 54576.9), "Zaxxon": (32.5, 9173.3),
}


@dataclasses.dataclass
class Options:
    """Play whole games with saved checkpoints, and report their raw scores."""

    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CHECKPOINT ...")
    ]
    """model_<step>.pt or latest.pt of a run, one or more"""
    episodes: int = 10
    """whole games to play with each checkpoint"""
    epsilon: float = 0.0
    """chance of a random action; 0 is greedy"""
    seed: int = 1
    """seed of the games and of the random actions"""
    repeat_action_probability: float | None = None
    """sticky actions; None: as in training"""
    video: str | None = None
    """film one more game to this file (.mp4), with the Q-values drawn beside it"""
    json: str | None = None
    """write all results, the single games too, to this file"""


def load_network(path: str, checkpoint: dict, num_actions: int) -> QNetwork:
    """The checkpoint's network, for a game of that many actions."""
    network = QNetwork(num_actions).to(memory_format=torch.channels_last)
    try:
        network.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError):
        game = checkpoint["args"].env_id
        refuse(f"{path}: holds no network for the {num_actions} actions of {game}")
    return network


@torch.no_grad()
def evaluate(path: str, options: Options) -> dict:
    """Play options.episodes whole games; returns scores, statistics and the protocol, JSON-ready.

    The games are dealt evenly to those played side by side: had the first to end been counted,
    short games would be too many.
    """
    checkpoint = load_checkpoint(path)
    args: Args = checkpoint["args"]
    sticky = options.repeat_action_probability
    num_envs = min(options.episodes, 16)
    args = dataclasses.replace(
        args,
        num_envs=num_envs,
        repeat_action_probability=args.repeat_action_probability if sticky is None else sticky,
    )
    envs = make_vec_env(args)
    network = load_network(path, checkpoint, int(envs.single_action_space.n))
    fire, rng = find_fire(envs), np.random.default_rng(options.seed)
    obs, infos = envs.reset(seed=options.seed)
    lives, over = infos["lives"], np.zeros(num_envs, dtype=bool)
    steps_in_life = np.zeros(num_envs, dtype=int)
    due = options.episodes // num_envs + (np.arange(num_envs) < options.episodes % num_envs)
    games, played = [], []  # finished games; per step: Q-value, clipped reward, life's end, counted
    while due.any():
        q_values = network(torch.as_tensor(obs)).numpy()
        actions = select_actions(q_values, options.epsilon, steps_in_life, fire, rng)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        life_lost = (infos["lives"] < lives) & ~over
        ended = terminations | truncations
        life_ends = ended | (life_lost & args.terminal_on_life_loss)
        played.append((q_values.max(1), np.sign(rewards), life_ends, (due > 0) & ~over))
        for i in np.flatnonzero(ended & (due > 0)):
            due[i] -= 1
            score, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            capped = bool(truncations[i])
            games.append({"return": score, "length": length, "capped": capped})
            print(f"  game {len(games)}: {score:g} in {length} steps"
                  + ", stopped at the frame cap" * capped, flush=True)
        steps_in_life = np.where(life_lost | over, 0, steps_in_life + 1)
        lives, over = infos["lives"], ended
    envs.close()

    predicted, rewards, life_ends, counted = (np.array(values) for values in zip(*played))  # (T, N)
    realised, following = np.zeros(predicted.shape), np.zeros(num_envs)
    for t in reversed(range(len(played))):
        following = rewards[t] + args.gamma * ~life_ends[t] * following
        realised[t] = following
    scores = np.array([game["return"] for game in games])
    random, human = RANDOM_AND_HUMAN.get(args.env_id[4:-3], (np.nan, np.nan))
    normalised = (scores.mean() - random) / (human - random)
    return {
        "checkpoint": str(path), "env_id": args.env_id, "global_step": checkpoint["global_step"],
        "epsilon": options.epsilon, "seed": options.seed,
        "repeat_action_probability": args.repeat_action_probability,
        "episodes": len(games), "mean": scores.mean(), "std": scores.std(),
        "median": float(np.median(scores)), "min": scores.min(), "max": scores.max(),
        "capped": sum(game["capped"] for game in games),
        "human_normalised": None if np.isnan(normalised) else normalised,
        "predicted_q": float(predicted[counted].mean()),
        "realised_return": float(realised[counted].mean()),
        "games": games,
    }


def table(results: list[dict]) -> str:
    """A row per checkpoint."""
    lines = [f"{'step':>12} {'games':>5}  {'mean ± std':>19} {'median':>9} {'min':>9} {'max':>9} "
             f"{'capped':>6} {'human':>7} {'Q predicted':>11} {'realised':>8}"]
    for r in results:
        human = "-" if r["human_normalised"] is None else f"{r['human_normalised']:.1%}"
        spread = f"{r['mean']:.2f} ± {r['std']:.2f}"
        lines.append(
            f"{r['global_step']:>12,} {r['episodes']:>5}  {spread:>19} {r['median']:>9g} "
            f"{r['min']:>9g} {r['max']:>9g} {r['capped']:>6} {human:>7} "
            f"{r['predicted_q']:>11.3f} {r['realised_return']:>8.3f}"
        )
    return "\n".join(lines)


def draw(frame, q_values, action, meanings, text) -> np.ndarray:
    """A frame RGB (H, 160, 3), doubled, and a bar per action beside it: BGR (2 H, 560, 3)."""
    doubled = frame[:, :, ::-1].repeat(2, axis=0).repeat(2, axis=1)
    picture = np.pad(doubled, ((0, 0), (0, 240), (0, 0)), constant_values=24)
    font, white, grey, green = cv2.FONT_HERSHEY_SIMPLEX, (255,) * 3, (110,) * 3, (60, 150, 60)
    cv2.putText(picture, text, (332, 24), font, 0.5, white, 1, cv2.LINE_AA)
    low, high = min(q_values.min(), 0.0), max(q_values.max(), 1e-6)
    pitch = min(40, 370 // len(q_values))
    for i, (value, meaning) in enumerate(zip(q_values, meanings)):
        top, colour = 44 + i * pitch, green if i == action else grey
        right = 420 + int(130 * (value - low) / (high - low))
        cv2.rectangle(picture, (420, top), (max(right, 421), top + pitch // 2), colour, -1)
        cv2.putText(picture, meaning, (332, top + 12), font, 0.36, colour, 1, cv2.LINE_AA)
        cv2.putText(picture, f"{value:.2f}", (424, top + 12), font, 0.36, white, 1, cv2.LINE_AA)
    return picture


@torch.no_grad()
def film(path: str, options: Options) -> None:
    """Play one game in the in-file wrappers and write it as a video, at the game's own speed."""
    checkpoint = load_checkpoint(path)
    args, sticky = checkpoint["args"], options.repeat_action_probability
    env = make_env(
        args.env_id,
        repeat_action_probability=args.repeat_action_probability if sticky is None else sticky,
        render_mode="rgb_array",
    )
    meanings = env.unwrapped.get_action_meanings()
    fire = np.array(meanings.index("FIRE")) if "FIRE" in meanings else None
    network = load_network(path, checkpoint, len(meanings))
    rng = np.random.default_rng(options.seed)
    obs, info = env.reset(seed=options.seed)
    size = (560, 2 * len(env.render()))
    writer = cv2.VideoWriter(options.video, cv2.VideoWriter_fourcc(*"mp4v"), 15, size)
    if not writer.isOpened():
        refuse(f"--video {options.video}: OpenCV can't write there; give a file that ends in .mp4")
    score, steps_in_life, over = 0.0, np.zeros(1, dtype=int), False
    while not over:
        q_values = network(torch.as_tensor(obs)[None]).numpy()  # (1, A)
        action = int(select_actions(q_values, options.epsilon, steps_in_life, fire, rng)[0])
        text = f"score {score:g}   lives {info['lives']}"
        writer.write(draw(env.render(), q_values[0], action, meanings, text))
        lives = info["lives"]
        obs, reward, terminated, truncated, info = env.step(action)
        score += reward
        over = terminated or truncated
        steps_in_life = np.zeros(1, dtype=int) if info["lives"] < lives else steps_in_life + 1
    writer.release()
    print(f"{options.video}: a game of {score:g} points")


def main(options: Options) -> list[dict]:
    if not options.checkpoints:
        refuse("CHECKPOINT: give at least one model_<step>.pt")
    if options.episodes < 1:
        refuse(f"--episodes {options.episodes}: must be at least 1")
    for name in ("epsilon", "repeat_action_probability"):
        if not 0 <= (getattr(options, name) or 0) <= 1:
            refuse(f"--{name.replace('_', '-')} {getattr(options, name)}: must be from 0 to 1")
    for name in ("video", "json"):
        target = getattr(options, name)
        if target and not Path(target).parent.is_dir():
            refuse(f"--{name} {target}: no such directory")
    results = []
    for path in options.checkpoints:
        print(path)
        results.append(evaluate(path, options))
    sticky = results[0]["repeat_action_probability"]
    games = ", ".join(dict.fromkeys(result["env_id"] for result in results))
    print(f"{games}, sticky actions {sticky:g}, epsilon {options.epsilon:g}")
    print(table(results))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.video:
        film(options.checkpoints[-1], options)
    return results


if __name__ == "__main__":
    main(tyro.cli(Options))
