"""The registry: one line a backbone."""

from fitscale.model.backbone import register
from fitscale.model.dimr.spec import DIMR
from fitscale.model.fit.spec import FIT, FITV2
from fitscale.model.flag.spec import FLAG_DIT, LARGE_DIT

register(FITV2)
register(FIT)
register(FLAG_DIT)
register(LARGE_DIT)
register(DIMR)
