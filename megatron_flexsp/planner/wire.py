"""A plan as bytes, for the way from the rank that plans to all others.

JSON is for people and for files. For thousands of ranks its text takes long to write and to parse, which rows of
numbers do not.
"""

import json
from dataclasses import fields
from itertools import accumulate, pairwise

import numpy as np

from megatron_flexsp.planner.plans import SCHEMA, MicroBatch, Plan, PlanError

_NUMBER = np.dtype("<i4")


def plan_to_bytes(plan: Plan) -> bytes:
    """The plan as bytes that ``plan_from_bytes`` reads back to an equal one.

    A line of JSON holds the plan's own fields. Little-endian 32-bit numbers follow: the first rank of every
    micro-batch, then every degree, every number of sequences, whether each is recomputed (0 or 1), and all sequences
    in list order.
    """
    items = plan.micro_batches
    head = {"schema": SCHEMA} | {item.name: getattr(plan, item.name) for item in fields(Plan)}
    head["micro_batches"] = len(items)
    rows = [
        [item.first_rank for item in items],
        [item.degree for item in items],
        [len(item.sequences) for item in items],
        [item.recomputed for item in items],
        [position for item in items for position in item.sequences],
    ]
    return json.dumps(head).encode() + b"\n" + b"".join(np.array(row, dtype=_NUMBER).tobytes() for row in rows)


def plan_from_bytes(payload: bytes) -> Plan:
    """The plan that ``plan_to_bytes`` wrote.

    Raises
    ------
    PlanError
        If it was written by a version with another form of plans, or is cut off.
    """
    line, _, body = payload.partition(b"\n")
    head = json.loads(line)
    if head.pop("schema") != SCHEMA:
        raise PlanError(f"the plan that was sent is no {SCHEMA}: run the same version of megatron-flexsp on all nodes")
    count = head.pop("micro_batches")
    numbers = np.frombuffer(body, dtype=_NUMBER)
    first_ranks, degrees, sizes, recomputed = numbers[: 4 * count].reshape(4, count).tolist()
    sequences = tuple(numbers[4 * count :].tolist())
    if len(sequences) != sum(sizes):
        raise PlanError(f"the plan that was sent has {len(sequences)} sequences where {sum(sizes)} are expected")
    held = [sequences[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]
    return Plan(micro_batches=tuple(map(MicroBatch, first_ranks, degrees, held, map(bool, recomputed))), **head)
