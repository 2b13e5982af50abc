"""What tickets of `selection=feedback` depend on: calibration images, how many and which, sweeps, order, subsets.

    LTX_DATA=... python scripts/calibration.py ACTIVATION OUTPUT_DIR

For the kept ResNet-22 of that activation, explicit L+1 tickets, m = 15, seeds 0 to 2. Each row of OUTPUT_DIR's
calibration-ACTIVATION.csv is a ticket: how far its slots are from the target's activations in the end, on 64 of its
calibration images and on 64 test images (the gap is overfitting), and how it classifies 500 fixed random test images.
Rows that are there already are not made again, whatever the defaults were then: begin in an empty folder.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from ltx import Feedback, construct, data
from ltx.deviation import ticket_deviations
from ltx.evaluation import compare, outputs
from ltx.files import write_text
from ltx.graph import trace
from ltx.paths import reference_dir
from ltx.report.figures import BLUE, RED, save
from ltx.targets import build, load_into, read_checkpoint

SPEC = data.dataset_spec("cifar10")
SEEDS = range(3)
USUAL = Feedback()
ORIGINS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "training images": lambda images, _: images,
    "their pixels shuffled": lambda images, random: images.flatten(2)[:, :, random.permutation(1024)].view_as(images),
    "noise of their mean and covariance of colours": lambda images, random: _noise(images, random),
    "constant images of their mean colours": lambda images, _: images.mean((2, 3), keepdim=True).expand_as(images),
}


def _noise(images: Tensor, random: np.random.Generator) -> Tensor:
    pixels = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1]).double().numpy()
    drawn = random.multivariate_normal(pixels.mean(0), np.cov(pixels.T), size=len(pixels))
    drawn = torch.from_numpy(drawn).float().view(len(images), *images.shape[2:], -1).permute(0, 3, 1, 2)
    return drawn.clamp(*SPEC.input_range).contiguous()


def cases() -> Iterator[tuple[str, str, Feedback, int, str]]:
    """(what is varied, its value, settings, images, origin)"""
    origin = "training images"
    for samples, images in ((250, 8), (500, 16), (1000, 32), (2000, 64), (4000, 128), (8000, 256)):
        yield "samples, images", f"{samples}, {images}", replace(USUAL, samples=samples), images, origin
    for images in (16, 32, 64, 256):
        yield "images", str(images), USUAL, images, origin
    for other in ORIGINS:
        yield "origin", other, USUAL, 128, other
    for sweeps in (1, 2, 4, 8):
        yield "sweeps", str(sweeps), replace(USUAL, sweeps=sweeps), 128, origin
    for passes in (0, 1, 3, 9):
        yield "refine", str(passes), replace(USUAL, refine=passes), 128, origin
    for order in ("random", "largest"):
        yield "order", order, replace(USUAL, order=order), 128, origin
    for largest in (1, 2, 3, 4):
        yield "max_subset", str(largest), replace(USUAL, max_subset=largest), 128, origin
    for reject in (None, 2.0, 1.5, 1.2):
        yield "reject", str(reject), replace(USUAL, reject=reject), 128, origin


def main(activation: str, folder: Path) -> None:
    path = folder / f"calibration-{activation}.csv"
    rows = pd.read_csv(path, dtype={"value": str}, keep_default_na=False).to_dict("records") if path.is_file() else []
    model = build("resnet22", activation, shape=SPEC.shape, classes=SPEC.classes).eval()
    checkpoint = read_checkpoint(reference_dir() / "targets" / f"resnet22-{activation}.safetensors")
    load_into(model, checkpoint, network="resnet22")
    graph = trace(model)
    test = data.load("cifar10", train=False)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    split = data.Split(test.images[order[:500]], test.labels[order[:500]])
    theirs = outputs(model, split.images)
    for seed in SEEDS:
        for varied, value, settings, images, origin in cases():
            key = {"varied": varied, "value": value, "seed": seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            same = {"images": images, "origin": origin, **{k: str(v) for k, v in asdict(settings).items()}}
            made = next((r for r in rows if r["seed"] == seed and all(str(r[k]) == str(same[k]) for k in same)), None)
            row = {**(made or same | _measure(graph, settings, images, origin, seed, split, theirs)), **key}
            rows.append(row)
            print({k: row[k] for k in (*key, "agreement", "parameters", "deviation_calibration", "deviation_test")},
                  file=sys.stderr, flush=True)  # fmt: skip
            write_text(path, pd.DataFrame(rows).to_csv(index=False))
    save(figure(pd.read_csv(path, dtype={"value": str}, keep_default_na=False), activation), path.with_suffix(""))
    print(path)


def _measure(graph, settings: Feedback, images: int, origin: str, seed: int, split: data.Split, theirs: Tensor) -> dict:
    random = np.random.default_rng([seed, 0])
    shown = data.load_images("cifar10", lambda available: torch.from_numpy(random.permutation(available)[:images]))
    shown = ORIGINS[origin](shown, random)
    begin = time.perf_counter()
    ticket = construct(
        graph, construction="L+1", seed=seed, selection="feedback", head="construct", input_range=SPEC.input_range,
        calibration=shown, feedback=settings,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    network = ticket.to_module()
    measured = compare(theirs, network, split)
    deviations = {}
    for name, on in (("calibration", shown[:64]), ("test", split.images[:64])):
        last = ticket_deviations(ticket, graph, on, network=network)[-1]
        deviations[f"deviation_{name}"] = last.deviation / last.target_std
    return {
        "parameters": ticket.parameters, "ticket_accuracy": measured.ticket_accuracy,
        "target_accuracy": measured.target_accuracy, "agreement": measured.agreement, **deviations,
        "seconds": seconds,
    }  # fmt: skip


def figure(table: pd.DataFrame, activation: str) -> Figure:
    """Deviation on calibration and on test images, and disagreement, for everything that was varied."""
    names = list(dict.fromkeys(table.varied))
    wide = -(-len(names) // 2)
    result = Figure(figsize=(2.3 * wide, 9.2), layout="constrained")
    panels = result.subplots(4, wide)
    for n, name in enumerate(names):
        upper, lower = panels[2 * (n // wide) : 2 * (n // wide) + 2, n % wide]
        mine = table.loc[table.varied == name]
        values = list(dict.fromkeys(mine.value))
        means = mine.groupby("value")[["deviation_calibration", "deviation_test", "agreement"]].mean().loc[values]
        ticks = [textwrap.fill(value, 18) for value in values]
        line = "o" if name in ("origin", "order") else "o-"
        upper.plot(ticks, means.deviation_calibration, line, color=BLUE, label="calibration images")
        upper.plot(ticks, means.deviation_test, line, color=RED, label="test images")
        lower.plot(ticks, 100 - means.agreement, line, color="#2e8b57")
        upper.set_title(name, loc="left", fontsize=10)
        upper.tick_params(axis="x", labelbottom=False)
        lower.tick_params(axis="x", rotation=90 if max(map(len, ticks)) > 5 else 0, labelsize=8)
        for axes, key in ((upper, "deviation_calibration deviation_test"), (lower, "disagreement")):
            every = 100 - table.agreement if key == "disagreement" else table[key.split()].stack()
            axes.set_yscale("log")
            axes.set_ylim(
                max(float(every.min()) * 0.8, 0.2 if key == "disagreement" else 0.0), float(every.max()) * 1.25
            )
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.25, lw=0.5)
        if n % wide == 0:
            upper.set_ylabel("last deviation / std")
            lower.set_ylabel("disagreement, %")
    for empty in panels[2:, len(names) - wide :].flatten():
        empty.set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize=7)
    result.suptitle(
        f"What explicit L+1 tickets with feedback depend on (ResNet-22, {activation}, {len(SEEDS)} seeds)", fontsize=10
    )
    return result


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
