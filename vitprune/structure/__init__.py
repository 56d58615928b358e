"""Structured methods that learn what to keep while they train, one file each; the file name is the method's name.

``vitprune.learn.learn`` trains with one of them, and returns the plan and the weights that it was made for.
"""
