"""Construct a ticket for a random network of torchvision's, pruned at random: time, memory, deviation, as JSON.

python scripts/own_network.py resnet18 2L [DENSITY] [M] [EPSILON]
"""

import json
import resource
import sys
import time

import torch
import torchvision

import ltx
from ltx.graph import trace

INPUT = (-2.5, 2.5)


def network(name: str, density: float, *, seed: int = 0) -> torch.nn.Module:
    """With He's initialisation, scaled up for what is pruned, and batch norm as after some training; classes: 10."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = getattr(torchvision.models, name)(num_classes=10, weights=None).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                kept = torch.rand(module.weight.shape, generator=generator) < density
                module.weight.mul_(kept).mul_(min(3.0, density**-0.5))
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def main() -> None:
    name, construction = sys.argv[1:3]
    density = float(sys.argv[3]) if len(sys.argv) > 3 else 0.1
    m = int(sys.argv[4]) if len(sys.argv) > 4 else 15
    epsilon = float(sys.argv[5]) if len(sys.argv) > 5 else 0.01
    model = network(name, density)
    graph = trace(model)
    ltx.construct(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Flatten()), head="construct")  # compiled now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    ticket = ltx.construct(
        graph,
        construction=construction,
        base_set_size=m,
        epsilon=epsilon,
        head="construct",
        scaling="layer_max",
        input_range=INPUT,
    )
    seconds, memory = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    assert ltx.verify(ticket, graph).ok
    verified = time.perf_counter() - begin
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * (INPUT[1] - INPUT[0]) + INPUT[0]
    with torch.no_grad():
        theirs = model(x)
        found = float((ticket.to_module(outputs_only=True)(x) - theirs).abs().max())
    print(json.dumps({
        "network": name, "construction": construction, "m": m, "epsilon": epsilon, "density": density,
        "target_parameters": sum(layer.parameters_above(epsilon) for layer in graph.layers.values()),
        "ticket_parameters": ticket.parameters, "source_parameters": ticket.source_parameters, "seconds": seconds,
        "verify_seconds": verified, "memory_before_mb": before / 1024, "memory_mb": memory / 1024,
        "largest_deviation": found, "target_std": float(theirs.std()),
    }))  # fmt: skip


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    main()
