"""What a run has learnt: the loss on the same rows before and after, which batches that differ do not blur."""

import itertools

import torch


@torch.no_grad()
def loss_of(run, batches=8):
    """The model's loss on some of the rows that it is trained on, without dropout."""
    model = run.model
    was = model.training
    model.eval()
    losses = [model(**batch).loss.item() for batch in itertools.islice(run.trainer.get_train_dataloader(), batches)]
    model.train(was)
    return sum(losses) / len(losses)


def learns(run, share):
    """Train, demand that the loss falls to less than a share of what it was, and return the result.

    A run that learns nothing has a share of 1. What runs came to was measured over processors' kernels, threads and
    seeds; a bound lies about halfway between that and 1.
    """
    before = loss_of(run)
    result = run.train()
    after = loss_of(run)
    assert after < share * before, f"{before:.3f} -> {after:.3f}"
    return result
