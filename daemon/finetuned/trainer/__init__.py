"""The trainer: one attempt at one job, in a process of its own. The only part that imports torch."""
