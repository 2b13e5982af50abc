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
from ltx.data import Split
from ltx.evaluation import accuracy

SPEC = data.dataset_spec("cifar10")
IMAGES, TEST, TIMED = 50_000, 10_000, 12_800


def network(activation: str) -> torch.nn.Module:
    return targets.build("resnet22", activation, shape=SPEC.shape, classes=SPEC.classes)


def epochs(
    activation: str, train: Split, test: Split, *, count: int, batch_size: int = 128, compiled: bool = False
) -> list[float]:
    """Seconds of each of `count` epochs: the last one with the evaluation on `test` behind it.

    On a GPU or compiled, the first one includes what is done once.
    """
    torch.manual_seed(0)
    protocol = training.Protocol(rounds=1, epochs=count, batch_size=batch_size, crop=4, flip=True)
    times = [time.perf_counter()]

    def note(_: training.Progress) -> None:
        times.append(time.perf_counter())  # the loss in it has waited for the device

    training.train(network(activation), train, test, protocol, 0.5, seed=0, compiled=compiled, on_progress=note)
    return [after - before for before, after in pairwise(times)]


def main(activation: str, compiled: bool) -> None:
    torch.manual_seed(0)
    train, test = (Split(torch.randn(n, *SPEC.shape), torch.randint(SPEC.classes, (n,))) for n in (TIMED, TEST))
    few = Split(test.images[:100], test.labels[:100])
    seconds = epochs(activation, train, few, count=3, compiled=compiled)
    print(f"{activation}: " + ", ".join(f"{each * IMAGES / TIMED:.1f}" for each in seconds) + " s an epoch")
    begin = time.perf_counter()
    accuracy(network(activation), test)
    print(f"{TEST:,} images classified in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["compile"]):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:] == ["compile"])
