"""What a run leaves behind: its directory, checkpoints, figures, and how it stops."""
