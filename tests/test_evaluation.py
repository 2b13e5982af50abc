"""Accuracies, agreement and deviation by hand; models are left as they are."""

import json
import shutil

import pytest
import torch
from conftest import SMOKE, last_line, one_line
from torch import nn

from ltx import evaluation
from ltx.data import Split
from ltx.errors import LtxError
from ltx.evaluation import accuracy, compare, outputs
from ltx.files import read_tensors, write_tensors


class Scaled(nn.Module):
    """Its outputs are the pixels, with a bias on the last."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.drop, self.bias = nn.Dropout(0.9), bias

    def forward(self, x):
        return self.drop(x.flatten(1)) + torch.tensor([0.0, 0.0, self.bias])


def split(n=600):
    """Three classes in turn, of which an image's own has the largest pixel; every fourth label is wrong."""
    classes = torch.arange(n) % 3
    images = torch.nn.functional.one_hot(classes, 3).float().view(n, 1, 1, 3)
    labels = torch.where(torch.arange(n) % 4 == 0, (classes + 1) % 3, classes)
    return Split(images, labels)


def test_accuracies_agreement_and_deviation():
    shown, target, ticket = split(), Scaled(), Scaled(bias=1.5)  # the ticket says the last class of every image
    assert accuracy(target, shown) == 75.0
    found = compare(outputs(target, shown.images), ticket, shown)
    last = 100 * float((shown.labels == 2).double().mean())
    assert (found.target_accuracy, found.ticket_accuracy) == (75.0, pytest.approx(last))
    assert found.agreement == pytest.approx(100 / 3)
    assert found.max_deviation == 1.5
    assert compare(outputs(target, shown.images), target, shown).agreement == 100.0


def test_a_row_with_nan_is_of_no_class_on_either_side():
    shown, target = split(8), Scaled()
    theirs = outputs(target, shown.images)
    theirs[0, 1] = float("nan")
    found = compare(theirs, target, shown)
    assert (found.ticket_accuracy, found.agreement) == (75.0, 87.5)


def test_shapes_that_would_be_compared_each_with_each_are_refused():
    shown, target = split(6), Scaled()
    with pytest.raises(LtxError, match=r"labels of shape \(6, 1\) for outputs of \(6, 3\): must be \(N,\)"):
        accuracy(target, Split(shown.images, shown.labels[:, None]))
    with pytest.raises(LtxError, match=r"the ticket's outputs are \(6, 3\), the target's \(6, 1\)"):
        compare(torch.zeros(6, 1), target, shown)


def test_a_model_runs_in_eval_mode_and_keeps_its_own():
    model = Scaled().train()
    model.drop.eval()
    assert torch.equal(outputs(model, split().images), split().images.flatten(1))
    assert (model.training, model.drop.training) == (True, False)
    model.drop.train()
    assert torch.equal(outputs(model, split().images, batch_size=7), split().images.flatten(1))
    assert model.drop.training


def test_less_at_a_time_where_memory_is_short():
    asked = []

    class Wide(Scaled):
        def forward(self, x):
            asked.append(len(x))
            if len(x) > 40:
                raise torch.OutOfMemoryError("too wide")
            return super().forward(x)

    assert torch.equal(outputs(Wide(), split(100).images, batch_size=100), split(100).images.flatten(1))
    assert asked == [100, 50, 25, 25, 25, 25]


@pytest.mark.slow
def test_outputs_that_are_not_finite(outputs, ltx, tmp_path, monkeypatch):
    tensors, said = read_tensors(next(outputs.glob("targets/*/target.safetensors")))
    write_tensors(tmp_path / "large.safetensors", tensors | {"5.weight": tensors["5.weight"] * 1e38}, said)
    given = (*SMOKE, f"target.checkpoint={tmp_path / 'large.safetensors'}")
    assert ltx("construct", *given)[0] == 0
    status, _, err = ltx("eval", *given)
    assert (status, "of 360 test images are not finite" in one_line(err)) == (1, True)
    plain = evaluation.outputs
    monkeypatch.setattr(
        evaluation, "outputs", lambda *args, **how: plain(*args, **how).fill_(torch.nan)
    )  # the ticket's
    ticket = last_line(ltx("construct", *SMOKE, "seed=5", f"output_dir={outputs}")[1])
    status, out, _ = ltx("eval", str(ticket), f"output_dir={outputs}")
    assert status == 0
    found = json.loads(last_line(out).read_text())
    assert (found["ticket_accuracy"], found["agreement"], found["max_deviation"]) == (0, 0, None)
    shutil.rmtree(ticket.parent)
