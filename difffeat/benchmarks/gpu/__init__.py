"""`make gpu`: correctness, ceilings and speed on one NVIDIA GPU, for a card that is lent for minutes; rehearsed on a CPU."""
