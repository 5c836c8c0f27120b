"""Deploy a trained network: python deploy.py ckpt=runs/.../checkpoints/best.ckpt

Folds the network, writes it in each format, reloads every file from disk and compares it with the
trained network in float64. The folder gets its name only if every check passes.
"""

from repvgg import signals, streams

if __name__ == "__main__":
    signals.end_at_once()
    streams.open_closed()
    from repvgg.commands import deploy

    deploy.main()
