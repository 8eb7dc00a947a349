"""What was trained, as servers take it: what each of them takes, the files it reads, and the command that serves them."""
