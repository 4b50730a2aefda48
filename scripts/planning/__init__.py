"""What `plan.py` and the tables of hardware count with: cards, launchers, data, time. It may import `run` and what is
below it."""
