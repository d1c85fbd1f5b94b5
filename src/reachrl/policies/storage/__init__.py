"""Storage shared by all families of policies: folders of safetensors files, local or on the hub."""
