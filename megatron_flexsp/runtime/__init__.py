"""Plan -> tensors: groups, packing, all-to-all and packed attention. Knows torch, not Megatron.

Tensor names carry their dimensions: T tokens of a pack, t tokens of one rank's slice, H query heads,
G key/value heads, h and g the heads that one rank holds during attention, D head width,
E the width of values where it is another.
"""

from megatron_flexsp.runtime.groups import GroupPool, SequenceGroup
from megatron_flexsp.runtime.hosts import Hosts
from megatron_flexsp.runtime.packing import PackLayout, Piece, ring_size_of
from megatron_flexsp.runtime.ring import RingSchedule, ring_attention
from megatron_flexsp.runtime.ulysses import at_one_width, key_value_heads_needed, ulysses_attention

__all__ = [
    "GroupPool",
    "Hosts",
    "PackLayout",
    "Piece",
    "RingSchedule",
    "SequenceGroup",
    "at_one_width",
    "key_value_heads_needed",
    "ring_attention",
    "ring_size_of",
    "ulysses_attention",
]
