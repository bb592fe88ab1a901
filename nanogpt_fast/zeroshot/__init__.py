"""What a model is worth without being trained for it: evaluate's --tasks."""
