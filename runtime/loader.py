"""Batches made ahead by other processes, a part at a time, and brought to the device."""

import itertools
import math
import os
import signal

import torch

from data import collate

PART = 64  # samples that a loader process makes at once


def load_batches(samples, keys, workers, device):
    """Batches of tensors on the device, each with the Bad items it lacks, made ahead by `workers` processes.

    workers: None for one per CPU core of this process. They make parts of a batch, together one batch ahead:
    a whole batch in each, of 2048 pictures and sounds, would take 46 GB for 16 of them.
    """
    workers = cores() if workers is None else workers
    keys = iter(keys)
    first = next(keys, [])
    waiting = []  # number of parts of each batch that the loader has asked for

    def parts():
        for batch in itertools.chain([first], keys):
            waiting.append(math.ceil(len(batch) / PART))
            for at in range(0, len(batch), PART):
                yield batch[at : at + PART]

    ahead = max(2, math.ceil(len(first) / PART / workers)) if workers else None  # parts of each process
    loader = iter(torch.utils.data.DataLoader(
        samples, batch_sampler=parts(), num_workers=workers, prefetch_factor=ahead, collate_fn=collate,
        worker_init_fn=ignore_signals, pin_memory=device.type == "cuda"))
    for part in loader:
        yield join_parts([part, *itertools.islice(loader, waiting.pop(0) - 1)], device)


def join_parts(parts, device):
    """One batch of several that collate made, on the device but for its "index"."""
    bad = [item for _, items in parts for item in items]
    good = [batch for batch, _ in parts if batch is not None]
    batch = {}
    for key in good[0] if good else ():
        place = "cpu" if key == "index" else device
        batch[key] = torch.cat([part[key].to(place, non_blocking=True) for part in good])
    return batch or None, bad


def cores():
    """CPU cores that this process may use, shared out among torchrun's processes on this machine."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, every // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def ignore_signals(worker):
    """In loader processes: a signal to the whole group ends the run through the main process alone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
