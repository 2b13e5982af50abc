"""Real CIFAR-10: the author's ResNet-22 and the kept targets. Needs LTX_DATA; see CONTRIBUTING.md."""

import numpy as np
import pytest
import torch
from conftest import some

from ltx import construct, data, verify
from ltx.constructions.sampled import sampled
from ltx.evaluation import accuracy, compare, outputs
from ltx.graph import trace
from ltx.paths import reference_dir
from ltx.targets import build, load_into, read_checkpoint

pytestmark = pytest.mark.cifar
SPEC = data.dataset_spec("cifar10")


def target(path, activation):
    model = build("resnet22", activation, shape=SPEC.shape, classes=10)
    return load_into(model, read_checkpoint(path), network="resnet22")


@pytest.fixture(scope="module")
def author(author_target):
    return target(author_target, "sigmoid")


def all_images(root):
    return data.load("cifar10", train=False, root=root)


def test_is_cifar10(cifar_root):
    split = all_images(cifar_root)
    assert split.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(split.labels).tolist() == [1000] * 10
    low, high = SPEC.input_range
    assert low - 1e-6 <= split.images.min()
    assert split.images.max() <= high + 1e-6


@pytest.mark.slow
def test_the_authors_target_has_the_papers_accuracy(author, cifar_root):
    assert accuracy(author, all_images(cifar_root)) == pytest.approx(72.64, abs=0.05)


def test_the_authors_target_counts_as_in_the_paper(author):
    layers = trace(author).layers
    count = sum(layer.parameters_above(0.01) for name, layer in layers.items() if "shortcut" not in name)
    assert count == 116_094  # Table 4: 116,048


@pytest.mark.slow
def test_explicit_tickets_of_the_authors_target(author, cifar_root):
    """L+1 has Table 4's size and guesses (section 6 of the design); 2L behaves as the paper's sampled protocol does."""
    graph, split = trace(author), some(all_images(cifar_root), 100)
    theirs = outputs(author, split.images)
    tickets = {
        c: construct(graph, construction=c, head="construct", input_range=SPEC.input_range) for c in ("L+1", "2L")
    }
    for ticket in tickets.values():
        assert verify(ticket, graph).violations == ()
    assert 3.8e6 < tickets["L+1"].parameters < 4.0e6
    assert tickets["2L"].parameters < 0.65e6
    assert compare(theirs, tickets["2L"].to_module(), split).agreement > 70


@pytest.mark.slow
def test_sampled_errors_of_the_authors_target(author, cifar_root):
    split = some(all_images(cifar_root), 500)
    theirs = outputs(author, split.images)
    found, counts = [], []
    for seed in range(8):
        drawn = sampled(author, seed=seed, input_range=SPEC.input_range)
        counts.append(drawn.parameters)
        model = build("resnet22", "sigmoid", shape=SPEC.shape, classes=10)
        model.load_state_dict(drawn.state)
        found.append(compare(theirs, model.eval(), split).ticket_accuracy)
    assert 3.85e6 < np.mean(counts) < 4.0e6  # Table 4: 3.93 million
    assert 60 < np.mean(found) < 76  # Table 3: 69 +- 2


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((reference_dir() / "targets").glob("resnet22-*")), ids=lambda path: path.stem)
def test_kept_targets_have_the_accuracy_they_state(cifar_root, path):
    """One on all images, as the author's; of the others four standard errors of 2,000 of the 10,000 images."""
    said = read_checkpoint(path).metadata
    stated, split, many = float(said["accuracy"]), all_images(cifar_root), 2000
    within = 4 * (stated * (100 - stated) / many * (1 - many / len(split))) ** 0.5
    if said["activation"] == "sigmoid":
        many, within = len(split), 0.05
    assert accuracy(target(path, said["activation"]), some(split, many)) == pytest.approx(stated, abs=within)
    assert path.stat().st_size < 2_000_000
