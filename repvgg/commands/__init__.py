"""The commands of `repvgg`, one module each; the work is in the other folders.

A command's module imports nothing heavy, so that --help answers at once.
"""
