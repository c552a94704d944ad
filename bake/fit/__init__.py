"""Fit directions: from two classes of activations to bake's own file, and to a recipe.

``methods`` has one function a method, ``collect`` and ``saved`` are where activations come from,
``split`` and ``auroc`` what a fit is measured by, ``sweep`` puts them together over all sites.
"""

from bake.fit.methods import METHODS, Classes, Fitted, Method
from bake.fit.sweep import SiteFit, Sweep, sweep

__all__ = ["METHODS", "Classes", "Fitted", "Method", "SiteFit", "Sweep", "sweep"]
