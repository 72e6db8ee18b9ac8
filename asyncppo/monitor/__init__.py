"""The live view of a run, from its files; it never talks to the run itself.

follow  a run as its files tell it while they grow
live    the view in a terminal, and one line a step elsewhere
words   durations, shares, sparklines and bars
"""
