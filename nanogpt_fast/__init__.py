"""nanogpt_fast: train, finetune, sample and evaluate GPT-2-class models on our own Triton kernels."""

__version__ = "0.1.0"
