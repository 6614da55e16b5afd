"""fitscale trains diffusion transformers at every size and fits the law of compute against FID."""

import fitscale.model  # noqa: F401 (registers the backbones, so that a config of any of them can be read in every room)
