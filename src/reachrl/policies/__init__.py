"""Vision-language-action policies with a value head: what acts, and what is trained."""
