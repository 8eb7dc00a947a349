"""What is done to the chosen layers; one file each. These files alone build on PEFT's tuner classes."""
