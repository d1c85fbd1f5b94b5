"""What a run keeps on disk: its folder, metrics, checkpoints, records and lock."""
