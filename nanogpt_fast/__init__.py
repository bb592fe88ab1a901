"""nanogpt_fast: train, finetune, sample and evaluate GPT-2-class models, in plain PyTorch ops."""

__version__ = "0.1.0"
