# SPDX-License-Identifier: MIT
"""Play whole games with saved checkpoints, and report their raw scores.

    python evaluate.py runs/<run>/model_<step>.pt                     # 10 games, greedy
    python evaluate.py runs/<run>/model_*.pt                          # a table: the learning curve
    python evaluate.py runs/<run>/model_<step>.pt --watch             # or --video game.webm: a game

Predicted: the highest Q-value, the greedy action's, mean over the states played. Realised: the
return that followed, discounted, of clipped rewards, up to the game's end or the next lost life, if
that was terminal in training. Their gap is the overestimation of [van Hasselt 2016],
arXiv:1509.06461. Ctrl-C or an error loses only the checkpoint being played. Runs on the CPU."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

os.environ["OPENCV_LOG_LEVEL"] = "OFF"  # on a full disk it complains of every picture:
os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"  # film() counts them instead
import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro

from dqn_atari import (
    Lives, QNetwork, load_checkpoint, make_env, make_vec_env, refuse, select_actions)

CODECS = {".webm": "VP80", ".mp4": "mp4v"}  # browsers play the one, desktop players the other
FPS = 15  # the game's own speed: 60 frames a second, 4 a step
Paths = Annotated[tuple[str, ...], tyro.conf.arg(metavar="CHECKPOINT ...")]


@dataclasses.dataclass
class Options:
    checkpoints: tyro.conf.Positional[Paths]  # model_<step>.pt or latest.pt of a run, one or more
    episodes: int | None = None  # whole games to score with each; None: 10, but 0 with --watch
    epsilon: float = 0.0  # chance of a random action; 0 is greedy
    seed: int = 1  # of the games and of the random actions
    repeat_action_probability: float | None = None  # sticky actions; None: as in training
    watch: bool = False  # show a game in a window, at once; q, Escape or its cross closes it
    video: str | None = None  # film a game to this .webm, .mp4 or .webp (an animation)
    json: str | None = None  # write all results, the single games too, to this file


def load(path: str, options: Options) -> dict:
    """A checkpoint's network, and its args as they are to be played."""
    checkpoint = load_checkpoint(path)
    args = checkpoint["args"]
    if options.repeat_action_probability is not None:
        args.repeat_action_probability = options.repeat_action_probability
    try:
        if not (0 <= args.repeat_action_probability <= 1 and 0 <= args.gamma <= 1):
            raise ValueError("repeat_action_probability or gamma is not from 0 to 1")
        one_game = make_vec_env(dataclasses.replace(args, num_envs=1))
        network = QNetwork(int(one_game.single_action_space.n))
        network.load_state_dict(checkpoint["model"])
        step = int(checkpoint["global_step"])
    except Exception as error:  # gymnasium and torch have a dozen ways to say it
        refuse(f"{path}: no checkpoint to play {args.env_id} with: {error!r}")
    # Game i takes seed + i, an int32. Hashed, so that two seeds share no game, nor with training.
    seed = int(np.random.SeedSequence((options.seed, 0, 1)).generate_state(1)[0] >> 2)
    return {"path": path, "global_step": step, "args": args, "network": network, "seed": seed}


