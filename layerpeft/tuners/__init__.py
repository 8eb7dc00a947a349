"""What is done to the chosen layers; one folder each. These files alone build on PEFT's tuner classes."""
