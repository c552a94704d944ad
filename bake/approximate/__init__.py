"""Closed-form least-squares folds for edits that no exact fold reaches.

An ablation at one site only is no stock weight: the skip path carries the component past it. What
the last writer before the site reads predicts most of what the hook would take away, though, and a
low-rank update of that writer can add the prediction. The fit needs activations, so that a model
and texts are run; everything that it finds is a ready weight update and an offset, which ``plan``
folds exactly. What the edit loses by that is measured on texts that the fit has not seen.
"""

from bake.approximate.fit import Calibration, Fit, Settings, calibrate
from bake.approximate.stand_in import approximate, labelled

__all__ = ["Calibration", "Fit", "Settings", "approximate", "calibrate", "labelled"]
