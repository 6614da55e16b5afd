"""The registry: one line a backbone."""

from fitscale.model.backbone import register
from fitscale.model.dimr.spec import DIMR
from fitscale.model.fit.spec import FIT, FITV2

register(FITV2)
register(FIT)
register(DIMR)
