"""Measure a network on a data set: python scripts/evaluate.py ckpt=PATH data=digits

Configured by configs/evaluate.yaml; --help lists what can be set. See docs/evaluate.md.
"""

from repvgg.commands import evaluate

if __name__ == "__main__":
    evaluate.main()
