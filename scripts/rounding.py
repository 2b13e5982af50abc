"""What float32 changes of a ticket's outputs: the largest difference to float64, for the kept targets of an activation.

    LTX_DATA=... python scripts/rounding.py sigmoid

m = 15, epsilon = 0.01, seed 0, the first 500 test images of MNIST, 32 of CIFAR-10; heads as in Tables 1 to 4.
"""

from __future__ import annotations

import sys

import torch

import ltx
from ltx import paths, targets

NETWORKS = (("mnist", "mnist_cnn", "mnist", "keep", 500), ("resnet22", "resnet22", "cifar10", "construct", 32))


def main(activation: str) -> None:
    for name, network, of, head, many in NETWORKS:
        spec = ltx.data.dataset_spec(of)
        model = targets.build(network, activation, shape=spec.shape, classes=spec.classes)
        file = paths.reference_dir() / "targets" / f"{name}-{activation}.safetensors"
        targets.load_into(model, targets.read_checkpoint(file), network=network)
        images = ltx.data.load(of, train=False).images[:many]
        for construction in ("L+1", "2L"):
            for law in ("uniform", "normal"):
                ticket = ltx.construct(
                    model, construction=construction, law=law, head=head, input_range=spec.input_range
                )
                with torch.no_grad():
                    single = ticket.to_module()(images)
                    double = ticket.to_module(dense=True).double()(images.double())
                same = (single.argmax(1) == double.argmax(1)).float().mean()
                off = float((single - double).abs().max())
                print(
                    f"{name}, {construction}, {law}: {off:.2g}, {100 * float(same):.1f} % classified alike", flush=True
                )


if __name__ == "__main__":
    main(sys.argv[1])
