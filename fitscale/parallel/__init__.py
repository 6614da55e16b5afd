import warnings

# Here because it must come before megatron-core's first import, which remarks on CUDA libraries that are optional.
warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
