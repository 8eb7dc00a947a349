"""What layerpeft costs, beside full fine-tuning, plain PEFT, GaLore, LISA and hand-written torch."""
