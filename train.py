"""Train a network: python train.py model=repvgg_a0 rdrop=true

Configured by configs/train.yaml; `python train.py --help` lists what can be set. A run lives in
runs/<data>-<model>/<time>/: its configuration, TensorBoard events and checkpoints.
"""

from repvgg import signals, streams

if __name__ == "__main__":
    signals.end_at_once()
    streams.open_closed()
    from repvgg.commands import train

    train.main()
