"""What a configuration would need, predicted from its numbers alone: memory by part, time by part, what to change."""
