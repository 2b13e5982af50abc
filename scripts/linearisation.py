"""What the two-for-one pairs of tanh and sigmoid lose by not being linear, beside epsilon.

    python scripts/linearisation.py

For every approximated parameter of the kept MNIST targets: the largest |sum over S of v (phi(lambda x) -
phi_hat(lambda x))| over inputs x, divided by the largest input, so that it compares with epsilon.
"""

from __future__ import annotations

import torch

from ltx import construct, data
from ltx.activations import activation
from ltx.paths import reference_dir
from ltx.targets import build, load_into, read_checkpoint


def main(epsilon: float = 0.01, seed: int = 0) -> None:
    spec = data.dataset_spec("mnist")
    for name in ("tanh", "sigmoid"):
        phi = activation(name)
        checkpoint = read_checkpoint(reference_dir() / "targets" / f"mnist-{name}.safetensors")
        model = build("mnist_cnn", name, shape=spec.shape, classes=spec.classes)
        ticket = construct(
            load_into(model, checkpoint, network="mnist_cnn"),
            construction="2L", epsilon=epsilon, seed=seed, input_range=spec.input_range,
        )  # fmt: skip
        for copies, layer in zip(ticket.layers[0::2], ticket.layers[1::2], strict=True):
            bound = max(map(abs, spec.input_range)) if copies.index == 0 else max(map(abs, phi.bounds(-1e9, 1e9)))
            rows, _, lambdas = ticket.kept(copies.name)
            entry = torch.zeros(copies.shape[0], dtype=torch.float64)
            entry[rows] = lambdas.double()
            rows, offsets, values = ticket.kept(layer.name)
            column, label = offsets // layer.taps, ticket.slots[copies.name]
            parameter = (rows * layer.shape[1] + label[column]) * layer.taps + offsets % layer.taps
            weights = label[column] >= 0  # not the constants of the biases
            _, which = parameter[weights].unique(return_inverse=True)
            x = torch.linspace(-bound, bound, 401, dtype=torch.float64)
            z = entry[column[weights]][:, None] * x
            off = values[weights].double()[:, None] * (phi.fn(z) - phi.slope_pos * z - phi.offset)
            total = torch.zeros(int(which.max()) + 1, len(x), dtype=torch.float64).index_add_(0, which, off)
            share = total.abs().max(1).values / bound / epsilon
            print(
                f"{name}, layer {layer.name}: sigma {copies.sigma:.4f}, inputs up to {bound:.2f}, "
                f"{len(share)} parameters: mean {share.mean():.1%}, largest {share.max():.1%} of epsilon"
            )


if __name__ == "__main__":
    main()
