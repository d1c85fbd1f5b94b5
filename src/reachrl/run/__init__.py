"""What lands on disk: the run folder, metrics, checkpoints, videos, provenance and the report."""
