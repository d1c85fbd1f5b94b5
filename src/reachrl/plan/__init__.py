"""What a configuration would need: memory by part, time by part, what to change; traced on the meta device."""
