"""Training by many processes on one machine or a cluster, by Ray; the only place that imports it."""
