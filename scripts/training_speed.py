"""Seconds of one epoch of training ResNet-22 on 50,000 images of CIFAR-10's size, on this machine's CPU.

    python scripts/training_speed.py ACTIVATION [compile]

Timed on 12,800 random images (speed does not depend on them) and scaled, three epochs in batches of 128, through
torch.compile if asked for, whose compilation is part of the first; then 10,000 more are classified, as behind a round.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise

import torch

from ltx import data, targets, training
from ltx.evaluation import accuracy

SHARE = 12_800 / 50_000


def main(activation: str, compiled: bool) -> None:
    spec = data.dataset_spec("cifar10")
    torch.manual_seed(0)
    train, test = (
        data.Split(torch.randn(n, *spec.shape), torch.randint(spec.classes, (n,)))
        for n in (int(50_000 * SHARE), 10_000)
    )
    model = targets.build("resnet22", activation, shape=spec.shape, classes=spec.classes)
    protocol = training.Protocol(rounds=1, epochs=3, batch_size=128, crop=4, flip=True)
    times = [time.perf_counter()]
    few = data.Split(test.images[:100], test.labels[:100])  # training classifies them behind the last epoch
    training.train(
        model, train, few, protocol, 0.5, seed=0, compiled=compiled,
        on_progress=lambda _: times.append(time.perf_counter()),
    )  # fmt: skip
    seconds = [(after - before) / SHARE for before, after in pairwise(times)]
    print(f"{activation}: " + ", ".join(f"{each:.1f}" for each in seconds) + " s an epoch")
    begin = time.perf_counter()
    accuracy(model, test)
    print(f"10,000 images classified in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["compile"]):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:] == ["compile"])
