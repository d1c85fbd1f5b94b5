"""Low-rank adapters of any policy: beside its linear maps, in peft's files, folded into the weights."""
