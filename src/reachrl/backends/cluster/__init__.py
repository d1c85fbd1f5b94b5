"""Training with many processes on one machine or a cluster. The only package that imports Ray."""
