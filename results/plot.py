"""Draw a learning curve. Run by hand; matplotlib is no requirement of the project.

    pip install matplotlib
    python results/plot.py results/ALE-Breakout-v5                    # curve.csv to curve.png
    python results/plot.py results/ALE-Breakout-v5 --run runs/<run>   # TensorBoard to curve.csv first
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import RANDOM_AND_HUMAN

# Others' training returns in the same game and protocol: label, steps, mean return.
# Dopamine: baselines/atari/data/breakout.json, means of 250,000 steps, drawn at their middle;
# Adam is the mean of three of its five seeds, two from 1 M steps on; RMSprop of two of five.
ANCHORS = {
    "ALE-Breakout-v5": [
        ("Dopamine, Adam", np.arange(6) * 0.25e6 + 0.125e6, (1.8, 6.5, 15.0, 19.1, 23.2, 27.3)),
        ("Dopamine, RMSprop", np.arange(5) * 0.25e6 + 0.125e6, (1.6, 3.0, 4.2, 6.7, 10.3)),
    ]
}


def export(run: Path, path: Path) -> None:
    """The returns of all finished games, from a run's TensorBoard events to a CSV."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: keep all of them
    events.Reload()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "return"))
        for event in events.Scalars("charts/episodic_return"):
            writer.writerow((event.step, f"{event.value:g}"))


def main(directory: tyro.conf.Positional[Path], run: Path | None = None) -> None:
    """Draw DIRECTORY/curve.csv as DIRECTORY/curve.png; --run writes the CSV from that run first."""
    if run:
        export(run, directory / "curve.csv")
    steps, returns = np.loadtxt(directory / "curve.csv", delimiter=",", skiprows=1, unpack=True)
    mean = np.convolve(returns, np.ones(100) / 100, mode="valid")  # of the last 100 games

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, returns, ".", color="0.8", markersize=2, label="a game, in training")
    axes.plot(steps[99:], mean, color="tab:blue", label="mean of the last 100 games")
    for (label, x, y), marker in zip(ANCHORS.get(directory.name, ()), "s^"):
        axes.plot(x, y, marker, color="tab:orange", markersize=5, label=label)
    game = directory.name.split("-")[1]
    if game in RANDOM_AND_HUMAN:
        axes.axhline(RANDOM_AND_HUMAN[game][1], color="0.5", linestyle=":", label="human tester")
    axes.set(xlabel="agent steps (4 frames each)", ylabel="return", title=directory.name)
    axes.set(xlim=(0, 1.05 * steps[-1]), ylim=(min(0, returns.min()), None))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M")
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(directory / "curve.png", dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
