"""The README's picture, drawn from a real ticket: one subset-sum problem, all of them, and the mask they make.

python scripts/picture.py [outputs/reference/ticket.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from ltx import construct, data, source
from ltx.graph import trace
from ltx.paths import reference_dir
from ltx.targets import build, load_into, read_checkpoint

M, EPSILON, SEED = 15, 0.01, 0
KEPT, PRUNED, TARGET = "#1b6ca8", "#c9ced6", "#d1495b"


def main(path: Path) -> None:
    spec = data.dataset_spec("mnist")
    checkpoint = read_checkpoint(reference_dir() / "targets" / "mnist-relu.safetensors")
    model = load_into(build("mnist_cnn", "relu", shape=spec.shape, classes=10), checkpoint, network="mnist_cnn")
    target = trace(model).layers["2"]
    ticket = construct(model, base_set_size=M, epsilon=EPSILON, seed=SEED, input_range=spec.input_range)
    layer = ticket.layer("2")
    rows, offsets, values = ticket.kept("2")
    inside, outside = ticket.slots["0"], ticket.slots["2"]

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=[1, 1.1, 1.2], layout="constrained")

    # the target parameter with the most kept entries among those of three
    sums: dict[tuple[int, int, int], list[int]] = {}
    for n, (row, offset) in enumerate(zip(rows.tolist(), offsets.tolist(), strict=True)):
        channel = int(inside[offset // layer.taps])
        if channel >= 0:
            sums.setdefault((row, channel, offset % layer.taps), []).append(n)
    (row, channel, tap), chosen = next((k, v) for k, v in sums.items() if len(v) == 3)
    theta = float(target.weight[outside[row], channel].flatten()[tap])
    slots = (inside == channel).nonzero().flatten()[:M]
    base = source.weights(layer, SEED, torch.full_like(slots, row), slots * layer.taps + tap)
    kept = torch.isin(slots * layer.taps + tap, offsets[chosen])
    axes[0].bar(range(len(slots)), base, color=[KEPT if k else PRUNED for k in kept], width=0.8)
    axes[0].axhline(theta, color=TARGET, lw=1.5)
    axes[0].axhline(0, color="black", lw=0.6)
    total = float(base[kept].double().sum())
    axes[0].text(
        0.5, 1.02, f"kept (blue): {total:.4f}    target (red): {theta:.4f}", transform=axes[0].transAxes, ha="center"
    )
    axes[0].set_xlabel(f"{len(slots)} copies of the input channel")
    axes[0].set_ylabel("random source parameter")
    axes[0].set_xticks([])

    points = []
    for (r, c, k), entries in sums.items():
        points.append(
            (float(target.weight[outside[r], c].flatten()[k]), float(values[entries].double().sum()), len(entries))
        )
    axes[1].axhspan(-EPSILON, EPSILON, color=PRUNED, alpha=0.35, lw=0)
    scatter = axes[1].scatter(
        [p[0] for p in points], [p[1] - p[0] for p in points], c=[p[2] for p in points], s=6, cmap="viridis"
    )
    figure.colorbar(scatter, ax=axes[1], label="size of the subset", ticks=sorted({p[2] for p in points}))
    axes[1].set_xlabel("target parameter")
    axes[1].set_ylabel("error of its subset sum")
    axes[1].set_ylim(-1.5 * EPSILON, 1.5 * EPSILON)
    axes[1].set_title(f"all {len(points)} weights, |error| ≤ ε = {EPSILON}", fontsize=9)

    mask = torch.zeros(layer.shape[0], layer.shape[1])
    mask[rows, offsets // layer.taps] = 1
    axes[2].imshow(mask, aspect="auto", cmap="Blues", vmin=-0.12, vmax=1, interpolation="nearest")
    axes[2].set_xlabel(f"{layer.shape[1]} source channels")
    axes[2].set_ylabel(f"{layer.shape[0]} source rows")
    share = len(rows) / (layer.shape[0] * layer.row_size)
    axes[2].set_title(f"the mask of this layer: {share:.1%} of it is kept", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("outputs/reference/ticket.png"))
