"""How a rank's micro-batches may end, so that the reduction of gradients never blocks an exchange.

With overlapped reduction a rank begins to reduce in the backward of its last micro-batch (interleaved
pipelines: of its last ``count_multiple`` ones), while that micro-batch's own exchanges still go on. The
reduction waits for every rank of the domain. If a member of that micro-batch has more to run, it can't join
before the exchanges are done; on a device that runs communication in the order in which it was queued, these
then wait for the reduction, and the reduction for them. A rank that ends with fillers reduces in those, when
it exchanges nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from megatron_flexsp.planner.plans import MicroBatch


def ranks_that_end_early(
    micro_batches: Sequence["MicroBatch"], domain_size: int, count_multiple: int
) -> NDArray[np.int64]:
    """The ranks that share one of their last micro-batches with a rank that runs more than they do.

    These need ``count_multiple`` fillers more. Where that is one, it costs no time: such a rank's last micro-batch is
    the shared one, and whoever goes on takes no less than a filler. Where it is more, a rank may have run long ones of
    its own since, and ends later for its fillers. Fillers added for one rank give no other rank this trouble, since all
    members of a micro-batch that one of them outlasts get theirs.
    """
    edges = np.zeros(domain_size + 1, dtype=np.int64)
    for item in micro_batches:
        edges[item.first_rank] += 1
        edges[item.first_rank + item.degree] -= 1
    still_to_run = np.cumsum(edges[:-1])
    ends_early = np.zeros(domain_size, dtype=bool)
    for item in micro_batches:
        block = slice(item.first_rank, item.first_rank + item.degree)
        still_to_run[block] -= 1
        if item.degree > 1:
            left = still_to_run[block]
            ends_early[block] |= (left < count_multiple) & (left < left.max())
    return np.flatnonzero(ends_early)
