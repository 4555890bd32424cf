"""The seams to Megatron-LM: the only room beside `cpu` that changes it."""
