"""Rules that operators may look for, why this architecture has no place for them, what is nearest.

A plan fixes theta: its length, the rank of every adapter and the base below it are the same on all
devices and in all rounds, and every device makes the server's step itself on one opened vector.
"""

LORA_RULES = {
    "fed_sb": "Fed-SB (arXiv:2502.15436) trains an r x r matrix between B and A, which plans "
    "do not have; the nearest that is exact as well is 'ffa'",
    "hetlora": "HetLoRA (arXiv:2401.06432) has a rank for each device, while a plan has one; the "
    "nearest is 'fedit' at a rank that the smallest device can train",
}