@torch.no_grad()
def evaluate(checkpoint: dict, options: Options) -> dict:
    """Play options.episodes whole games; returns scores, statistics and protocol, JSON-ready.
    The games are dealt evenly to N played side by side: the first to end are the short ones."""
    args, episodes = checkpoint["args"], options.episodes
    num_envs = min(episodes, 16)
    to_play = episodes // num_envs + (np.arange(num_envs) < episodes % num_envs)  # (N,)
    envs = make_vec_env(dataclasses.replace(args, num_envs=num_envs))
    rng = np.random.default_rng(checkpoint["seed"])
    obs, _ = envs.reset(seed=checkpoint["seed"])
    games, steps = [], []
    predicted, realised = [], []
    while to_play.any():
        q_values = checkpoint["network"](torch.as_tensor(obs)).numpy()  # (N, A)
        actions = select_actions(q_values, options.epsilon, rng)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        ended = terminations | truncations
        life_ended = ended | (infos["life_lost"] & args.terminal_on_life_loss)
        counted = to_play > 0
        predicted.extend(q_values.max(1)[counted])
        steps.append((np.sign(rewards), life_ended, counted))
        for i in np.flatnonzero(ended & counted):
            score, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            games.append({"return": score, "length": length, "capped": bool(truncations[i])})
            capped = ", capped" if truncations[i] else ""
            print(f"  game {len(games)}: {score:.0f} in {length} steps{capped}")
        to_play = to_play - (ended & counted)
    following = 0.0  # (N,), the return from the step after
    for reward, life_ended, counted in reversed(steps):
        following = reward + args.gamma * ~life_ended * following
        realised.extend(following[counted])
    scores = np.array([game["return"] for game in games])
    random, human = RANDOM_AND_HUMAN.get(args.env_id[4:-3], (np.nan, np.nan))
    normalised = (scores.mean() - random) / (human - random)
    return {
        "checkpoint": checkpoint["path"], "global_step": checkpoint["global_step"],
        "env_id": args.env_id, "repeat_action_probability": args.repeat_action_probability,
        "epsilon": options.epsilon, "seed": options.seed, "episodes": len(games),
        "mean": scores.mean(), "std": scores.std(), "median": float(np.median(scores)),
        "min": scores.min(), "max": scores.max(), "capped": sum(game["capped"] for game in games),
        "predicted_q": float(np.mean(predicted)), "realised_return": float(np.mean(realised)),
        "human_normalised": None if np.isnan(normalised) else normalised, "games": games}


def table(results: list[dict]) -> str:
    """A row per checkpoint, with its name if they are from more than one directory."""
    directories = {Path(result["checkpoint"]).parent for result in results}
    lines = [f"{'step':>12} {'games':>5} {'mean':>12} ± {'std':<9} {'median':>9} {'min':>8} "
             f"{'max':>8} {'capped':>6} {'human':>7} {'Q predicted':>11} {'realised':>8}"]
    for r in results:
        human = "-" if r["human_normalised"] is None else f"{r['human_normalised']:.1%}"
        name = f"  {r['checkpoint']}" if len(directories) > 1 else ""
        lines.append(
            f"{r['global_step']:>12,} {r['episodes']:>5} {r['mean']:>12.2f} ± {r['std']:<9.2f} "
            f"{r['median']:>9.1f} {r['min']:>8.0f} {r['max']:>8.0f} {r['capped']:>6} {human:>7} "
            f"{r['predicted_q']:>11.3f} {r['realised_return']:>8.3f}{name}")
    return "\n".join(lines)


def save_json(results: list[dict], path: str) -> None:
    partial = Path(f"{path}.{os.getpid()}.tmp")  # until it is whole
    try:
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        refuse(f"{path}: {error.strerror}", 1)


