"""Images per second of a ticket on this machine: sparse convolutions, as `ltx eval` runs it, beside dense float32.

    python scripts/evaluation_speed.py TICKET [IMAGES]

The images are random (speed does not depend on them); the median of three runs over IMAGES (128), 32 at a time.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from ltx import data
from ltx.evaluation import outputs
from ltx.ticket import Ticket


def image_shape(ticket: Ticket) -> tuple[int, ...]:
    """Of the first data set whose images the ticket takes."""
    module = ticket.to_module()
    for spec in data.DATASETS.values():
        try:
            outputs(module, torch.zeros(1, *spec.shape))
            return spec.shape
        except RuntimeError:
            continue
    sys.exit(f"the ticket takes no images of {', '.join(data.DATASETS)}")


def main(path: Path, images: int) -> None:
    ticket = Ticket.load(path)
    x = torch.rand(images, *image_shape(ticket), generator=torch.Generator().manual_seed(0))
    results = {}
    for name in ("sparse", "dense float32"):
        module = ticket.to_module(dense=name != "sparse")
        results[name] = outputs(module, x[:32], batch_size=32)
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            outputs(module, x, batch_size=32)
            seconds.append(time.perf_counter() - begin)
        print(f"{name}: {images / statistics.median(seconds):.1f} images per second")
    print(f"largest difference of an output: {float((results['sparse'] - results['dense float32']).abs().max()):.1e}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 128)
