"""Deployments: a folded network, its files, and a certificate that every file was verified.

`run` is the story of a deployment. `settings` reads its configuration, `verification` compares,
`files` exports, `measure` times, `report` holds the results. `summary` puts them into words;
`markdown` and `webpage` write them for people. `certificate` writes everything beside the files and
verifies the folder again.
"""
