# SPDX-License-Identifier: MIT
"""Draw learning curves. Run by hand; matplotlib is no requirement of the project.

    pip install matplotlib
    python results/plot.py runs/<run>                    # to curve.csv and curve.png there
    python results/plot.py runs/<run> runs/<other run>   # seeds of one game, and their mean
    python results/plot.py results/ALE-Breakout-v5 results/ALE-Breakout-v5/seed-1  # from curve.csv
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import RANDOM_AND_HUMAN

# Others' training returns in the same game and protocol: label, steps, mean return.
# Dopamine: baselines/atari/data/breakout.json, means of five seeds and of 250,000 steps: 0.75 M to
# 1 M and 1 M to 1.25 M, drawn at their middle, and at 6 M.
ANCHORS = {
    "Breakout": [
        ("Dopamine, Adam", (0.875e6, 1.125e6, 6e6), (18.9, 23.7, 97.5)),
        ("Dopamine, RMSprop", (0.875e6, 1.125e6, 6e6), (6.7, 9.3, 63.6)),
    ]
}


def returns_of(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and returns of all games: from curve.csv, or written to it from TensorBoard's events."""
    path = directory / "curve.csv"
    if list(directory.glob("events.out.tfevents*")):
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0})  # 0: all of them
        events.Reload()
        games = events.Scalars("charts/episodic_return")
        lines = [f"{game.step},{game.value:g}\n" for game in games]
        path.write_text("step,return\n" + "".join(lines))
    return np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)


def main(directories: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Draw curve.png into the first of DIRECTORIES, from all of them."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    curves = []
    for directory in directories:
        steps, returns = returns_of(directory)
        window = min(100, len(returns))
        mean = np.convolve(returns, np.ones(window) / window, mode="valid")
        curves.append((steps[window - 1 :], mean))
        axes.plot(steps, returns, ".", color="0.8", markersize=2)
        axes.plot(*curves[-1], label=f"{directory.name}: mean of the last {window} games")
    if len(curves) > 1:
        common = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 500)
        mean = np.mean([np.interp(common, x, y) for x, y in curves], axis=0)
        axes.plot(common, mean, color="black", linewidth=2, label=f"mean of {len(curves)} runs")
    name = directories[0].name
    game = name.split("-")[1]
    for (label, x, y), marker in zip(ANCHORS.get(game, ()), "s^"):
        axes.plot(x, y, marker, color="0.3", markersize=5, label=label)
    if game in RANDOM_AND_HUMAN:
        axes.axhline(RANDOM_AND_HUMAN[game][1], color="0.5", linestyle=":", label="human tester")
    axes.set(xlabel="agent steps (4 frames each)", ylabel="return", title=name.split("__")[0])
    axes.set(xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M")
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(directories[0] / "curve.png", dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
