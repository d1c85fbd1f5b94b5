"""The robotic process reward model: segment, label, fit, score."""
