"""GPT-2's ops: `reference` specifies each in plain PyTorch."""
