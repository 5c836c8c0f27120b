"""Training runs: the Lightning module, its callbacks, the settings, and the folders of runs.

`classifier` learns, `checkpoints` and `callbacks` save and measure, `settings` checks a
configuration, `runs` resumes one.
"""
