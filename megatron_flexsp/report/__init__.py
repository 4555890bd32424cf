"""What happened in each step, or what was foreseen: traces in, pictures out. No torch, no Megatron."""
