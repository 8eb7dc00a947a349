"""What `layerpeft compare` is made of: arms, what each is given, runs that are kept, and what they show."""
