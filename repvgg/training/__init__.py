"""Training runs: the Lightning module, its callbacks, the settings, and the folders of runs.

`run` tells a run from its settings to its checkpoints. `settings` checks a configuration, `setup`
builds the trainer and the network from it, and `compatibility` checks that these fit the data.
`parts`, `additions`, `optimizers`, `criterion` and `loggers` take what the user names by
`_target_`. `groups` decides what trains. `classifier` is the Lightning module. `callbacks`,
`checkpoints` and `divergence` are its callbacks. `runs` resumes a run.
"""
