"""What is done to the chosen layers; one folder each. These files alone build on PEFT's tuner classes.

Whoever imports one of them, a pickle of a config too, has every config type of ours in PEFT's tables.
"""

from layerpeft.tuners import methods as methods
