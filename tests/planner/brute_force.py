"""The optimum of a tiny batch by trying everything, written without the planner's own solvers.

Every sequence in turn joins a micro-batch that is there or starts one, on every block and, in lockstep, in
every round. Nothing is pruned and nothing is taken for symmetric, so this is slow and hard to get wrong.
"""

from megatron_flexsp.planner import first_ranks, legal_degrees


def best_seconds(schedule, lengths, cost_model, domain_size, **settings):
    """The step of the best legal plan."""
    lengths = sorted(lengths)
    if schedule == "lockstep":
        return _lockstep(lengths, cost_model, domain_size, **settings)
    best = _nested(lengths, cost_model, domain_size, **settings)
    if settings.get("recomputed_capacity") is None:
        return best
    return min(best, _nested(lengths, cost_model, domain_size, recomputes_all=True, **settings))


def _nested(
    lengths,
    cost_model,
    domain_size,
    *,
    capacity,
    degrees,
    recomputed_capacity=None,
    recomputes_all=False,
    count_multiple=1,
    pipeline_stages=1,
):
    blocks = [(first, d) for d in legal_degrees(domain_size) if d in degrees for first in first_ranks(d, domain_size)]
    best = float("inf")
    packs = []  # (first rank, degree, lengths)

    def is_recomputed(degree, held):
        return recomputes_all or (recomputed_capacity is not None and min(held) > degree * capacity)

    def fits(degree, held):
        return sum(held) <= degree * (recomputed_capacity if is_recomputed(degree, held) else capacity)

    def step():
        seconds, longest, counts = [0.0] * domain_size, [0.0] * domain_size, [0] * domain_size
        for first, degree, held in packs:
            taken = cost_model.micro_batch_seconds(held, degree, recomputed=is_recomputed(degree, held))
            for rank in range(first, first + degree):
                seconds[rank] += taken
                longest[rank] = max(longest[rank], taken)
                counts[rank] += 1
        filler = cost_model.micro_batch_overhead_seconds
        for rank in range(domain_size):
            while counts[rank] == 0 or counts[rank] % count_multiple:
                seconds[rank] += filler
                longest[rank] = max(longest[rank], filler)
                counts[rank] += 1
        return max(s + (pipeline_stages - 1) * m for s, m in zip(seconds, longest, strict=True))

    def place(index):
        nonlocal best
        if index == len(lengths):
            best = min(best, step())
            return
        for _, degree, held in packs:
            if fits(degree, [*held, lengths[index]]):
                held.append(lengths[index])
                place(index + 1)
                held.pop()
        for first, degree in blocks:
            if fits(degree, [lengths[index]]):
                packs.append((first, degree, [lengths[index]]))
                place(index + 1)
                packs.pop()

    place(0)
    return best


def _lockstep(
    lengths,
    cost_model,
    domain_size,
    *,
    capacity,
    degrees,
    recomputed_capacity=None,
    count_multiple=1,
    pipeline_stages=1,
):
    best = float("inf")
    rounds = []  # each whether it is recomputed, and a list of (degree, lengths)
    capacities = {False: capacity} if recomputed_capacity is None else {False: capacity, True: recomputed_capacity}

    def step():
        filler = cost_model.micro_batch_overhead_seconds
        taken = [
            max(cost_model.micro_batch_seconds(held, degree, recomputed=again) for degree, held in groups)
            for again, groups in rounds
        ]
        while not taken or len(taken) % count_multiple:
            taken.append(filler)
        return sum(taken) + (pipeline_stages - 1) * max(taken)

    def place(index):
        nonlocal best
        if index == len(lengths):
            best = min(best, step())
            return
        for again, groups in rounds:
            for degree, held in groups:
                if sum(held) + lengths[index] <= degree * capacities[again]:
                    held.append(lengths[index])
                    place(index + 1)
                    held.pop()
        for degree in degrees:
            for again, groups in rounds:
                if lengths[index] > degree * capacities[again]:
                    continue
                if sum(other for other, _ in groups) + degree <= domain_size:
                    groups.append((degree, [lengths[index]]))
                    place(index + 1)
                    groups.pop()
            for again, holds in capacities.items():
                if lengths[index] <= degree * holds:
                    rounds.append((again, [(degree, [lengths[index]])]))
                    place(index + 1)
                    rounds.pop()

    place(0)
    return best
