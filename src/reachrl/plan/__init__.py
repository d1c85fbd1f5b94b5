"""Memory and time of a configuration, predicted by tracing its policy, and advice where it does not fit."""
