"""A backbone that only tests know: a small DiT with learned positions and two scales of output.

All that fitscale needs of it is in this folder (its YAML too) and in the line below.
"""

from fitscale.model.backbone import register
from tests.learned_dit.spec import LEARNED_DIT

register(LEARNED_DIT)
