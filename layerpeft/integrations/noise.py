"""What other libraries say about each other: kept back, unless somebody asks for it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_back(verbose: bool = False) -> Iterator[None]:
    """Inside, loggers speak from errors on and Python's warnings are not shown; with `verbose` all is as it was.

    What of it a user can act on is said by layerpeft itself: the modules without loaded weights, what is not installed, what a
    recipe's settings come to. Levels of loggers stay as they are, since transformers reads its own for its progress bars.
    """
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if not verbose:
            logging.disable(max(before, logging.WARNING))
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
