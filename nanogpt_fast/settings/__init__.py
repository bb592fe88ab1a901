"""A run's configuration: from argv and files to frozen dataclasses."""
