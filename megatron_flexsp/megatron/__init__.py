"""The seams to Megatron-LM: the only room that imports it."""
