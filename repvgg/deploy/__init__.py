"""Deployments: a folded network, its files, and the certificate that every one was verified.

`run` is the story of one, `certificate` what is written and checked again.
"""
