"""Rewards: what a step of a rollout is worth to the learner."""
