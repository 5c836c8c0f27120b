"""Deployments: a folded network, its files, and a certificate that every file was verified.

`run` is the story of a deployment. `settings` reads its configuration, `verification` compares,
`files` exports, `measure` times. The folder `report` holds the results and writes them for people.
`certificate` puts everything beside the files and verifies the folder again. `evaluate` and
`predict` run a network or a file on images.
"""
