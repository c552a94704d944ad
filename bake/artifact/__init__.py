"""An artifact: what it is made of, its record, and where it goes. Nothing here knows a plan.

Reading order: ``loading``, ``carrier``; ``schema``, ``names``, ``record``; ``frontmatter``,
``base``, ``base_digests``; ``destination``; ``artifact``, ``staged``.
"""

from bake.artifact.artifact import Artifact
from bake.artifact.carrier import CARRIERS, KINDS, Carrier, carrier_of

__all__ = ["CARRIERS", "KINDS", "Artifact", "Carrier", "carrier_of"]
