"""The activations of target and ticket on calibration images."""

import pytest
import torch
from conftest import images, small_resnet

from ltx import Feedback, construct
from ltx.constructions import feedback
from ltx.constructions.calibration import gather


@pytest.mark.slow
@pytest.mark.parametrize("construction", ["2L", "L+1"])
@pytest.mark.parametrize("batch_norm", ["keep", "fold"])
def test_values_at_samples_are_those_of_all_positions(monkeypatch, construction, batch_norm):
    seen, plain = [], feedback.FeedbackSolver._error

    def compared(self, rows, kinds):
        for ours, _, _ in self._others:
            whole = gather(self.calibration.at(ours, rows), self._samples.output)
            some = self.calibration.at(ours, rows, self._samples.output)
            torch.testing.assert_close(some[0], whole, equal_nan=True)
            seen.append(ours)
        return plain(self, rows, kinds)

    monkeypatch.setattr(feedback.FeedbackSolver, "_error", compared)
    construct(
        small_resnet("tanh"), construction=construction, base_set_size=10, selection="feedback", batch_norm=batch_norm,
        calibration=images(64, 8), feedback=Feedback(samples=400),
    )  # fmt: skip
    assert len(set(seen)) > 3
