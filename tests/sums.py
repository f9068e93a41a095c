"""A task file: forty of the embedded sums, for tests that start many runs."""

from tasks.arithmetic import answer, problems, reward

__all__ = ["answer", "load", "reward"]


def load(split):
    return problems(split, 40)
