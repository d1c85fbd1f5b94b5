"""What all families of policies store alike: folders of safetensors files, on this machine or on the hub."""
