"""The network between the ranks, measured before a run needs it: `python -m nanogpt_fast.doctor --ranks`."""
