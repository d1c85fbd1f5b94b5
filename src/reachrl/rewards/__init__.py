"""Rewards: scores of a rollout's steps."""