def draw(frame, text, q_values, action, action_set) -> np.ndarray:
    """A frame RGB (H, 160, 3), doubled, and a bar per action beside it: BGR (2 H, 560, 3)."""
    doubled = frame[:, :, ::-1].repeat(2, axis=0).repeat(2, axis=1)
    picture = np.pad(doubled, ((0, 0), (0, 240), (0, 0)), constant_values=24)
    font, white, grey, green = cv2.FONT_HERSHEY_SIMPLEX, (255,) * 3, (110,) * 3, (60, 150, 60)
    cv2.putText(picture, text, (332, 24), font, 0.5, white, 1, cv2.LINE_AA)
    low, high = min(q_values.min(), 0.0), max(q_values.max(), 1e-6)
    for i, (q, button) in enumerate(zip(q_values, action_set)):
        top, colour = 44 + i * min(40, 370 // len(q_values)), green if i == action else grey
        right = 333 + int(217 * (q - low) / (high - low))
        cv2.rectangle(picture, (332, top), (right, top + 16), colour, -1)
        text, corner = f"{q:.2f} {button.name}", (336, top + 12)
        cv2.putText(picture, text, corner, font, 0.36, white, 1, cv2.LINE_AA)
    return picture


@torch.no_grad()
def film(checkpoint: dict, options: Options) -> None:
    """Play a game of make_env in a window, on film, or both; .webp: 15 s of it, at half size."""
    env = make_env(checkpoint["args"].env_id, render_mode="rgb_array",
                   repeat_action_probability=checkpoint["args"].repeat_action_probability)
    action_set = env.unwrapped.ale.getMinimalActionSet()
    envs = Lives(gym.vector.SyncVectorEnv([lambda: env], autoreset_mode="SameStep"), action_set)
    rng = np.random.default_rng(checkpoint["seed"])
    obs, infos = envs.reset(seed=checkpoint["seed"])
    path = os.path.abspath(options.video or checkpoint["path"])  # http:x.webm is no address
    suffix = Path(options.video or "").suffix
    frames, writer = [], cv2.VideoWriter()
    if suffix in CODECS:
        codec, size = cv2.VideoWriter_fourcc(*CODECS[suffix]), (560, 2 * len(env.render()))
        ok = writer.open(path, cv2.CAP_FFMPEG, codec, FPS, size)
    start = time.monotonic()
    score, count = 0.0, 0
    ended = False
    while not ended:
        q_values = checkpoint["network"](torch.as_tensor(obs)).numpy()  # (1, A)
        actions = select_actions(q_values, options.epsilon, rng)
        text = f"score {score:.0f}   lives {infos['lives'][0]}"
        picture = draw(env.render(), text, q_values[0], actions[0], action_set)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        score += rewards[0]
        count += 1
        ended = terminations[0] or truncations[0] or (suffix == ".webp" and count == 15 * FPS)
        if suffix == ".webp":
            frames.append(cv2.resize(picture, None, fx=0.5, fy=0.5))
        writer.write(picture)  # does nothing if not open
        if options.watch:
            cv2.namedWindow(path, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)  # no toolbar
            cv2.imshow(path, picture)
            key = cv2.waitKey(max(1, int(1000 * (start + count / FPS - time.monotonic()))))
            try:
                closed = cv2.getWindowProperty(path, cv2.WND_PROP_VISIBLE) < 1
            except cv2.error:  # Qt is gone with its last window
                closed = True
            ended |= closed or key in (ord("q"), 27)  # 27 is Escape
    if options.watch:
        cv2.destroyAllWindows()
    writer.release()
    if suffix == ".webp":
        animation = cv2.Animation()
        animation.frames, animation.durations = frames, np.full(count, 1000 // FPS)
        ok = cv2.imwriteanimation(path, animation, [cv2.IMWRITE_WEBP_QUALITY, 60])
        _, written = cv2.imreadanimation(path)
        found = sum(written.durations) // (1000 // FPS)  # equal pictures are stored as one
    elif options.video:
        found = sum(1 for _ in iter(cv2.VideoCapture(path, cv2.CAP_FFMPEG).grab, False))
    if options.video and not (ok and found == count):
        refuse(f"{path}: holds {found} of {count} pictures; is the disk full?", 1)
    print(f"{path}: {count} pictures, score {score:.0f}")


def check(options: Options) -> None:
    """Refuse what can be refused before the first game."""
    if not options.checkpoints:
        refuse("CHECKPOINT: give at least one model_<step>.pt")
    most = {"episodes": 10**6, "seed": 2**32 - 1, "epsilon": 1, "repeat_action_probability": 1}
    for name, high in most.items():
        if not 0 <= (getattr(options, name) or 0) <= high:
            refuse(f"--{name.replace('_', '-')} {getattr(options, name)}: must be from 0 to {high}")
    if options.video and Path(options.video).suffix not in (*CODECS, ".webp"):
        refuse(f"--video {options.video}: must end in .webm, .mp4 or .webp")
    for name, target in (("video", options.video), ("json", options.json)):
        if target and (Path(target).is_dir() or not os.access(Path(target).parent, os.W_OK)):
            refuse(f"--{name} {target}: can't be written")
    window = [sys.executable, "-c", "import cv2; cv2.namedWindow('x')"]  # apart: Qt may abort it
    if options.watch and subprocess.run(window, capture_output=True).returncode:
        refuse("--watch: needs a display, and opencv-python, not its headless build")


def main(options: Options) -> list[dict]:
    """Check, load, play, print and write; returns what evaluate() gave for each checkpoint."""
    check(options)
    checkpoints = [load(path, options) for path in options.checkpoints]
    checkpoints.sort(key=lambda checkpoint: checkpoint["global_step"])
    if options.watch or options.video:
        film(checkpoints[-1], options)
    if options.episodes is None:
        options = dataclasses.replace(options, episodes=0 if options.watch else 10)
    results = []
    try:
        for checkpoint in checkpoints if options.episodes else []:
            print(checkpoint["path"])
            results.append(evaluate(checkpoint, options))
            if options.json:
                save_json(results, options.json)
    finally:  # after Ctrl-C, too
        if results:
            ids = ", ".join(dict.fromkeys(result["env_id"] for result in results))
            sticky = results[0]["repeat_action_probability"]
            print(f"{ids}, sticky {sticky:g}, epsilon {options.epsilon:g}\n{table(results)}")
    return results


# The 0 and the 1 of the human-normalised score. Source: github.com/google-deepmind/dqn_zoo
RANDOM_AND_HUMAN = {
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742),
    "Asterix": (210, 8503.3), "Asteroids": (719.1, 47388.7), "Atlantis": (12850, 29028.1),
    "BankHeist": (14.2, 753.1), "BattleZone": (2360, 37187.5), "BeamRider": (363.9, 16926.5),
    "Berzerk": (123.7, 2630.4), "Bowling": (23.1, 160.7), "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5), "Centipede": (2090.9, 12017), "ChopperCommand": (811, 7387.8),
    "CrazyClimber": (10780.5, 35829.4), "Defender": (2874.5, 18688.9), "DemonAttack": (152.1, 1971),
    "DoubleDunk": (-18.6, -16.4), "Enduro": (0, 860.5), "FishingDerby": (-91.7, -38.7),
    "Freeway": (0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5),
    "Gravitar": (173, 3351.4), "Hero": (1027, 30826.4), "IceHockey": (-11.2, 0.9),
    "Jamesbond": (29, 302.8), "Kangaroo": (52, 3035), "Krull": (1598, 2665.5),
    "KungFuMaster": (258.5, 22736.3), "MontezumaRevenge": (0, 4753.3), "MsPacman": (307.3, 6951.6),
    "NameThisGame": (2292.3, 8049), "Phoenix": (761.4, 7242.6), "Pitfall": (-229.4, 6463.7),
    "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455),
    "Riverraid": (1338.5, 17118), "RoadRunner": (11.5, 7845), "Robotank": (2.2, 11.9),
    "Seaquest": (68.4, 42054.7), "Skiing": (-17098.1, -4336.9), "Solaris": (1236.3, 12326.7),
    "SpaceInvaders": (148, 1668.7), "StarGunner": (664, 10250), "Surround": (-10, 6.5),
    "Tennis": (-23.8, -8.3), "TimePilot": (3568, 5229.2), "Tutankham": (11.4, 167.6),
    "UpNDown": (533.4, 11693.2), "Venture": (0, 1187.5), "VideoPinball": (16256.9, 17667.9),
    "WizardOfWor": (563.5, 4756.5), "YarsRevenge": (3092.9, 54576.9), "Zaxxon": (32.5, 9173.3)}


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # "?" for ± in ASCII
    try:
        main(tyro.cli(Options, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
